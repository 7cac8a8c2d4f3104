//! `run` and `restore`: a VM process with this terminal as its console.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dunlin_api::launch::{GuestOrigin, LaunchReply, Overrides, Start};
use dunlin_api::snapshot::Reading;
use dunlin_api::status::{VmState, VmStatus};
use dunlin_api::{
    DebugConsoleConfig, DiskConfig, ModuleConfig, NetConfig, VERSION, VmConfig, VmName,
};

use super::absolute;
use crate::args::{DiskArgument, NetArgument, RestoreArgs, RunArgs, modules};
use crate::client::Client;
use crate::error::CliError;
use crate::launch::VmProcess;
use crate::printer::Printer;
use crate::terminal::{self, Ending, Interrupts, Output};

/// Boots a VM.
pub(super) async fn run(args: RunArgs, printer: &Printer) -> Result<ExitCode, CliError> {
    let detach = args.detach;
    let config = configuration(args)?;
    config.validate()?;
    start(GuestOrigin::Boot(Box::new(config)), detach, printer).await
}

/// Runs a saved VM.
pub(super) async fn restore(args: RestoreArgs, printer: &Printer) -> Result<ExitCode, CliError> {
    let guest = GuestOrigin::File {
        path: absolute(&args.file)?,
        reading: match args.eager {
            true => Reading::Eager,
            false => Reading::Lazy,
        },
        overrides: Overrides {
            name: args.name,
            engine: args.engine.map(Into::into),
            nets: nets(args.nets)?,
            debug_console: args.debugcon.map(debug_console).transpose()?,
        },
    };
    start(guest, args.detach, printer).await
}

fn configuration(args: RunArgs) -> Result<VmConfig, CliError> {
    let name = match args.name {
        Some(name) => name,
        None => default_name()?,
    };
    let (initrd, modules) = match &args.initrd {
        Some(text) => initrd(text)?,
        None => (None, Vec::new()),
    };
    Ok(VmConfig {
        version: VERSION,
        name,
        kernel: absolute(&args.kernel)?,
        initrd,
        modules,
        command_line: args.cmdline,
        memory_bytes: args.memory,
        cpus: args.cpus,
        disks: args.disks.into_iter().map(disk).collect::<Result<_, _>>()?,
        nets: nets(args.nets)?,
        engine: args.engine.into(),
        baseline: args.baseline,
        on_reboot: args.on_reboot.into(),
        debug_console: args.debugcon.map(debug_console).transpose()?,
        debug_exit: args.isa_debug_exit,
        legacy: args.legacy,
        verify: args.verify,
    })
}

/// One initial RAM disk, or a list of modules. What names a file is that file, whatever characters
/// its name has.
fn initrd(text: &Path) -> Result<(Option<PathBuf>, Vec<ModuleConfig>), CliError> {
    match text.to_str() {
        Some(list) if list.contains([',', ' ']) && !text.exists() => {
            let mut modules = modules(list).map_err(CliError::Argument)?;
            for module in &mut modules {
                module.path = absolute(&module.path)?;
            }
            Ok((None, modules))
        }
        _ => Ok((Some(absolute(text)?), Vec::new())),
    }
}

fn default_name() -> Result<VmName, CliError> {
    format!("vm-{}", std::process::id())
        .parse()
        .map_err(|error: dunlin_api::NameError| CliError::Argument(error.to_string()))
}

fn disk(disk: DiskArgument) -> Result<DiskConfig, CliError> {
    Ok(DiskConfig {
        path: absolute(&disk.path)?,
        read_only: disk.read_only,
    })
}

/// Network devices with paths that mean the same in another process.
pub(super) fn nets(nets: Vec<NetArgument>) -> Result<Vec<NetConfig>, CliError> {
    nets.into_iter()
        .map(|net| {
            Ok(NetConfig {
                switch: absolute(&net.switch)?,
                mac: net.mac,
            })
        })
        .collect()
}

