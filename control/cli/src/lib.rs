//! The command line: what a user types, and what is printed.
//!
//! [`args`] says what can be typed; [`commands`] does it, a file per command; [`printer`] puts data
//! on standard output and everything else on standard error; [`client`] speaks the HTTP interface
//! of a VM's process; [`launch`] starts such a process; [`symbols`]
//! names addresses of a guest's kernel; [`host`] is what this crate asks of the
//! host's side. Must not link the host's crates: they come in through [`host::Host`].

pub mod args;
pub mod chart;
pub mod client;
pub mod commands;
pub mod error;
pub mod host;
pub mod launch;
pub mod printer;
pub mod symbols;
pub mod terminal;

use std::process::ExitCode;

use clap::Parser;

pub use host::Host;

/// Runs what the process's arguments say.
pub fn main(host: &dyn Host) -> ExitCode {
    let arguments = args::Arguments::parse();
    let printer = printer::Printer::new(arguments.json);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(commands::execute(arguments.command, &printer, host));
            // A thread may still wait in a read of the terminal: leave it behind.
            runtime.shutdown_background();
            result
        }
        Err(source) => Err(error::CliError::Host {
            action: "start the runtime".into(),
            source,
        }),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            printer.error(&error);
            ExitCode::FAILURE
        }
    }
}
