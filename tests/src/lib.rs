//! Two hosts on one machine: drives the `dunlin` binary as a user does.
//!
//! The demo and the end-to-end tests start switches and VM processes through this crate, talk to
//! the guest's agent over TCP, and ask what it saw. It links none of ours: everything goes through
//! the command line and the network.

pub mod client;
pub mod guest;
pub mod hosts;
pub mod process;
