//! The benchmark guest: one small ELF file that runs on every machine that boots by PVH.
//!
//! It fills memory, writes to a working set at a set rate, and ticks on port 0xe9, all as its
//! command line says
//! ([`Parameters`]). It needs no toolchain: [`elf`] assembles it. What it does runs in ring 3,
//! which is fast even where
//! a kernel emulates ring 0.
//!
//! It proves that nothing was lost. Each write to the working set first looks for the number of
//! the last write to
//! that page; on demand all memory is scrubbed, page by page; what is wrong is said on the port,
//! and
//! [`Listener`] makes an error of it, as of a tick that is missing or comes twice.
//!
//! Its clock is the TSC. One that jumps, forward or back, as it may when the guest comes to another
//! host, costs it no more than a few intervals.
//!
//! Data flows from here to a file, and from the guest's port to a listener. Depends on nothing of
//! ours.

mod assembler;
mod image;
mod parameters;
mod program;
mod stream;

pub use image::elf;
pub use parameters::{Fill, Parameters, Wait};
pub use stream::{Event, Listener, NUMBER_MASK, StreamError};

/// The port on which the guest ticks.
pub const PORT: u16 = 0xe9;
