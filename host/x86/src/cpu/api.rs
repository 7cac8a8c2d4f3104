//! What the software CPU takes and what it answers.

use std::num::{NonZeroU8, NonZeroU32};
use std::sync::Arc;

use thiserror::Error;

use crate::cpuid::Baseline;
use crate::float::FloatStateError;
use crate::kvmclock::{FrequencyError, GuestClock};
use crate::lapic::ApicStateError;
use crate::mmu::CodeMap;

/// What a processor is made of.
#[derive(Debug, Clone)]
pub struct CpuConfig {
    /// Local APIC ID; 0 is the bootstrap processor, the others wait for a start-up IPI.
    pub id: u32,
    /// Processors of the VM.
    pub cpus: u32,
    /// What CPUID shows.
    pub baseline: &'static Baseline,
    /// The clock of the VM, the same for all of its processors.
    pub clock: Arc<GuestClock>,
    /// Which pages hold decoded code, the same for all processors of the VM.
    pub code: Arc<CodeMap>,
    /// What its stores leave in the dirty log, which so can tell the processors apart.
    pub mark: NonZeroU8,
    /// Which code is translated into the host's instructions.
    pub translation: Translation,
}

/// Which code is translated. A host that cannot do so interprets all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Translation {
    /// None.
    Never,
    /// 64-bit code that has been entered so often at the same place.
    After(NonZeroU32),
    /// The same, and all that is translated is interpreted as well: what comes out has to be equal,
    /// or the processor stops by [`Stop::Differs`]. For one processor: what others store meanwhile
    /// is not told apart from a difference.
    Verified(NonZeroU32),
}

impl Default for Translation {
    /// Translating a block takes about as long as interpreting it so often.
    fn default() -> Self {
        const RUNS: NonZeroU32 = NonZeroU32::new(24).unwrap();
        Self::After(RUNS)
    }
}

/// Why the processor stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// IN: answer with [`super::Cpu::complete_read`].
    PortRead {
        /// Port number.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
    },
    /// OUT: confirm with [`super::Cpu::complete_write`].
    PortWrite {
        /// Port number.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
        /// What the guest wrote.
        value: u32,
    },
    /// A load that misses RAM: answer with [`super::Cpu::complete_read`].
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// Bytes: 1 to 8.
        size: u8,
    },
    /// A store that misses RAM: confirm with [`super::Cpu::complete_write`].
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// Bytes: 1 to 8.
        size: u8,
        /// What the guest wrote.
        value: u64,
    },
    /// The local APIC ended a level-triggered interrupt.
    EndOfInterrupt {
        /// Its vector.
        vector: u8,
    },
    /// HLT, or waiting for a start-up IPI: run again when the mailbox has something or
    /// [`super::Cpu::wake_after`] has passed.
    Halted,
    /// A triple fault.
    Shutdown,
    /// Somebody kicked the processor's mailbox.
    Kicked,
    /// The interpreter and translated code came to different ends: see [`super::Cpu::difference`].
    Differs,
}

/// A state that no processor can be in.
#[derive(Debug, Error)]
pub enum StateError {
    /// A register holds what it cannot hold.
    #[error("register {register} cannot be {value:#x}")]
    Register {
        /// Its name.
        register: &'static str,
        /// The value in the state.
        value: u64,
    },
    /// Two registers contradict each other.
    #[error("inconsistent state: {0}")]
    Inconsistent(&'static str),
    /// The x87 and SSE image is refused.
    #[error("invalid floating-point state")]
    Float(#[from] FloatStateError),
    /// The local APIC's state is refused.
    #[error("invalid local APIC state")]
    Apic(#[from] ApicStateError),
    /// The clock's frequency is refused.
    #[error("invalid clock")]
    Clock(#[from] FrequencyError),
}
