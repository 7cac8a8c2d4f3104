//! `receive`: a place where VMs arrive, one process each.

use std::time::Duration;

use dunlin_api::ErrorCode;
use dunlin_api::launch::{GuestOrigin, LaunchReply, Overrides};
use dunlin_api::migration::Endpoint;
use dunlin_api::status::VmStatus;

use super::absolute;
use super::run::nets;
use crate::args::ReceiveArgs;
use crate::error::CliError;
use crate::launch::VmProcess;
use crate::printer::Printer;
use crate::terminal::Interrupts;

/// Waits for VMs; those that have arrived go on when this command ends.
pub(super) async fn receive(args: ReceiveArgs, printer: &Printer) -> Result<(), CliError> {
    let mut interrupts = Interrupts::listen()?;
    let once = args.once;
    let mut listen = match args.listen {
        Endpoint::Unix(path) => Endpoint::Unix(absolute(&path)?),
        tcp @ Endpoint::Tcp(_) => tcp,
    };
    let overrides = Overrides {
        name: args.name,
        engine: args.engine.map(Into::into),
        nets: nets(args.nets)?,
    };
    let mut arrived = false;
    loop {
        let mut process = VmProcess::start(GuestOrigin::Peer {
            listen: listen.clone(),
            overrides: overrides.clone(),
        })?;
        let outcome = tokio::select! {
            outcome = arrival(&mut process, &mut listen, arrived, printer) => outcome?,
            () = interrupts.next() => {
                process.end().await;
                // Nothing was asked of this command that it did not do.
                return if arrived || !once { Ok(()) } else { Err(CliError::Interrupted) };
            }
        };
        match outcome {
            Outcome::Arrived(status) => {
                arrived = true;
                process.detach()?;
                printer.result(&status, || format!("{}", status.name));
                printer.note(&format!(
                    "{}: arrived and runs, pid {}",
                    status.name, status.pid
                ));
                if once {
                    return Ok(());
                }
            }
            // The guest before us still holds the address, until its source has heard that all
            // went well.
            Outcome::AddressBusy => tokio::time::sleep(Duration::from_millis(100)).await,
            Outcome::Ended => return Err(process.ended()),
        }
    }
}

enum Outcome {
    Arrived(Box<VmStatus>),
    AddressBusy,
    Ended,
}

async fn arrival(
    process: &mut VmProcess,
    listen: &mut Endpoint,
    arrived: bool,
    printer: &Printer,
) -> Result<Outcome, CliError> {
    while let Some(reply) = process.reply().await? {
        match reply {
            LaunchReply::Listening(endpoint) => {
                if !arrived {
                    printer.note(&format!("waiting for a VM at {endpoint}"));
                }
                *listen = endpoint;
            }
            LaunchReply::Ready(status) => return Ok(Outcome::Arrived(Box::new(status))),
            LaunchReply::Failed(error) if arrived && error.code == ErrorCode::Busy => {
                return Ok(Outcome::AddressBusy);
            }
            LaunchReply::Failed(error) => return Err(error.into()),
            LaunchReply::Ended(_) => return Ok(Outcome::Ended),
        }
    }
    Ok(Outcome::Ended)
}
