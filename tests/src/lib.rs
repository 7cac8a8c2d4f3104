//! Two hosts on one machine: drives the `dunlin` binary as a user does.
//!
//! The demo and the end-to-end tests start switches and VM processes through this crate, talk to
//! the guest's agent over TCP, and ask what it saw. Benchmarks move the benchmark guest through
//! it, and hear
//! from its ticks when it ran. It links none of ours but that guest: everything goes through the
//! command line
//! and the network.

pub mod client;
pub mod guest;
pub mod hosts;
pub mod mover;
pub mod process;
pub mod proxy;
pub mod soak;
pub mod ticks;
