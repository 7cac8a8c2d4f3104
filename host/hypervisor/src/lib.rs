//! Engines that run a guest's processors.
//!
//! [`Vm`] and [`Vcpu`] are what the machine's loop sees; [`soft`] runs the software CPU of
//! `dunlin-x86`, [`kvm`] runs the host's processor (where that is an x86-64), [`probe`] tells what this host offers and
//! chooses. The engine runs the CPU and reports each access that is not RAM as an [`Exit`]; it never
//! calls a device, and a device never learns which engine runs. Must not depend on devices,
//! migration or the machine's assembly.

#[cfg_attr(not(target_arch = "x86_64"), path = "kvm/absent.rs")]
pub mod kvm;
pub mod probe;
pub mod soft;
mod traits;

pub use traits::{
    Engine, EngineError, Exit, Sampled, Vcpu, VcpuExitCounts, VcpuHandle, VcpuId, VcpuProfile, Vm,
};
