//! The devices of the machine that a guest sees, a folder or file each.
//!
//! An access arrives through [`bus::Bus`] from the vCPU's loop; interrupts leave through
//! `dunlin_guest::MsiSink`; data flows to `dunlin_storage` and `dunlin_vswitch`. A device never
//! learns which engine runs the CPU. Must not depend on engines, migration or assembly.

pub mod bus;
pub mod component;
