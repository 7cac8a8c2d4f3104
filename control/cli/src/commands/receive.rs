//! `receive`: a place where VMs arrive, one process each.

use std::time::Duration;

use dunlin_api::ErrorCode;
use dunlin_api::launch::{GuestOrigin, LaunchReply, Overrides, Start};
use dunlin_api::migration::Endpoint;
use dunlin_api::security::Security;
use dunlin_api::status::VmStatus;
use tokio::task::JoinSet;

use super::absolute_endpoint;
use super::migrate::milliseconds;
use super::run::{debug_console, nets};
use super::security::security;
use crate::args::ReceiveArgs;
use crate::error::CliError;
use crate::launch::VmProcess;
use crate::printer::Printer;
use crate::terminal::Interrupts;

/// Waits for VMs. Those that have arrived end with this command, unless it detaches them.
pub(super) async fn receive(args: ReceiveArgs, printer: &Printer) -> Result<(), CliError> {
    let mut interrupts = Interrupts::listen()?;
    let mut place = Place {
        listen: absolute_endpoint(args.listen)?,
        security: security(args.tls, None)?,
        overrides: Overrides {
            name: args.name,
            engine: args.engine.map(Into::into),
            nets: nets(args.nets)?,
            debug_console: args.debugcon.map(debug_console).transpose()?,
        },
        peer_timeout_ms: milliseconds(args.peer_timeout),
        reconnect_window_ms: milliseconds(args.reconnect_window),
        taken_before: false,
    };
    // VMs that have arrived and end with this command.
    let mut held: JoinSet<Result<(), CliError>> = JoinSet::new();
    loop {
        let mut process = place.open()?;
        let arrived = tokio::select! {
            arrived = place.arrival(&mut process, printer) => arrived?,
            () = interrupts.next() => {
                process.end().await;
                break;
            }
        };
        let status = match arrived {
            Arrival::Runs(status) => status,
            // The guest before holds the address until its source has heard that all went well.
            Arrival::AddressBusy => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            Arrival::Ended => return Err(process.ended()),
        };
        place.taken_before = true;
        printer.result(&status, || format!("{}", status.name));
        printer.note(&format!(
            "{}: arrived and runs, pid {}",
            status.name, status.pid
        ));
        if args.detach {
            process.detach()?;
        } else {
            held.spawn(until_end(process));
        }
        if args.once {
            tokio::select! {
                Some(ended) = held.join_next() => flatten(ended)?,
                () = interrupts.next(), if !args.detach => {}
                else => {}
            }
            break;
        }
    }
    // Dropping the tasks closes the lifelines; wait for what hangs on them.
    held.shutdown().await;
    Ok(())
}

/// Stays with a VM until it has ended.
async fn until_end(mut process: VmProcess) -> Result<(), CliError> {
    while process.reply().await?.is_some() {}
    process.wait().map(drop)
}

fn flatten(ended: Result<Result<(), CliError>, tokio::task::JoinError>) -> Result<(), CliError> {
    ended.unwrap_or(Err(CliError::Interrupted))
}

enum Arrival {
    Runs(Box<VmStatus>),
    AddressBusy,
    Ended,
}

/// Where VMs arrive.
struct Place {
    listen: Endpoint,
    security: Security,
    overrides: Overrides,
    peer_timeout_ms: u64,
    reconnect_window_ms: u64,
    taken_before: bool,
}

impl Place {
    fn open(&self) -> Result<VmProcess, CliError> {
        let guest = GuestOrigin::Peer {
            listen: self.listen.clone(),
            overrides: self.overrides.clone(),
            peer_timeout_ms: Some(self.peer_timeout_ms),
            reconnect_window_ms: Some(self.reconnect_window_ms),
            security: self.security.clone(),
        };
        VmProcess::start(guest, Start::AtOnce)
    }

    async fn arrival(
        &mut self,
        process: &mut VmProcess,
        printer: &Printer,
    ) -> Result<Arrival, CliError> {
        while let Some(reply) = process.reply().await? {
            match reply {
                LaunchReply::Listening(endpoint) => {
                    if !self.taken_before {
                        printer.note(&format!("waiting for a VM at {endpoint}"));
                    }
                    self.listen = endpoint;
                }
                LaunchReply::Ready(status) => return Ok(Arrival::Runs(Box::new(status))),
                LaunchReply::Failed(error)
                    if self.taken_before && error.code == ErrorCode::Busy =>
                {
                    return Ok(Arrival::AddressBusy);
                }
                LaunchReply::Failed(error) => return Err(error.into()),
                LaunchReply::Ended(_) => return Ok(Arrival::Ended),
            }
        }
        Ok(Arrival::Ended)
    }
}
