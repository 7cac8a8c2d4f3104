//! What the machine tells its lifecycle.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dunlin_devices::debug_exit::DebugExitEvents;
use dunlin_devices::power::PowerEvents;
use dunlin_hypervisor::{EngineError, VcpuId};

/// Something that the guest did or that befell it.
#[derive(Debug)]
pub(crate) enum MachineEvent {
    /// It switched itself off.
    PowerOff,
    /// It wrote this to its debug exit port.
    DebugExit(u32),
    /// It asks for a reset.
    Reset,
    /// A processor met a triple fault.
    TripleFault,
    /// The engine failed.
    EngineFailed(EngineError),
    /// A vCPU's thread panicked.
    ThreadLost(VcpuId),
}

/// Where events go. Clones share the destination.
#[derive(Clone)]
pub(crate) struct MachineEvents {
    deliver: Arc<dyn Fn(MachineEvent) + Send + Sync>,
    must_stop: Arc<AtomicBool>,
}

impl MachineEvents {
    /// Events go to `deliver`, which must not block.
    pub(crate) fn new(deliver: impl Fn(MachineEvent) + Send + Sync + 'static) -> Self {
        Self {
            deliver: Arc::new(deliver),
            must_stop: Arc::new(AtomicBool::new(false)),
        }
    }

    /// The same destination for a new machine, which has not asked for anything yet.
    pub(crate) fn renew(&self) -> Self {
        Self {
            deliver: Arc::clone(&self.deliver),
            must_stop: Arc::default(),
        }
    }

    /// Tells the lifecycle.
    pub(crate) fn send(&self, event: MachineEvent) {
        self.must_stop.store(true, Ordering::Release);
        (self.deliver)(event);
    }

    /// Has the guest asked for an end that has not come yet?
    pub(crate) fn machine_must_stop(&self) -> bool {
        self.must_stop.load(Ordering::Acquire)
    }
}

impl fmt::Debug for MachineEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineEvents").finish_non_exhaustive()
    }
}

impl PowerEvents for MachineEvents {
    fn power_off(&self) {
        self.send(MachineEvent::PowerOff);
    }

    fn reset(&self) {
        self.send(MachineEvent::Reset);
    }
}

impl DebugExitEvents for MachineEvents {
    fn debug_exit(&self, value: u32) {
        self.send(MachineEvent::DebugExit(value));
    }
}
