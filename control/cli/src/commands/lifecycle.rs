//! `pause`, `resume`, `stop`.

use dunlin_api::status::VmStatus;
use dunlin_api::{VmName, route};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::json;

use super::ps::display_state;
use crate::args::StopArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::printer::Printer;

/// Pauses a VM.
pub(super) async fn pause(name: &VmName, printer: &Printer) -> Result<(), CliError> {
    change(name, route::PAUSE, printer).await
}

/// Lets a VM go on.
pub(super) async fn resume(name: &VmName, printer: &Printer) -> Result<(), CliError> {
    change(name, route::RESUME, printer).await
}

async fn change(name: &VmName, path: &str, printer: &Printer) -> Result<(), CliError> {
    let status: VmStatus = Client::new(name).post(path, &()).await?;
    printer.result(&status, || {
        format!("{name}: {}", display_state(status.state))
    });
    Ok(())
}

/// Ends a VM, and returns once its process has.
pub(super) async fn stop(args: StopArgs, printer: &Printer) -> Result<(), CliError> {
    let client = Client::new(&args.name);
    if args.kill {
        kill(&client).await?;
    } else {
        let status: VmStatus = client.post(route::STOP, &()).await?;
        wait_for_end(status.pid).await;
    }
    let name = &args.name;
    printer.result(&json!({ "name": name, "state": "stopped" }), || {
        format!("{name}: stopped")
    });
    Ok(())
}

/// Returns when the process has ended, or after ten seconds.
pub(super) async fn wait_for_end(pid: u32) {
    let open = || {
        let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
    };
    let Some(process) = open() else {
        return;
    };
    let waiting = tokio::task::spawn_blocking(move || {
        let mut process = [PollFd::new(&process, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        rustix::event::poll(&mut process, Some(&limit))
    });
    // Whether it ended or took too long: the caller goes on.
    let _outcome = waiting.await;
}

/// Ends the process whatever it does. The process is the one that listens on the VM's socket,
/// not whoever has the number in the `pid` file by now.
async fn kill(client: &Client) -> Result<(), CliError> {
    let killing = || CliError::host(format!("kill the process of VM \"{}\"", client.name()));
    let socket = client.connect(&client.place().api_socket()).await?;
    let credentials = rustix::net::sockopt::socket_peercred(&socket)
        .map_err(std::io::Error::from)
        .map_err(killing())?;
    let process = rustix::process::pidfd_open(credentials.pid, PidfdFlags::empty())
        .map_err(std::io::Error::from)
        .map_err(killing())?;
    rustix::process::pidfd_send_signal(&process, Signal::KILL)
        .map_err(std::io::Error::from)
        .map_err(killing())?;
    wait_for_end(credentials.pid.as_raw_nonzero().get().unsigned_abs()).await;
    // A killed process cannot tidy up; a folder that stays is reused by the next VM of the name.
    let _stale_is_harmless = std::fs::remove_dir_all(client.place().directory());
    Ok(())
}
