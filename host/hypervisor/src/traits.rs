//! The contract between an engine and the machine's loop.

use std::fmt::Debug;
use std::sync::Arc;

use dunlin_guest::{Doorbell, InterruptLine, MsiSink, VectoredController};
use dunlin_x86::cpuid::Baseline;
use dunlin_x86::profile::{Counters, Profile};
use dunlin_x86::state::CpuState;

/// Which engine runs the guest's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// The software CPU.
    Soft,
    /// The host's processor, through `/dev/kvm`.
    Kvm,
}

/// Index of a virtual processor; also its local APIC ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub u32);

/// Why `run` returned. Borrowed buffers belong to the vCPU: fill or read them, then run again;
/// the access completes at the next `run` or `quiesce`.
#[derive(Debug)]
pub enum Exit<'a> {
    /// IN: fill `data` (1, 2 or 4 bytes, little-endian).
    PortRead {
        /// Port number.
        port: u16,
        /// What the device answers; all ones where there is none.
        data: &'a mut [u8],
    },
    /// OUT.
    PortWrite {
        /// Port number.
        port: u16,
        /// What the guest wrote, 1, 2 or 4 bytes.
        data: &'a [u8],
    },
    /// A load from guest physical address space that is not RAM: fill `data` (1 to 8 bytes).
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// What the device answers; all ones where there is none.
        data: &'a mut [u8],
    },
    /// A store to guest physical address space that is not RAM.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// What the guest wrote, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The local APIC finished a level-triggered interrupt; the I/O APIC must learn of it.
    EndOfInterrupt {
        /// The vector that ended.
        vector: u8,
    },
    /// The guest can do nothing any more: a triple fault.
    Shutdown,
    /// [`VcpuHandle::kick`] was called.
    Kicked,
}

/// Why an engine failed. A guest cannot cause these, whatever it executes.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host does not offer the engine.
    #[error("engine \"{engine}\" is not available: {reason}")]
    Unavailable {
        /// Name of the engine.
        engine: &'static str,
        /// What is missing and what to do about it.
        reason: String,
    },
    /// The engine, on this host, lacks what the guest was promised.
    #[error("cannot give baseline {baseline} under {engine}: it lacks {}", missing.join(", "))]
    Baseline {
        /// Name of the engine.
        engine: &'static str,
        /// Name of the baseline.
        baseline: &'static str,
        /// Names of the features.
        missing: Vec<&'static str>,
    },
    /// A call to the host's kernel failed.
    #[error("engine \"{engine}\" failed to {action}")]
    Host {
        /// Name of the engine.
        engine: &'static str,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A CPU state was refused.
    #[error("invalid state of vCPU {vcpu}: {reason}")]
    InvalidState {
        /// The vCPU's index.
        vcpu: u32,
        /// Which value, and what would be valid.
        reason: String,
    },
    /// The guest reached a state that the host's kernel cannot run.
    #[error("vCPU {vcpu} cannot continue: {reason}")]
    Stuck {
        /// The vCPU's index.
        vcpu: u32,
        /// What the kernel said, and where.
        reason: String,
    },
}

impl EngineError {
    /// Is nothing of `baseline` missing?
    pub(crate) fn unless_complete(
        engine: &'static str,
        baseline: &Baseline,
        missing: Vec<&'static str>,
    ) -> Result<(), Self> {
        if missing.is_empty() {
            return Ok(());
        }
        Err(Self::Baseline {
            engine,
            baseline: baseline.name(),
            missing,
        })
    }
}

/// How often each kind of exit happened, since the vCPU was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VcpuExitCounts {
    /// IN instructions.
    pub port_reads: u64,
    /// OUT instructions.
    pub port_writes: u64,
    /// Loads from MMIO.
    pub mmio_reads: u64,
    /// Stores to MMIO.
    pub mmio_writes: u64,
    /// Times that the vCPU halted and waited.
    pub halts: u64,
    /// Times that it was kicked.
    pub kicks: u64,
    /// Instructions that were interpreted, where the engine does so.
    pub instructions: u64,
}

/// A virtual machine as the engine sees it: memory, interrupt routing, processors.
pub trait Vm: Debug + Send + Sync {
    /// Which engine this is.
    fn engine(&self) -> Engine;

    /// Makes a processor in its reset state (processor 0 running, others waiting for SIPI).
    ///
    /// # Errors
    /// [`EngineError`] when the host refuses.
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>, EngineError>;

    /// Where devices and the I/O APIC send their messages.
    fn msi_sink(&self) -> Arc<dyn MsiSink>;

    /// Makes `controller` the one that gives processor 0 the vectors of interrupts which come from
    /// outside of its local APIC (ExtINT). The line that is returned is the processor's INTR, which
    /// the controller's output drives. Call it once. The engine does not keep the controller alive.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`] when the engine does not carry such interrupts.
    fn connect_controller(
        &self,
        controller: Arc<dyn VectoredController>,
    ) -> Result<Arc<dyn InterruptLine>, EngineError>;

