//! Arguments of what moves a guest.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use dunlin_api::VmName;
use dunlin_api::migration::{Endpoint, Verify};
use dunlin_api::size::{parse_duration, parse_size};

use super::guest::{EngineArgument, NetArgument};

/// Arguments of `save`.
#[derive(Debug, Args)]
pub struct SaveArgs {
    /// The VM's name
    pub name: VmName,
    /// The file to make; it must not exist
    #[arg(long, value_name = "FILE")]
    pub to: PathBuf,
    /// End the VM once it is saved, instead of leaving it paused
    #[arg(long)]
    pub stop: bool,
}

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The VM's name
    pub name: VmName,
    /// Where "receive" waits: tcp://ADDRESS:PORT or unix:PATH
    #[arg(long, value_name = "ENDPOINT")]
    pub to: Endpoint,
    /// Longest pause of the guest
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = parse_duration)]
    pub downtime: Duration,
    /// Most bytes a second to send, such as 100M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub bandwidth: Option<u64>,
    /// Most rounds of copying while the guest runs
    #[arg(long, value_name = "N")]
    pub max_rounds: Option<u32>,
    /// Compare hashes of all memory: "after" the hand-over (no longer pause) or "before" it
    #[arg(long, value_enum, value_name = "WHEN", num_args = 0..=1, default_missing_value = "after")]
    pub verify: Option<VerifyArgument>,
    /// Write a chart of the rounds
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// `--verify`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VerifyArgument {
    /// After the hand-over; costs no pause
    After,
    /// During the pause, so that a difference keeps the guest where it is
    Before,
}

impl From<VerifyArgument> for Verify {
    fn from(argument: VerifyArgument) -> Self {
        match argument {
            VerifyArgument::After => Self::After,
            VerifyArgument::Before => Self::Before,
        }
    }
}

/// Arguments of `receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Where to wait: tcp://ADDRESS:PORT or unix:PATH
    #[arg(long, value_name = "ENDPOINT")]
    pub listen: Endpoint,
    /// Name here, instead of the one at the source
    #[arg(long)]
    pub name: Option<VmName>,
    /// Switch port sockets of this host, in the order of the guest's devices
    #[arg(long = "net", value_name = "SOCKET")]
    pub nets: Vec<NetArgument>,
    /// Another engine than at the source
    #[arg(long, value_enum)]
    pub engine: Option<EngineArgument>,
    /// Take one VM, stay until it ends or moves on, and then return
    #[arg(long)]
    pub once: bool,
    /// Let VMs that have arrived outlive this command; with --once, return on arrival
    #[arg(long)]
    pub detach: bool,
}
