//! Moves a running guest between hosts, or between a host and a file.
//!
//! - [`Source`] walks a [`SourceMachine`] and sends it; [`Destination`] waits for a guest and
//!   fills a [`DestinationMachine`];
//! - [`protocol`]: what both say, with the table of messages;
//! - [`ownership`]: who owns the guest when, and how that stays true when things break;
//! - [`postcopy`]: memory that follows its guest, over as many connections as that takes;
//! - [`transport`]: TCP and unix sockets behind one trait;
//! - [`handover`]: to another process of the same host, without copying memory;
//! - [`mod@file`]: a guest at rest, in the same frames.
//!
//! A page flows from the dirty log through a batch, a frame and a socket straight into guest
//! memory at the other side. Migration sees guest memory, dirty log and saved states, and knows
//! no device and no engine.

mod destination;
mod error;
pub mod file;
pub mod handover;
mod machine;
mod options;
pub mod ownership;
mod pages;
pub mod postcopy;
mod priority;
pub mod protocol;
mod report;
mod source;
pub mod transport;
mod uffd;
mod wire;

pub use destination::{Arrival, Destination, Stage, Witness};
pub use error::{MigrationError, MigrationFailure, Whereabouts};
pub use machine::{DestinationMachine, MachineError, Slowdown, SourceMachine};
pub use options::{
    CancelToken, Compression, DestinationOptions, MigrationOptions, Mode, NoConvergence, Progress,
    Step, Verification,
};
pub use ownership::Doubt;
pub use postcopy::{Following, Standing};
pub use priority::step_back;
pub use report::{
    DestinationReport, MigrationReport, Outcome, PostCopyReport, RoundKind, RoundReport,
    SwitchOverReport,
};
pub use source::{Phase, Source, Verdict, predict, resolve};
pub use uffd::{UffdError, Userfaultfd};