    /// Rings `doorbell.event` at writes to its address without an exit, from now on. An engine
    /// that cannot returns without effect; the write then arrives as [`Exit::MmioWrite`].
    ///
    /// # Errors
    /// [`EngineError`] when the host refuses.
    fn add_doorbell(&self, doorbell: &Doorbell) -> Result<(), EngineError>;

    /// Undoes `add_doorbell` for the address (the guest moved a BAR).
    ///
    /// # Errors
    /// [`EngineError`] when the host refuses.
    fn remove_doorbell(&self, doorbell: &Doorbell) -> Result<(), EngineError>;

    /// From now on, writes of vCPUs reach the memory's dirty log at the latest at
    /// [`Vm::collect_dirty`].
    ///
    /// # Errors
    /// [`EngineError`] when the host refuses.
    fn start_dirty_tracking(&self) -> Result<(), EngineError>;

    /// Brings the pages that vCPUs wrote since the last call into the memory's dirty log. Call it
    /// before each harvest. Pages written while it runs are in this call's result or the next's.
    ///
    /// # Errors
    /// [`EngineError`] when the host refuses.
    fn collect_dirty(&self) -> Result<(), EngineError>;

    /// Ends tracking.
    ///
    /// # Errors
    /// [`EngineError`] when the host refuses.
    fn stop_dirty_tracking(&self) -> Result<(), EngineError>;
}

/// Reaches a vCPU from other threads.
pub trait VcpuHandle: Debug + Send + Sync {
    /// Makes the current or next `run` return [`Exit::Kicked`] soon, also out of a halt.
    fn kick(&self);
}

/// Looks at a vCPU's thread from other threads, while a profile is taken.
pub trait Sampled: Debug + Send + Sync {
    /// Has the thread note what it is doing. False when it was not told: it has not heard of many
    /// calls before, or has ended.
    fn sample(&self) -> bool;
}

/// What a vCPU did while a profile was taken.
#[derive(Debug, Clone)]
pub struct VcpuProfile {
    /// Samples.
    pub samples: Profile,
    /// What was counted from the beginning of the profile on; `code_bytes` are those now.
    pub counters: Counters,
    /// Exceptions and interrupts that were delivered meanwhile, by vector.
    pub vectors: Vec<u64>,
    /// Linear address at which system calls enter the guest's kernel; 0 before that is set.
    pub system_call_entry: u64,
}

/// A virtual processor. Owned by its thread; others send it messages and kick it.
pub trait Vcpu: Debug + Send {
    /// Runs the guest until something needs the machine. Blocks while the guest is halted.
    ///
    /// # Errors
    /// [`EngineError`] when the engine (not the guest) failed.
    fn run(&mut self) -> Result<Exit<'_>, EngineError>;

    /// Completes a port or MMIO access whose exit was handled, so that the state is that of an
    /// instruction border. Executes no further instruction.
    ///
    /// # Errors
    /// [`EngineError`] when the engine failed, or the instruction has further accesses (a string
    /// instruction): run on then. After [`Exit::Kicked`] no access is open.
    fn quiesce(&mut self) -> Result<(), EngineError>;

    /// A handle for other threads.
    fn handle(&self) -> Arc<dyn VcpuHandle>;

    /// The architectural state. Call `quiesce` first.
    ///
    /// # Errors
    /// [`EngineError`] when the host refuses.
    fn save(&mut self) -> Result<CpuState, EngineError>;

    /// Replaces the architectural state. The clock goes on as if no time had been lost: the
    /// guest's TSC is the saved one plus the real time that has passed since. Writes no guest
    /// memory: what the guest must find there (its clock page) is written by the next `run`, since
    /// until then the memory may be that of a guest that runs in another process.
    ///
    /// # Errors
    /// [`EngineError::InvalidState`] when a value cannot be; the vCPU is then unchanged.
    fn restore(&mut self, state: &CpuState) -> Result<(), EngineError>;

    /// Exits by kind.
    fn exit_counts(&self) -> VcpuExitCounts;

    /// Begins to note where its time goes. Called on the thread that runs it, as are the two below.
    /// `None` from an engine that does not see what happens within a run.
    ///
    /// # Errors
    /// [`EngineError`] when the host refuses.
    fn begin_profile(&mut self) -> Result<Option<Arc<dyn Sampled>>, EngineError> {
        Ok(None)
    }

    /// Sorts samples, of which it keeps some thousands until then.
    fn collect_profile(&mut self) {}

    /// Ends the profile, if one is taken.
    fn end_profile(&mut self) -> Option<VcpuProfile> {
        None
    }
}
