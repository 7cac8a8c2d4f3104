//! What runs the guest's processors.

use std::sync::Arc;

use dunlin_api::EngineChoice;
use dunlin_guest::Memory;
use dunlin_hypervisor::kvm::KvmVm;
use dunlin_hypervisor::soft::SoftVm;
use dunlin_hypervisor::{EngineError, Vm};
use dunlin_x86::cpuid::Baseline;

/// An engine, and why it was taken.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) vm: Arc<dyn Vm>,
    pub(super) reason: String,
}

/// Makes an engine for `cpus` processors over `memory`.
pub(super) fn choose(
    choice: EngineChoice,
    memory: &Memory,
    baseline: &'static Baseline,
    cpus: u32,
) -> Result<Chosen, EngineError> {
    let soft = |reason: &str| Chosen {
        vm: Arc::new(SoftVm::new(memory, baseline, cpus)),
        reason: reason.to_owned(),
    };
    match choice {
        EngineChoice::Soft => Ok(soft("as asked")),
        EngineChoice::Auto => Ok(soft("no other engine yet")),
        EngineChoice::Kvm => Ok(Chosen {
            vm: Arc::new(KvmVm::new(memory, baseline, cpus)?),
            reason: "as asked".to_owned(),
        }),
    }
}
