//! Hands a running guest to another process of the same host: no page is copied.
//!
//! ```text
//! old process (source)                 new process (destination)
//!   │ preamble ───────────────────────────▶ │
//!   │ ◀─────────────────────────── preamble │
//!   │ Configuration ──────────────────────▶ │
//!   │ Descriptors: RAM, ports, disks, … ──▶ │ builds the machine around them, maps RAM
//!   │ ◀────────────────────────────── Ready │
//!   │ SwitchOver ─────────────────────────▶ │
//!   │ (pauses) States ────────────────────▶ │ restores, and writes no guest memory
//!   │ ◀─────────────────────────── Prepared │
//!   │ Commit ─────────────────────────────▶ │ owns the guest, starts it
//!   │ ◀──────────────────────────── Running │
//!   │ Leftovers, Settled ─────────────────▶ │
//! ```
//!
//! The messages are those of a move, and so are the rules of ownership ([`crate::ownership`]): until
//! the old process begins to write `Commit` it resumes whenever anything fails, without asking. It
//! may do so while the new process is still restoring, and both have the same RAM. So restoring
//! must not write it: what a guest has to find in memory when it goes on, such as its clock page, is
//! written by [`DestinationMachine::start`](crate::DestinationMachine::start). The session checks
//! the dirty log for that before it says `Prepared`.
//!
//! One thing differs. In a move a dead destination costs what the guest did since its start there,
//! and the source resumes it from the memory that it kept. Here there is one memory: once the guest
//! has run in the new process, the old one's states do not fit it any more. So there is one right
//! to run the guest ([`Right`]), an object of the kernel that both processes hold. The new one takes
//! it before it starts the guest, and gives it back when that fails; the old one resumes after
//! `Commit` only when it could take it. When the new process is found dead with the right, the guest
//! has died with it ([`Guest::Gone`]), as it would have with the old process on any other day. While
//! it lives, has it, and does not answer, the guest is in doubt ([`Guest::InDoubt`]).
//!
//! Everything that takes long is done before the pause. What can wait until the guest runs, such as
//! the console's history, follows as [`Leftovers`](crate::protocol::message::Leftovers).
//! `docs/adr/0006-hand-over-on-one-host.md` has the reasons.

mod destination;
mod right;
mod source;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::MigrationError;
use crate::machine::{MachineError, SourceMachine};
use crate::ownership::Doubt;
use crate::protocol::{Kind, ProtocolError};
use crate::report::{DestinationReport, Outcome, SwitchOverReport};

pub use destination::HandOverArrival;
pub use right::{Claimed, Right};
pub use source::hand_over;

/// Name of the descriptor of guest RAM.
pub const RAM: &str = "ram";

/// Name of the right to run the guest.
const RIGHT: &str = "right";

/// Longest name of a descriptor.
const MAX_NAME: usize = 64;

/// Descriptors by name, in the order in which they travel.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<(String, OwnedFd)>);

impl Descriptors {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one.
    pub fn add(&mut self, name: impl Into<String>, descriptor: OwnedFd) {
        self.0.push((name.into(), descriptor));
    }

    /// Takes the one of that name out, if it came.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        let at = self.0.iter().position(|(other, _)| other == name)?;
        Some(self.0.remove(at).1)
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    fn into_parts(self) -> (Vec<String>, Vec<OwnedFd>) {
        self.0.into_iter().unzip()
    }

    /// What a message named, and what came with it; untrusted.
    fn pair(
        kind: Kind,
        names: Vec<String>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, ProtocolError> {
        if names.len() != descriptors.len() {
            let (named, came) = (names.len(), descriptors.len());
            let reason = format!("{named} descriptors are named, {came} came");
            return Err(ProtocolError::invalid(kind, reason));
        }
        let twice = |(at, name): (usize, &String)| names[..at].contains(name);
        if names.iter().enumerate().any(twice) || names.iter().any(|name| name.len() > MAX_NAME) {
            let reason = "a name comes twice or is too long";
            return Err(ProtocolError::invalid(kind, reason));
        }
        Ok(Self(names.into_iter().zip(descriptors).collect()))
    }
}

/// What the new process can have while the guest runs already.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// The machine's own.
    pub body: Vec<u8>,
    /// Descriptors that go with it.
    pub descriptors: Descriptors,
}

/// A running machine that another process of this host may go on with.
///
/// [`SourceMachine::pause`] stops it for that: what this host's kernel holds may stay there.
/// Neither the dirty log nor throttling is used.
pub trait DepartingMachine: SourceMachine {
    /// Copies of the descriptors that the machine is built around, RAM ([`RAM`]) excepted. Called
    /// while the guest runs.
    ///
    /// # Errors
    /// [`MachineError`] when one cannot be copied, or the machine cannot go on elsewhere.
    fn descriptors(&mut self) -> Result<Descriptors, MachineError>;

    /// What the other process can have later. The guest runs there.
    fn leftovers(&mut self) -> Leftovers;
}

/// How a guest is handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandOverOptions {
    /// The longest pause: one that would take longer is taken back, and tried again.
    pub downtime_limit: Duration,
    /// Pauses that may be tried.
    pub tries: u32,
    /// Time to reach the other process, and for it to build the machine.
    pub connect_timeout: Duration,
    /// Silence after which the other process counts as lost.
    pub idle_timeout: Duration,
    /// How long to ask who owns the guest when that was left open.
    pub inquiry_timeout: Duration,
}

impl Default for HandOverOptions {
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(50),
            tries: 16,
            connect_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(10),
            inquiry_timeout: Duration::from_secs(30),
        }
    }
}

/// What was measured in one hand-over. Times are milliseconds, sizes bytes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct HandOverReport {
    /// How it ended.
    pub outcome: Outcome,
    /// Size of the guest's RAM, of which nothing was copied.
    pub ram_bytes: u64,
    /// The descriptors that the new process goes on with.
    pub descriptors: Vec<String>,
    /// From the start until the new process had built the machine.
    pub built_ms: f64,
    /// Each pause that was taken back because it would have been too long.
    pub aborted_pauses_ms: Vec<f64>,
    /// When the last pause began, counted from the start.
    pub paused_at_ms: Option<f64>,
    /// From the pause until the new process's word that the guest runs had arrived.
    pub blackout_ms: Option<f64>,
    /// The parts of the blackout.
    pub switch_over: Option<SwitchOverReport>,
    /// What the new process measured.
    pub destination: Option<DestinationReport>,
    /// From the start to the end.
    pub total_ms: f64,
}

/// Where a guest is after a hand-over that did not complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// It runs in the old process as before.
    RunsHere,
    /// It is in the old process, but the machine did not resume: see the error.
    PausedHere,
    /// It is paused in the old process; the new one has the right to run it, lives as far as can be
    /// known, and does not say whether it does.
    InDoubt(Doubt),
    /// It ran in the new process, and ended with it.
    Gone,
}

/// A hand-over that did not complete: why, where the guest is, and what was measured until then.
#[derive(Debug, thiserror::Error)]
#[error("failed to hand the guest over")]
pub struct HandOverFailure {
    /// Why.
    #[source]
    pub error: MigrationError,
    /// Where the guest is now.
    pub guest: Guest,
    /// By which a guest in doubt can be claimed later.
    pub right: Option<Arc<Right>>,
    /// What was measured.
    pub report: HandOverReport,
}

fn host(what: &'static str) -> impl Fn(std::io::Error) -> MigrationError {
    move |source| MigrationError::Host { what, source }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
