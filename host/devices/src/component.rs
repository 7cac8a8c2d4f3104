//! What the machine asks of every device: stop, go on, save, restore.

use std::fmt::Debug;

use dunlin_guest::{RestoreError, SavedState};

/// Where a paused machine may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// In this process or another one of this host: what the host's kernel holds for the guest is
    /// there, too.
    ThisHost,
    /// On any host: what the guest believes to be durable is.
    AnyHost,
}

/// A part of the machine with a state that moves with the VM.
///
/// ```text
///            pause()              save()
///   Running ────────► Paused ◄──────────────┐
///      ▲                │  │                │
///      └────────────────┘  └── restore() ───┘
///            resume()
/// ```
///
/// A machine is built paused; `restore` and `save` are called while paused only.
/// No method has a default: a device that forgets to save does not compile.
pub trait Component: Debug + Send + Sync {
    /// Unique name within the machine, stable across hosts, e.g. `"serial"`, `"pci/00:02.0"`.
    fn name(&self) -> String;

    /// Stops all activity: worker threads are parked, in-flight I/O is completed or will be
    /// redone after `resume` from the saved state. Guest memory is not written afterwards.
    fn pause(&self, reach: Reach);

    /// Goes on after `pause` or `restore`.
    fn resume(&self);

    /// The state, complete.
    fn save(&self) -> SavedState;

    /// Replaces the state by one that `save` made, here or elsewhere.
    ///
    /// # Errors
    /// [`RestoreError`] when the state does not fit; the device is then unchanged or reset.
    fn restore(&self, state: &SavedState) -> Result<(), RestoreError>;
}
