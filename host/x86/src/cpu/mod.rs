//! The software CPU.

mod api;

use std::sync::Arc;
use std::time::Duration;

pub use api::{CpuConfig, StateError, Stop};

use crate::lapic::{InterruptRouter, LocalApic, Mailbox};
use crate::memory::PhysicalMemory;
use crate::state::CpuState;

/// One logical processor, owned by its thread.
#[derive(Debug)]
pub struct Cpu {
    config: CpuConfig,
    memory: Arc<dyn PhysicalMemory>,
    apic: LocalApic,
    state: CpuState,
}

impl Cpu {
    /// A processor in its reset state.
    pub fn new(
        config: CpuConfig,
        memory: Arc<dyn PhysicalMemory>,
        mailbox: Arc<Mailbox>,
        router: Arc<dyn InterruptRouter>,
    ) -> Self {
        let apic = LocalApic::new(mailbox, router, config.clock.tsc_khz());
        Self {
            config,
            memory,
            apic,
            state: CpuState::default(),
        }
    }

    /// Runs until something needs the machine.
    pub fn run(&mut self) -> Stop {
        let _ = (&self.memory, &self.config.code);
        Stop::Shutdown
    }

    /// Answers a [`Stop::PortRead`] or [`Stop::MmioRead`].
    pub fn complete_read(&mut self, value: u64) {
        let _ = value;
    }

    /// Confirms a [`Stop::PortWrite`] or [`Stop::MmioWrite`].
    pub fn complete_write(&mut self) {}

    /// Completes the instruction whose access was answered; executes nothing further.
    pub fn finish_access(&mut self) {}

    /// How long a halted processor may sleep: until its timer fires. `None` for ever.
    pub fn wake_after(&self) -> Option<Duration> {
        self.apic
            .next_deadline_tsc()
            .map(|tsc| self.config.clock.until(tsc))
    }

    /// The architectural state, at an instruction border.
    pub fn state(&mut self) -> CpuState {
        self.state.clone()
    }

    /// Replaces the architectural state.
    ///
    /// # Errors
    /// [`StateError`] for a state that no processor can be in; nothing has changed then.
    pub fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.state = state.clone();
        Ok(())
    }

    /// Instructions executed.
    pub fn instructions(&self) -> u64 {
        0
    }
}