/// A place for a debug console's bytes that means the same in another process.
pub(super) fn debug_console(place: DebugConsoleConfig) -> Result<DebugConsoleConfig, CliError> {
    Ok(match place {
        DebugConsoleConfig::Unix(path) => DebugConsoleConfig::Unix(absolute(&path)?),
        DebugConsoleConfig::File(path) => DebugConsoleConfig::File(absolute(&path)?),
    })
}

async fn start(guest: GuestOrigin, detach: bool, printer: &Printer) -> Result<ExitCode, CliError> {
    // Before the process exists, so that no signal leaves it behind.
    let mut interrupts = Interrupts::listen()?;
    let when = if detach {
        Start::AtOnce
    } else {
        Start::WhenWatched
    };
    let mut process = VmProcess::start(guest, when)?;
    let status = tokio::select! {
        status = ready(&mut process) => match status? {
            Some(status) => status,
            None => return Err(process.ended()),
        },
        () = interrupts.next() => {
            process.end().await;
            return Err(CliError::Interrupted);
        }
    };
    if let Some(why) = status
        .restore
        .as_ref()
        .and_then(|restore| restore.why_eager.as_ref())
    {
        printer.note(&format!("its memory was read before it ran: {why}"));
    }
    if detach {
        process.detach()?;
        printer.result(&status, || format!("{}", status.name));
        printer.note(&format!(
            "runs on engine \"{}\" ({}); \"dunlin console {}\" attaches",
            status.engine, status.engine_reason, status.name
        ));
        return Ok(ExitCode::SUCCESS);
    }
    foreground(process, status, &mut interrupts, printer).await
}

/// Waits until the process runs the guest; `None` when it ended without a word.
async fn ready(process: &mut VmProcess) -> Result<Option<VmStatus>, CliError> {
    while let Some(reply) = process.reply().await? {
        match reply {
            LaunchReply::Listening(_) => {}
            LaunchReply::Ready(status) | LaunchReply::Ended(status) => return Ok(Some(status)),
            LaunchReply::Failed(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

async fn foreground(
    mut process: VmProcess,
    status: VmStatus,
    interrupts: &mut Interrupts,
    printer: &Printer,
) -> Result<ExitCode, CliError> {
    let name = &status.name;
    printer.note(&format!(
        "{name}: engine \"{}\" ({}); Ctrl-] detaches",
        status.engine, status.engine_reason
    ));
    let client = Client::new(name);
    let ending = match client.connect(&client.place().console_socket()).await {
        Ok(console) => {
            let output = if printer.is_json() {
                Output::Error
            } else {
                Output::Standard
            };
            terminal::attach(console, interrupts, output).await?
        }
        // It ended before we could attach.
        Err(_) => Ending::Closed,
    };
    match ending {
        Ending::Detached => {
            process.detach()?;
            printer.result(&status, String::new);
            printer.note(&format!(
                "\r\ndetached; \"dunlin console {name}\" attaches again, \"dunlin stop {name}\" ends it"
            ));
            Ok(ExitCode::SUCCESS)
        }
        Ending::Interrupted => {
            process.end().await;
            printer.note(&format!("{name}: stopped"));
            Err(CliError::Interrupted)
        }
        Ending::Closed => {
            let last = tokio::select! {
                last = ready(&mut process) => last?,
                () = interrupts.next() => {
                    process.end().await;
                    return Err(CliError::Interrupted);
                }
            };
            let Some(last) = last else {
                return Err(process.ended());
            };
            let orderly = process.wait()?.success();
            printer.result(&last, String::new);
            printer.note(&format!("{name}: {}", describe(&last)));
            Ok(match last.exit_status {
                Some(status) => ExitCode::from(status),
                None if orderly => ExitCode::SUCCESS,
                None => ExitCode::FAILURE,
            })
        }
    }
}

fn describe(last: &VmStatus) -> String {
    let reason = last.reason.as_deref().unwrap_or("no reason given");
    let name = &last.name;
    match (last.successor, last.state) {
        (Some(pid), _) => format!(
            "handed over, goes on in process {pid}; \"dunlin console {name}\" attaches, \
             \"dunlin stop {name}\" ends it"
        ),
        (None, VmState::Moved) => format!("moved ({reason})"),
        (None, _) => format!("stopped ({reason})"),
    }
}
