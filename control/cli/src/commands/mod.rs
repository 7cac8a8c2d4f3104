//! What each command does, a file each.

mod certificates;
mod console;
mod explain;
mod handover;
mod inspect;
mod lifecycle;
mod migrate;
mod probe;
mod profile;
mod ps;
mod receive;
mod run;
mod save;
mod security;
mod switch;
mod vm_process;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dunlin_api::migration::Endpoint;

use crate::args::Command;
use crate::error::CliError;
use crate::host::Host;
use crate::printer::Printer;

/// Does what the command line says.
///
/// # Errors
/// [`CliError`], to be printed once by the caller.
pub async fn execute(
    command: Command,
    printer: &Printer,
    host: &dyn Host,
) -> Result<ExitCode, CliError> {
    match command {
        Command::Run(args) => return run::run(*args, printer).await,
        Command::Restore(args) => return run::restore(args, printer).await,
        Command::VmProcess { spec } => return vm_process::run(&spec, host),
        Command::Ps => ps::ps(printer).await,
        Command::Console(args) => console::console(&args.name, printer).await?,
        Command::Pause(args) => lifecycle::pause(&args.name, printer).await?,
        Command::Resume(args) => lifecycle::resume(&args.name, printer).await?,
        Command::Stop(args) => lifecycle::stop(args, printer).await?,
        Command::Save(args) => save::save(args, printer).await?,
        Command::Migrate(args) => migrate::migrate(args, printer).await?,
        Command::Handover(args) => handover::hand_over(args, printer).await?,
        Command::Receive(args) => receive::receive(args, printer).await?,
        Command::Inspect(args) => inspect::inspect(args, printer, host).await?,
        Command::Switch(args) => switch::switch(args, printer, host)?,
        Command::Certificates(args) => certificates::certificates(&args, printer)?,
        Command::Probe => probe::probe(printer, host),
    }
    Ok(ExitCode::SUCCESS)
}

/// A path that means the same in another process.
fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(CliError::host(format!(
        "resolve the path \"{}\"",
        path.display()
    )))
}

/// An endpoint that means the same in another process.
fn absolute_endpoint(endpoint: Endpoint) -> Result<Endpoint, CliError> {
    Ok(match endpoint {
        Endpoint::Unix(path) => Endpoint::Unix(absolute(&path)?),
        tcp @ Endpoint::Tcp(_) => tcp,
    })
}
