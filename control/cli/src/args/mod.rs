//! What can be typed. No behaviour: commands get plain values.

mod guest;
mod moves;
mod security;
mod switch;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use dunlin_api::VmName;
use dunlin_api::profile::DEFAULT_RATE;
use dunlin_api::size::parse_duration;

pub use guest::{DiskArgument, NetArgument, OnRebootArgument, RestoreArgs, RunArgs, modules};
pub use moves::{ExplainArgument, HandOverArgs, MigrateArgs, ReceiveArgs, SaveArgs};
pub use security::{CertificatesArgs, HostArgument, TargetArgument, TlsArgument};
pub use switch::SwitchArgs;

/// Runs, connects and moves virtual machines.
#[derive(Debug, Parser)]
#[command(
    name = "dunlin",
    version,
    max_term_width = 100,
    arg_required_else_help = true
)]
pub struct Arguments {
    /// Print the result as one JSON object on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a VM; its serial console is this terminal until Ctrl-] detaches
    Run(Box<RunArgs>),
    /// List the VMs of this runtime directory
    Ps,
    /// Attach to a VM's serial console; Ctrl-] detaches
    Console(NameArgs),
    /// Stop a VM's processors until "resume"
    Pause(NameArgs),
    /// Let a paused VM go on
    Resume(NameArgs),
    /// Save a VM to a file; the VM stays paused
    Save(SaveArgs),
    /// Run a VM that was saved to a file
    Restore(RestoreArgs),
    /// Move a running VM to a place where "receive" waits
    Migrate(MigrateArgs),
    /// Replace a running VM's process by one of this program, without copying memory
    Handover(HandOverArgs),
    /// Wait for VMs that move here, and run them
    Receive(ReceiveArgs),
    /// Make certificates for hosts that VMs move between ("--tls")
    Certificates(CertificatesArgs),
    /// End a VM
    Stop(StopArgs),
    /// Show a VM's status, exits, dirty rate and last move; or what a saved file holds
    Inspect(InspectArgs),
    /// Run a virtual switch
    Switch(SwitchArgs),
    /// Show what this host's processor, kernel and devices offer
    Probe,
    /// Be the process of one VM; started by the other commands
    #[command(hide = true)]
    VmProcess {
        /// The launch specification, as JSON
        spec: String,
    },
}

/// A VM by name.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// The VM's name
    pub name: VmName,
}

/// Arguments of `stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The VM's name
    pub name: VmName,
    /// End the process by force, whatever it is doing
    #[arg(long)]
    pub kill: bool,
}

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A VM's name, or a saved file (with a slash, or an existing file that no VM is named like)
    #[arg(value_name = "NAME|FILE")]
    pub what: PathBuf,
    /// Look where the time of the VM's processors goes (engine "soft"; of others only exits are known)
    #[arg(long)]
    pub profile: bool,
    /// What a profile looks at, and shows.
    #[command(flatten)]
    pub profile_of: ProfileArgs,
}

/// Arguments of `inspect --profile`.
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// How long to look
    #[arg(long = "for", value_name = "TIME", default_value = "5s", requires = "profile",
          value_parser = parse_duration)]
    pub time: Duration,
    /// Samples a second of each processor
    #[arg(long, value_name = "HZ", default_value_t = DEFAULT_RATE, requires = "profile")]
    pub rate: u32,
    /// Name the kernel's code by this vmlinux, System.map or copy of the guest's /proc/kallsyms
    #[arg(long, value_name = "FILE", requires = "profile")]
    pub symbols: Option<PathBuf>,
    /// How far the kernel moved itself from the addresses in that file, instead of finding out
    #[arg(long, value_name = "BYTES", requires = "symbols",
          allow_hyphen_values = true, value_parser = parse_offset)]
    pub symbol_offset: Option<u64>,
    /// Show so many places of the guest's code [default: 20, with --json all]
    #[arg(long, value_name = "N", requires = "profile")]
    pub top: Option<usize>,
    /// Show one processor only
    #[arg(long, value_name = "N", requires = "profile")]
    pub vcpu: Option<usize>,
    /// Draw the profile
    #[arg(long, value_name = "FILE", requires = "profile")]
    pub svg: Option<PathBuf>,
}

/// A distance in bytes, decimal or hexadecimal; a negative one wraps.
fn parse_offset(text: &str) -> Result<u64, String> {
    let (digits, negative) = match text.strip_prefix('-') {
        Some(digits) => (digits, true),
        None => (text, false),
    };
    let parsed = match digits.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => digits.parse(),
    };
    let value = parsed.map_err(|error| format!("no number of bytes: {error}"))?;
    Ok(if negative {
        value.wrapping_neg()
    } else {
        value
    })
}
