//! The engine that runs the host's processor, on hosts whose processor is no x86-64: it cannot be
//! had. The types have no values, so that whoever holds one never runs.

use std::sync::Arc;

use dunlin_guest::{Doorbell, InterruptLine, Memory, MsiSink, VectoredController};
use dunlin_x86::cpuid::Baseline;

use crate::probe::Ring0Speed;
use crate::{Engine, EngineError, Vcpu, VcpuId, Vm};

/// A VM on the host's processor.
#[derive(Debug)]
pub enum KvmVm {}

/// An open `/dev/kvm` that can run x86-64.
#[derive(Debug)]
pub(crate) enum Kvm {}

/// Says that there is none.
pub(crate) fn open() -> Result<Kvm, EngineError> {
    Err(EngineError::Unavailable {
        engine: "kvm",
        reason: "KVM runs the host's own architecture, and needs an x86-64 host".to_owned(),
    })
}

pub(crate) fn check(kvm: &Kvm, _: &Baseline) -> Result<(), EngineError> {
    match *kvm {}
}

pub(crate) fn missing_features(kvm: &Kvm, _: &Baseline) -> Result<Vec<&'static str>, EngineError> {
    match *kvm {}
}

/// No kernel tells the frequency of a time-stamp counter that there is not.
pub(crate) fn tsc_khz() -> Option<u64> {
    None
}

/// Would tell how fast ring 0 is under KVM.
///
/// # Errors
/// [`EngineError::Unavailable`], always.
pub fn measure_ring0() -> Result<Ring0Speed, EngineError> {
    open().map(|kvm| match kvm {})
}

impl KvmVm {
    /// Would make a VM.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`], always.
    pub fn new(_: &Memory, _: &'static Baseline, _: u32) -> Result<Self, EngineError> {
        open().map(|kvm| match kvm {})
    }
}

impl Vm for KvmVm {
    fn engine(&self) -> Engine {
        match *self {}
    }

    fn create_vcpu(&self, _: VcpuId) -> Result<Box<dyn Vcpu>, EngineError> {
        match *self {}
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        match *self {}
    }

    fn connect_controller(
        &self,
        _: Arc<dyn VectoredController>,
    ) -> Result<Arc<dyn InterruptLine>, EngineError> {
        match *self {}
    }

    fn add_doorbell(&self, _: &Doorbell) -> Result<(), EngineError> {
        match *self {}
    }

    fn remove_doorbell(&self, _: &Doorbell) -> Result<(), EngineError> {
        match *self {}
    }

    fn start_dirty_tracking(&self) -> Result<(), EngineError> {
        match *self {}
    }

    fn collect_dirty(&self) -> Result<(), EngineError> {
        match *self {}
    }

    fn stop_dirty_tracking(&self) -> Result<(), EngineError> {
        match *self {}
    }
}
