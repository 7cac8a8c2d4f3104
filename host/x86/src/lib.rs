//! The x86-64 architecture, by software: CPU state, CPUID baselines, local APIC, the software CPU.
//!
//! [`state::CpuState`] is what an engine saves and restores, the same for every engine.
//! This crate knows nothing of ours: guest memory reaches it through [`memory::PhysicalMemory`].
//!
//! [`Cpu`] is the software CPU. It runs from [`Cpu::run`] until something needs the machine.

#[cfg_attr(
    test,
    expect(clippy::duplicate_mod, reason = "its tests interpret, and translate")
)]
pub mod cpu;
pub mod cpuid;
mod decode;
mod exec;
pub mod float;
mod host;
pub mod kvmclock;
pub mod lapic;
pub mod memory;
mod mmu;
#[cfg(target_arch = "x86_64")]
mod native;
pub mod profile;
pub mod saved;
pub mod state;

pub use cpu::{Cpu, CpuConfig, StateError, Stop, Translation};
pub use mmu::CodeMap;
