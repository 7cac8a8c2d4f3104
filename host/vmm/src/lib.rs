//! One VM's process: assembly, lifecycle, vCPU loop, HTTP interface, isolation.
//!
//! ```text
//!   process ─► isolation, place (folder, lock), interface (HTTP, console, signals)
//!      │
//!      └─► machine (memory, engine, devices, vCPU threads) ─► lifecycle ─► the end
//!                 ▲                                             │
//!                 └──────── moving (migration, files) ◄─────────┘
//! ```
//!
//! [`run`] is all that the binary calls. This crate assembles what the other host crates provide
//! and is the only one that knows them all. Nothing of `control/` may be used here.

mod console;
mod files;
mod interface;
mod isolation;
mod lifecycle;
mod machine;
mod moving;
mod place;
mod process;

pub use machine::{AssemblyError, BootError, MachineFailure, StateError, VcpuError};
pub use moving::describe_snapshot;
pub use place::PlaceError;
pub use process::run;
