//! The machine: memory, engine, buses, devices, and the threads of its processors.
//!
//! - [`assembly`] builds one from a configuration, paused;
//! - [`engine`] chooses what runs its processors;
//! - [`entry`] puts the first processor where a kernel starts;
//! - [`vcpu`] is the loop that runs a processor;
//! - [`profile`] and [`sampler`] look where the processors' time goes;
//! - [`events`] is how the machine is heard;
//! - [`inheritance`] is what it passes on to a machine in another process of this host;
//! - this file stops it, lets it go on, saves and restores it, in the one right order.
//!
//! Stopping: processors first, so that nobody asks devices for more; then devices, which finish or
//! take back what is in flight and flush; then the locks of disks, if the guest may leave. Going on
//! is the reverse.

mod assembly;
mod engine;
mod entry;
pub(crate) mod events;
mod inheritance;
mod profile;
mod sampler;
mod saved;
mod vcpu;

use std::sync::Arc;

use dunlin_api::VmConfig;
use dunlin_api::status::ExitCounts;
use dunlin_devices::component::{Component, Reach};
use dunlin_guest::Memory;
use dunlin_hypervisor::{Engine, Vm};
use dunlin_storage::{ImageLock, LockError};

pub use assembly::AssemblyError;
pub(crate) use assembly::{Blueprint, assemble, assemble_around};
pub use entry::BootError;
use inheritance::Belongings;
pub(crate) use inheritance::Inheritance;
pub(crate) use profile::{Profiling, collect_every};
pub use saved::StateError;
pub use vcpu::VcpuError;
pub(crate) use vcpu::shares;
use vcpu::{Buses, SleepShare, VcpuThread};

/// Why a machine could not be stopped or go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineFailure {
    /// A processor failed.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A disk is used by another VM.
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// A machine. Dropping it ends its threads.
#[derive(Debug)]
pub(crate) struct Machine {
    config: VmConfig,
    engine_reason: String,
    // Before everything that their threads use: ended first.
    vcpus: Vec<VcpuThread>,
    memory: Memory,
    vm: Arc<dyn Vm>,
    components: Vec<Arc<dyn Component>>,
    locks: Vec<ImageLock>,
    belongings: Belongings,
    buses: Buses,
}

/// What a pause does with the locks of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskLocks {
    /// The guest stays in this process.
    Keep,
    /// The guest may run elsewhere next.
    Release,
}

impl Machine {
    /// What it was built from.
    pub(crate) fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Its RAM.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Its engine, for tracking of dirty pages.
    pub(crate) fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// Name of its engine.
    pub(crate) fn engine_name(&self) -> &'static str {
        match self.vm.engine() {
            Engine::Soft => "soft",
            Engine::Kvm => "kvm",
        }
    }

    /// Why that engine.
    pub(crate) fn engine_reason(&self) -> &str {
        &self.engine_reason
    }

    /// Takes the locks of all disks.
    pub(crate) fn lock_disks(&self) -> Result<(), LockError> {
        for (index, lock) in self.locks.iter().enumerate() {
            if let Err(error) = lock.acquire() {
                // All or none: a guest with half of its disks runs nowhere.
                for taken in &self.locks[..index] {
                    release(taken);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Lets the guest run, after [`Machine::pause`] or when just built.
    pub(crate) fn resume(&self) -> Result<(), MachineFailure> {
        self.lock_disks()?;
        for component in &self.components {
            component.resume();
        }
        for vcpu in &self.vcpus {
            vcpu.run()?;
        }
        Ok(())
    }

    /// Stops the guest. Its memory does not change from the return on.
    pub(crate) fn pause(&self, locks: DiskLocks) -> Result<(), MachineFailure> {
        self.stop(Reach::AnyHost)?;
        if locks == DiskLocks::Release {
            self.unlock_disks();
        }
        Ok(())
    }

    /// As [`Machine::pause`], for a guest that may go on in another process of this host, which
    /// has copies of this one's descriptors: nothing is flushed, and the locks of disks are lent.
    pub(crate) fn pause_for_hand_over(&self) -> Result<(), MachineFailure> {
        self.stop(Reach::ThisHost)?;
        self.locks.iter().for_each(ImageLock::lend);
        Ok(())
    }

    fn stop(&self, reach: Reach) -> Result<(), MachineFailure> {
        let tickets: Vec<_> = self.vcpus.iter().map(VcpuThread::begin_pause).collect();
        for ticket in tickets {
            ticket?.wait()?;
        }
        for component in &self.components {
            component.pause(reach);
        }
        Ok(())
    }

    /// Gives the locks of all disks back.
    pub(crate) fn unlock_disks(&self) {
        self.locks.iter().for_each(release);
    }

    /// Makes each processor sleep for so many percent of its time; those that `percent` does not
    /// name run freely.
    pub(crate) fn throttle(&self, percent: &[u8]) -> Result<(), VcpuError> {
        let percent = percent.iter().copied().chain(std::iter::repeat(0));
        for (vcpu, percent) in self.vcpus.iter().zip(percent) {
            vcpu.throttle(SleepShare::percent(percent))?;
        }
        Ok(())
    }

    /// Percent of its time that each processor sleeps; empty when all run freely.
    pub(crate) fn throttled(&self) -> Vec<u8> {
        let shares = self
            .vcpus
            .iter()
            .map(|vcpu| vcpu.sleep_share().as_percent());
        let shares: Vec<u8> = shares.collect();
        if shares.iter().all(|&share| share == 0) {
            return Vec::new();
        }
        shares
    }

    /// Exits of each processor.
    pub(crate) fn exits(&self) -> Result<Vec<ExitCounts>, VcpuError> {
        self.vcpus
            .iter()
            .map(|vcpu| {
                let (counts, end_of_interrupts) = vcpu.counts()?;
                Ok(ExitCounts {
                    port_reads: counts.port_reads,
                    port_writes: counts.port_writes,
                    mmio_reads: counts.mmio_reads,
                    mmio_writes: counts.mmio_writes,
                    halts: counts.halts,
                    kicks: counts.kicks,
                    end_of_interrupts,
                    instructions: counts.instructions,
                })
            })
            .collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Processors first: nobody must look for a device that is gone.
        self.vcpus.clear();
        self.buses.ports.clear();
        self.buses.mmio.clear();
    }
}

/// The kernel gives the lock back at the latest when the process ends, so a refusal is no more
/// than worth a line.
fn release(lock: &ImageLock) {
    if let Err(error) = lock.release() {
        tracing::warn!(disk = %lock.path().display(), %error, "disk stays locked");
    }
}

#[cfg(test)]
mod tests;
