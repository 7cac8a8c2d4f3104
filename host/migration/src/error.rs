//! Why a guest did not move.

use dunlin_lane::LaneError;

use crate::machine::MachineError;
use crate::ownership::Doubt;
use crate::protocol::ProtocolError;
use crate::protocol::lane::LaneMessageError;
use crate::report::MigrationReport;
use crate::transport::TransportError;
use crate::uffd::UffdError;

/// Why a move failed.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The connection failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// Faults of guest memory could not be served.
    #[error(transparent)]
    Faults(#[from] UffdError),
    /// The peer, or a file, said something that cannot be.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// A page lane failed.
    #[error(transparent)]
    Lane(#[from] LaneError),
    /// A message on a page lane cannot be.
    #[error(transparent)]
    LaneMessage(#[from] LaneMessageError),
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The other side gave up and said why.
    #[error("the peer gave up: {reason}")]
    Peer {
        /// Its words.
        reason: String,
    },
    /// The guest writes faster than can be sent.
    #[error(
        "the guest did not converge: after {rounds} rounds {remaining_pages} pages remained, \
         which take about {predicted_ms:.0} ms to move, more than the limit of {limit_ms:.0} ms"
    )]
    DidNotConverge {
        /// Rounds that were made.
        rounds: u32,
        /// Pages that remained.
        remaining_pages: u64,
        /// How long a switch-over would have paused the guest.
        predicted_ms: f64,
        /// The downtime limit.
        limit_ms: f64,
    },
    /// A guest that was handed over has died with its process.
    #[error("the new process died with the guest, which it had started")]
    Gone,
    /// No hand-over to another process of this host was short enough.
    #[error("the hand-over was not done within {limit_ms:.0} ms, {tries} times: the guest runs on")]
    PauseTooLong {
        /// Pauses that were tried.
        tries: u32,
        /// The longest pause that was allowed.
        limit_ms: f64,
    },
    /// The time for the whole move is over.
    #[error("the move was not done after {elapsed_ms:.0} ms")]
    OutOfTime {
        /// How long it took until then.
        elapsed_ms: f64,
    },
    /// It was told to stop.
    #[error("the migration was cancelled")]
    Cancelled,
    /// Both sides hashed RAM and found different values.
    #[error("memory differs after the copy: {source_hash:#x} here, {destination_hash:#x} there")]
    Verification {
        /// This side's hash.
        source_hash: u64,
        /// The destination's.
        destination_hash: u64,
    },
    /// Nobody can say whether the destination runs the guest.
    #[error(
        "the destination was given the guest and does not answer; \
         the guest stays paused here until someone decides"
    )]
    InDoubt,
    /// The guest was handed over, and cannot get the rest of its memory.
    #[error(
        "the guest was handed over before all of its memory, and lost: {cause}; \
         its memory here stays as it was at the hand-over until someone decides"
    )]
    Lost {
        /// Why.
        cause: String,
    },
    /// The destination cannot take this guest.
    #[error("this destination cannot take the guest: {reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// The host gave no random numbers or no thread.
    #[error("the host failed to provide {what}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

impl MigrationError {
    /// The message with all its causes, for a peer or a report.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

/// Where the guest is after a move that did not complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whereabouts {
    /// It runs at the source as before.
    RunsHere,
    /// It is at the source, but the machine did not resume: see the error.
    PausedHere,
    /// It is paused at the source and may run at the destination.
    InDoubt(Doubt),
    /// It went to the destination, which cannot get the rest of its memory. The source has it as it
    /// was at the hand-over, paused; what it did since then is gone.
    Lost,
}

/// A move that did not complete: why, where the guest is, and what was measured until then.
#[derive(Debug, thiserror::Error)]
#[error("failed to move the guest")]
pub struct MigrationFailure {
    /// Why.
    #[source]
    pub error: MigrationError,
    /// Where the guest is now.
    pub guest: Whereabouts,
    /// What was measured.
    pub report: MigrationReport,
}
