//! Moves a running guest between hosts, or between a host and a file.
//!
//! The source side walks a [`SourceMachine`], the destination fills a [`DestinationMachine`];
//! migration sees guest memory, dirty log and saved states, and knows no device and no engine.

mod machine;

pub use machine::{DestinationMachine, MachineError, SourceMachine};
