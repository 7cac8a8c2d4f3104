//! The engine that runs the software CPU: no hardware support and no privilege needed.
//!
//! [`SoftVm`] owns what its processors share: RAM with its dirty log (which every store marks, so
//! that dirty tracking has nothing to switch on or collect), the clock, the doorbells, and the
//! router between their local APICs.

mod frequency;
mod memory;
mod router;
mod sampler;
mod vcpu;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};

use dunlin_guest::{Doorbell, InterruptLine, Memory, MsiSink, VectoredController, Writer};
use dunlin_x86::cpuid::Baseline;
use dunlin_x86::kvmclock::GuestClock;
use dunlin_x86::lapic::{ExternalController, Mailbox};
use dunlin_x86::memory::PhysicalMemory;
use dunlin_x86::{CodeMap, Cpu, CpuConfig, Translation};
use vmm_sys_util::eventfd::EventFd;

pub use frequency::host_tsc_khz;

use crate::{Engine, EngineError, Vcpu, VcpuId, Vm};
use memory::GuestRam;
use router::Router;
use vcpu::SoftVcpu;

/// Addresses at which a store only rings.
#[derive(Debug, Default)]
struct Doorbells(RwLock<HashMap<u64, Arc<EventFd>>>);

impl Doorbells {
    /// Rings the doorbell at `address`; false when there is none, or it cannot be rung.
    fn ring(&self, address: u64) -> bool {
        let events = self.0.read().unwrap_or_else(PoisonError::into_inner);
        // An EventFd whose counter is full has rung already; the device sees the plain store.
        events
            .get(&address)
            .is_some_and(|event| event.write(1).is_ok())
    }
}

/// Fails with the names of the features that the software CPU lacks.
pub(crate) fn check(baseline: &Baseline) -> Result<(), EngineError> {
    EngineError::unless_complete("soft", baseline, Cpu::missing_features(baseline))
}

/// Fails where a guest of `cpus` processors would not have x86's memory.
///
/// On x86-64 hosts every access of the guest is one of the host. Elsewhere those that are not
/// aligned, and exchanges of 16 bytes, are several, which one processor alone cannot notice.
fn check_cpus(cpus: usize) -> Result<(), EngineError> {
    if cfg!(target_arch = "x86_64") || cpus <= 1 {
        return Ok(());
    }
    Err(EngineError::Unavailable {
        engine: "soft",
        reason: format!(
            "{cpus} vCPUs need an x86-64 host; on this one the software CPU gives one vCPU only"
        ),
    })
}

/// What gives the first processor vectors from outside of its local APIC. The machine owns it; it
/// owns the line to the processor in turn.
#[derive(Debug)]
struct Controller(Weak<dyn VectoredController>);

/// What an empty bus reads as.
const NO_VECTOR: u8 = 0xff;

impl ExternalController for Controller {
    fn acknowledge(&self) -> u8 {
        // Without its machine a processor runs no more.
        let controller = self.0.upgrade();
        controller.map_or(NO_VECTOR, |controller| controller.acknowledge())
    }
}

/// INTR of a processor.
#[derive(Debug)]
struct Intr(Arc<Mailbox>);

impl InterruptLine for Intr {
    fn set_level(&self, high: bool) {
        self.0.set_external(high);
    }
}

/// A VM on the software CPU.
#[derive(Debug)]
pub struct SoftVm {
    ram: Arc<dyn PhysicalMemory>,
    baseline: &'static Baseline,
    clock: Arc<GuestClock>,
    code: Arc<CodeMap>,
    router: Arc<Router>,
    doorbells: Arc<Doorbells>,
    /// Which processors were made, by ID.
    made: Box<[AtomicBool]>,
    translation: Translation,
}

impl SoftVm {
    /// A VM with `cpus` processors of `baseline` over `memory`. Its TSC starts at 0 now.
    pub fn new(memory: &Memory, baseline: &'static Baseline, cpus: u32) -> Self {
        Self {
            ram: Arc::new(GuestRam(memory.clone())),
            baseline,
            clock: Arc::new(GuestClock::new(host_tsc_khz())),
            code: Arc::new(CodeMap::new()),
            router: Arc::new(Router::new(cpus)),
            doorbells: Arc::default(),
            made: (0..cpus).map(|_| AtomicBool::new(false)).collect(),
            translation: Translation::default(),
        }
    }

    /// The same, with all translated code interpreted as well: a processor fails where the two
    /// differ.
    #[must_use]
    pub fn verified(mut self) -> Self {
        if let Translation::After(runs) = self.translation {
            self.translation = Translation::Verified(runs);
        }
        self
    }
}

impl Vm for SoftVm {
    fn engine(&self) -> Engine {
        Engine::Soft
    }

    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>, EngineError> {
        check_cpus(self.made.len())?;
        let refused = |reason: String| EngineError::InvalidState { vcpu: id.0, reason };
        let (Some(made), Some(mailbox)) = (self.made.get(id.0 as usize), self.router.mailbox(id.0))
        else {
            return Err(refused(format!("the VM has {} vCPUs", self.made.len())));
        };
        if made.swap(true, Ordering::Relaxed) {
            return Err(refused("it exists already".to_owned()));
        }
        let config = CpuConfig {
            id: id.0,
            cpus: self.made.len() as u32,
            baseline: self.baseline,
            clock: Arc::clone(&self.clock),
            code: Arc::clone(&self.code),
            mark: Writer::vcpu(id.0).mark(),
            translation: self.translation,
        };
        let cpu = Cpu::new(
            config,
            Arc::clone(&self.ram),
            Arc::clone(mailbox),
            self.router.clone(),
        );
        Ok(Box::new(SoftVcpu::new(
            id,
            cpu,
            Arc::clone(mailbox),
            Arc::clone(&self.doorbells),
        )))
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        self.router.clone()
    }

    fn connect_controller(
        &self,
        controller: Arc<dyn VectoredController>,
    ) -> Result<Arc<dyn InterruptLine>, EngineError> {
        let mailbox = self.router.mailbox(0).ok_or(EngineError::InvalidState {
            vcpu: 0,
            reason: "the VM has no vCPU".to_owned(),
        })?;
        mailbox.connect(Arc::new(Controller(Arc::downgrade(&controller))));
        Ok(Arc::new(Intr(Arc::clone(mailbox))))
    }

    fn add_doorbell(&self, doorbell: &Doorbell) -> Result<(), EngineError> {
        let event = Arc::clone(&doorbell.event);
        let mut events = self
            .doorbells
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        events.insert(doorbell.address, event);
        Ok(())
    }

    fn remove_doorbell(&self, doorbell: &Doorbell) -> Result<(), EngineError> {
        let mut events = self
            .doorbells
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        events.remove(&doorbell.address);
        Ok(())
    }

    fn start_dirty_tracking(&self) -> Result<(), EngineError> {
        Ok(())
    }

    fn collect_dirty(&self) -> Result<(), EngineError> {
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> Result<(), EngineError> {
        Ok(())
    }
}
