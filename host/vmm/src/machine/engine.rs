//! What runs the guest's processors.

use std::sync::Arc;

use dunlin_api::EngineChoice;
use dunlin_guest::Memory;
use dunlin_hypervisor::kvm::KvmVm;
use dunlin_hypervisor::probe::{self, EngineRequest};
use dunlin_hypervisor::soft::SoftVm;
use dunlin_hypervisor::{Engine, EngineError, Vm};
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
    verify: bool,
) -> Result<Chosen, EngineError> {
    let request = match choice {
        EngineChoice::Auto => EngineRequest::Auto,
        EngineChoice::Soft => EngineRequest::Soft,
        EngineChoice::Kvm => EngineRequest::Kvm,
    };
    let (engine, reason) = probe::choose(request, baseline)?;
    let vm: Arc<dyn Vm> = match engine {
        Engine::Soft => {
            let vm = SoftVm::new(memory, baseline, cpus);
            Arc::new(if verify { vm.verified() } else { vm })
        }
        Engine::Kvm => Arc::new(KvmVm::new(memory, baseline, cpus)?),
    };
    Ok(Chosen { vm, reason })
}
