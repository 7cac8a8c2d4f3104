//! The x86-64 architecture, by software: CPU state, CPUID baselines, local APIC, the software CPU.
//!
//! [`state::CpuState`] is what an engine saves and restores, the same for every engine.
//! This crate knows nothing of ours: guest memory reaches it through [`memory::PhysicalMemory`].

pub mod cpuid;
pub mod float;
pub mod kvmclock;
pub mod lapic;
pub mod memory;
pub mod saved;
pub mod state;
