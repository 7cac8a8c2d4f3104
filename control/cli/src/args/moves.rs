//! Arguments of what moves a guest.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use dunlin_api::migration::{Endpoint, Verify};
use dunlin_api::plan::{Compression, MoveMode};
use dunlin_api::size::{parse_duration, parse_size};
use dunlin_api::{DebugConsoleConfig, VmName};

use super::guest::{EngineArgument, NetArgument};
use super::security::{TargetArgument, TlsArgument};

/// Arguments of `save`.
#[derive(Debug, Args)]
pub struct SaveArgs {
    /// The VM's name
    pub name: VmName,
    /// The file to make; it must not exist
    #[arg(long, value_name = "FILE")]
    pub to: PathBuf,
    /// End the VM once it is saved, instead of leaving it paused
    #[arg(long, conflicts_with = "live")]
    pub stop: bool,
    /// Let the VM run on: it stops for a moment, and the file holds that moment
    #[arg(long)]
    pub live: bool,
    /// With --live, save a VM that writes to disks, although they are not in the file
    #[arg(long, requires = "live")]
    pub without_disks: bool,
}

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The VM's name
    pub name: VmName,
    /// Where "receive" waits: tcp://HOST:PORT or unix:PATH
    #[arg(long, value_name = "ENDPOINT")]
    pub to: TargetArgument,
    /// Encrypt, with ca.pem, cert.pem and key.pem from this folder; "off" sends to other hosts in
    /// the clear
    #[arg(long, value_name = "DIR|off")]
    pub tls: Option<TlsArgument>,
    /// Longest pause of the guest
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = parse_duration)]
    pub downtime: Duration,
    /// Copy memory before the guest moves ("pre"), after ("post"), or what keeps the limit ("auto")
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    pub mode: ModeArgument,
    /// Connections that carry pages; "auto" takes as many as gain something
    #[arg(long, value_name = "N|auto", default_value = "auto")]
    pub streams: StreamsArgument,
    /// Most bytes a second to send, in powers of 1024: 100M, 2G
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub bandwidth: Option<u64>,
    /// Compress pages: where that gains time ("auto"), never ("off"), or always ("lz4")
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    pub compress: CompressArgument,
    /// Give the move up after this time; the guest then goes on here
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Silence after which the other side counts as lost
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub peer_timeout: Duration,
    /// How long a guest whose memory still follows it waits for a new connection after its own
    /// broke; both sides have to be told
    #[arg(long, value_name = "TIME", default_value = "300s", value_parser = parse_duration)]
    pub reconnect_window: Duration,
    /// Most rounds of copying while the guest runs
    #[arg(long, value_name = "N")]
    pub max_rounds: Option<u32>,
    /// Compare hashes of all memory: "after" the hand-over (no longer pause) or "before" it
    #[arg(long, value_enum, value_name = "WHEN", num_args = 0..=1, default_missing_value = "after")]
    pub verify: Option<VerifyArgument>,
    /// Say what is expected, move, and say how far that was off; "only" does not move
    #[arg(long, value_enum, value_name = "WHAT", num_args = 0..=1, require_equals = true,
          default_missing_value = "move")]
    pub explain: Option<ExplainArgument>,
    /// Write a chart of the move
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text).map_err(|error| error.to_string())? {
        0 => Err("nothing would move at 0 bytes a second".to_owned()),
        rate => Ok(rate),
    }
}

/// `--mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ModeArgument {
    /// Pre-copy first; post-copy when that cannot keep the limit
    #[default]
    Auto,
    /// All memory goes before the guest does
    Pre,
    /// The guest goes first, its memory follows
    Post,
}

impl From<ModeArgument> for MoveMode {
    fn from(argument: ModeArgument) -> Self {
        match argument {
            ModeArgument::Auto => Self::Auto,
            ModeArgument::Pre => Self::Pre,
            ModeArgument::Post => Self::Post,
        }
    }
}

/// `--compress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum CompressArgument {
    /// Where it has been measured to gain time
    #[default]
    Auto,
    /// Never
    Off,
    /// Always
    Lz4,
}

impl From<CompressArgument> for Compression {
    fn from(argument: CompressArgument) -> Self {
        match argument {
            CompressArgument::Auto => Self::Auto,
            CompressArgument::Off => Self::Off,
            CompressArgument::Lz4 => Self::Lz4,
        }
    }
}

/// `--explain`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExplainArgument {
    /// Predict, move, compare
    Move,
    /// Predict
    Only,
}

/// `--streams`: a number from 1 on, or as many as gain something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamsArgument(pub Option<u16>);

/// Most connections that can be asked for.
const MAX_STREAMS: u16 = 64;

impl FromStr for StreamsArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<u16>() {
            _ if text == "auto" => Ok(Self(None)),
            Ok(count @ 1..=MAX_STREAMS) => Ok(Self(Some(count))),
            _ => Err(format!(
                "write \"auto\" or a number from 1 to {MAX_STREAMS}"
            )),
        }
    }
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

/// Arguments of `handover`.
#[derive(Debug, Args)]
pub struct HandOverArgs {
    /// The VM's name
    pub name: VmName,
    /// Longest pause of the guest; a hand-over that would take longer is taken back
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = parse_duration)]
    pub downtime: Duration,
}

/// Arguments of `receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Where to wait: tcp://ADDRESS:PORT or unix:PATH
    #[arg(long, value_name = "ENDPOINT")]
    pub listen: Endpoint,
    /// Encrypt, with ca.pem, cert.pem and key.pem from this folder; "off" lets other hosts send in
    /// the clear
    #[arg(long, value_name = "DIR|off")]
    pub tls: Option<TlsArgument>,
    /// Name here, instead of the one at the source
    #[arg(long)]
    pub name: Option<VmName>,
    /// Switch port sockets of this host, in the order of the guest's devices
    #[arg(long = "net", value_name = "SOCKET")]
    pub nets: Vec<NetArgument>,
    /// Another engine than at the source
    #[arg(long, value_enum)]
    pub engine: Option<EngineArgument>,
    /// Another place than at the source for the bytes of the guest's debug port
    #[arg(long, value_name = "unix:PATH|file:PATH")]
    pub debugcon: Option<DebugConsoleConfig>,
    /// Silence after which the other side counts as lost
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub peer_timeout: Duration,
    /// How long a guest whose memory still follows it waits for a new connection after its own
    /// broke; both sides have to be told
    #[arg(long, value_name = "TIME", default_value = "300s", value_parser = parse_duration)]
    pub reconnect_window: Duration,
    /// Take one VM, stay until it ends or moves on, and then return
    #[arg(long)]
    pub once: bool,
    /// Let VMs that have arrived outlive this command; with --once, return on arrival
    #[arg(long)]
    pub detach: bool,
}
