//! What migration asks of the machine that it moves.

use std::fmt;

use dunlin_guest::{Memory, SavedState};

/// Why the machine could not do what migration asked. The cause is the machine's own error.
#[derive(Debug, thiserror::Error)]
#[error("machine failed to {action}")]
pub struct MachineError {
    /// What was asked.
    pub action: &'static str,
    /// Why it failed.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// How much of their time vCPUs are withheld from a guest that writes faster than can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Slowdown(u8);

impl Slowdown {
    /// The guest runs at its full speed.
    pub const NONE: Self = Self(0);
    /// The most that may be withheld: a guest that stands still is a downtime.
    pub const MOST: Self = Self(99);

    /// `percent` of the time; at most [`Slowdown::MOST`].
    pub const fn percent(percent: u8) -> Self {
        if percent > Self::MOST.0 {
            return Self::MOST;
        }
        Self(percent)
    }

    /// Percent of the time that is withheld.
    pub const fn as_percent(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Slowdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.0)
    }
}

/// A running machine that may leave this process.
pub trait SourceMachine: Send {
    /// Its RAM and dirty log.
    fn memory(&self) -> &Memory;

    /// What the destination must build before the first page arrives; opaque to migration.
    fn configuration(&self) -> Vec<u8>;

    /// Writes by vCPUs reach the dirty log from now on.
    ///
    /// # Errors
    /// [`MachineError`] when the engine refuses.
    fn start_dirty_tracking(&mut self) -> Result<(), MachineError>;

    /// Brings the engine's own record of written pages into the dirty log. Called before each
    /// harvest of the log.
    ///
    /// # Errors
    /// [`MachineError`] when the engine refuses.
    fn collect_dirty(&mut self) -> Result<(), MachineError>;

    /// Ends tracking; also called after a failed attempt.
    ///
    /// # Errors
    /// [`MachineError`] when the engine refuses.
    fn stop_dirty_tracking(&mut self) -> Result<(), MachineError>;

    /// Withholds so much of their time from vCPUs from now on, until the next call. The machine
    /// may choose which vCPUs it takes it from: those that write most. Ended by `Slowdown::NONE`;
    /// migration calls that whenever the guest stays here.
    ///
    /// # Errors
    /// [`MachineError`] when the engine cannot; migration goes on without.
    fn throttle(&mut self, slowdown: Slowdown) -> Result<(), MachineError>;

    /// Stops vCPUs and devices. Guest memory does not change from the return on.
    ///
    /// # Errors
    /// [`MachineError`] when it cannot be stopped; it is then running, or ends by itself.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// Goes on after `pause`: the move failed or was cancelled before the hand-over.
    ///
    /// # Errors
    /// [`MachineError`] when a part does not start.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// The state of every component, while paused. Saving may write guest memory (a clock page,
    /// a ring index): such pages are marked in the dirty log as any other.
    ///
    /// # Errors
    /// [`MachineError`] when a part cannot be saved.
    fn save(&mut self) -> Result<Vec<SavedState>, MachineError>;
}

/// A machine under construction that a guest may arrive in.
pub trait DestinationMachine: Send {
    /// Its RAM.
    fn memory(&self) -> &Memory;

    /// Gives every component its state. May be called again with newer states before `start`:
    /// a switch-over that would have missed the downtime limit is taken back and repeated.
    ///
    /// # Errors
    /// [`MachineError`] when a state does not fit; the guest must not be started then.
    fn restore(&mut self, states: Vec<SavedState>) -> Result<(), MachineError>;

    /// Runs the guest: called once, after ownership has passed to this side.
    ///
    /// # Errors
    /// [`MachineError`] when a part does not start. No vCPU may have run then, since the guest
    /// goes back to the source.
    fn start(&mut self) -> Result<(), MachineError>;
}
