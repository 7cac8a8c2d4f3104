//! The software CPU: its state, its loop, and what lies between instructions.
//!
//! [`Cpu::run`] executes decoded blocks (see `decode`) until something needs the machine. Between
//! blocks it looks at the mailbox, at the timer, and for what may be delivered. The accesses that
//! devices answer are described in `device`.

mod api;
pub(crate) mod control;
mod convert;
mod debug;
mod device;
mod features;
#[cfg(test)]
#[path = "tests/mod.rs"]
mod interpreted;
mod mode;
mod run;
#[cfg(test)]
#[path = "tests/mod.rs"]
mod translated;
#[cfg(test)]
#[path = "tests/mod.rs"]
mod translated_in_traces;

use std::num::NonZeroU8;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::time::Duration;

pub use api::{CpuConfig, StateError, Stop, Translation};
pub(crate) use convert::is_xcr0;

use crate::decode::{Block, BlockCache, Mode};
use crate::exec::Exception;
use crate::exec::flags::Flags;
use crate::exec::op::{At, Exit};
use crate::float::{FloatState, XCR0_LEGACY};
use crate::kvmclock::KvmClock;
use crate::lapic::{InterruptRouter, LocalApic, Mailbox};
use crate::memory::PhysicalMemory;
use crate::mmu::Tlb;
#[cfg(target_arch = "x86_64")]
use crate::native::{Context, Replaced, Translator};
use crate::profile::{Counters, Doing, Taken};
use crate::state::{Activity, DescriptorTable, Msrs, Segment};
use device::Replay;

/// Why an instruction ended before it changed anything.
#[derive(Debug, Clone, Copy)]
pub(crate) enum AbortReason {
    /// It raised an exception.
    Exception(Exception),
    /// A device must answer first.
    Stop(Stop),
    /// It would change the code of the block that it belongs to: run it by itself.
    Alone,
}

/// No instruction is there.
pub(crate) const NOWHERE: u64 = 1 << 62;

/// One logical processor, owned by its thread.
#[repr(C, align(64))]
pub struct Cpu {
    /// General registers, and what else operations address like one; see `exec::op::slot`.
    pub(crate) regs: [u64; 32],
    pub(crate) instructions: u64,
    /// Blocks until something is looked at between them; 0 where that is due.
    pub(crate) budget: u32,
    /// Behind these, so that translated code reaches all of them by small distances.
    #[cfg(target_arch = "x86_64")]
    pub(crate) native: Context,
    pub(crate) flags: Flags,
    pub(crate) rip: u64,
    /// What its stores leave in the dirty log.
    pub(crate) mark: NonZeroU8,
    /// What it does, for a profile: a [`Doing`]'s number. Here no field behind it moves: the TLB's entries
    /// lie within lines of the host's cache.
    pub(crate) doing: AtomicU8,
    /// The block that runs.
    current: *const Block,
    pub(crate) tlb: Tlb,
    pub(crate) mailbox: Arc<Mailbox>,
    /// RFLAGS without the arithmetic flags.
    pub(crate) system_flags: u64,
    /// The next instruction runs before any interrupt is taken (STI, MOV SS).
    pub(crate) shadow: bool,
    /// The instruction that the last STI lets run before any interrupt is taken: of interest only if
    /// somebody looks before it has run.
    pub(crate) shadow_at: u64,
    /// The instruction at hand is run by itself: it may change the code around it.
    pub(crate) alone: bool,
    pub(crate) cpl: u8,
    pub(crate) mode: Mode,
    pub(crate) abort: AbortReason,
    pub(crate) abort_at: At,
    pub(crate) blocks: BlockCache,
    #[cfg(target_arch = "x86_64")]
    pub(crate) translator: Translator,
    /// What stores replace, while they are only tried.
    #[cfg(target_arch = "x86_64")]
    pub(crate) journal: Option<Vec<Replaced>>,
    pub(crate) float: FloatState,

    pub(crate) segments: [Segment; 6],
    pub(crate) tr: Segment,
    pub(crate) ldtr: Segment,
    pub(crate) gdtr: DescriptorTable,
    pub(crate) idtr: DescriptorTable,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    /// Which state components the guest has enabled; fixed without XSAVE.
    pub(crate) xcr0: u64,
    /// The page-directory pointers of PAE paging, as the load of CR3 read them.
    pub(crate) pdpte: [u64; 4],
    pub(crate) dr: [u64; 4],
    pub(crate) dr6: u64,
    pub(crate) dr7: u64,
    pub(crate) watch: debug::Watch,
    /// All but `kvmclock_*`, which are in `kvmclock`.
    pub(crate) msrs: Msrs,
    /// What the guest added to its TSC beyond the VM's clock.
    tsc_offset: u64,
    pub(crate) kvmclock: KvmClock,
    pub(crate) activity: Activity,
    /// A task was entered whose state then was refused: the exception is the new task's.
    pub(crate) task_entered: bool,
    /// PAUSE instructions.
    pub(crate) pauses: u32,
    nmi_pending: bool,
    nmi_masked: bool,
    /// A level-triggered interrupt ended, and the machine has not been told.
    ended: Option<u8>,
    /// TSC at which the local APIC's timer must be looked at.
    deadline: u64,
    /// The physical page of the local APIC's registers.
    pub(crate) apic_page: Option<u64>,
    pub(crate) apic: LocalApic,
    replay: Replay,
    /// `CodeMap::pages_added` when the TLB last gave up its write entries.
    pages_added: u32,
    pub(crate) memory: Arc<dyn PhysicalMemory>,
    pub(crate) config: CpuConfig,
    pub(crate) counters: Counters,
    /// How often each vector was delivered.
    pub(crate) vectors: Box<[u64; 256]>,
    /// The profile that is being taken.
    pub(crate) profile: Option<Box<Taken>>,
}

#[expect(
    unsafe_code,
    reason = "the processor is made on one thread and run on another"
)]
// SAFETY: the pointers inside lead to blocks and pages that the processor owns itself, and to
// guest memory that `PhysicalMemory` shares between threads; nothing is bound to a thread.
unsafe impl Send for Cpu {}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu")
            .field("id", &self.config.id)
            .field("rip", &format_args!("{:#x}", self.rip))
            .field("cpl", &self.cpl)
            .field("mode", &self.mode)
            .field("activity", &self.activity)
            .field("instructions", &self.instructions)
            .finish_non_exhaustive()
    }
}

impl Cpu {
    /// A processor in its reset state.
    pub fn new(
        config: CpuConfig,
        memory: Arc<dyn PhysicalMemory>,
        mailbox: Arc<Mailbox>,
        router: Arc<dyn InterruptRouter>,
    ) -> Self {
        let apic = LocalApic::new(Arc::clone(&mailbox), router, config.clock.tsc_khz());
        let mut cpu = Self {
            regs: [0; 32],
            #[cfg(target_arch = "x86_64")]
            native: Context::new(),
            flags: Flags::from_rflags(0),
            rip: 0,
            tlb: Tlb::new(),
            float: FloatState::power_up(),
            system_flags: 0,
            budget: 0,
            mark: config.mark,
            current: std::ptr::null(),
            doing: AtomicU8::new(Doing::Interpreted as u8),
            shadow: false,
            shadow_at: NOWHERE,
            alone: false,
            cpl: 0,
            mode: Mode::Bits16,
            abort: AbortReason::Alone,
            abort_at: At::null(),
            blocks: BlockCache::new(),
            #[cfg(target_arch = "x86_64")]
            translator: Translator::new(config.translation),
            #[cfg(target_arch = "x86_64")]
            journal: None,
            instructions: 0,
            segments: [Segment::default(); 6],
            tr: Segment::default(),
            ldtr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: XCR0_LEGACY,
            pdpte: [0; 4],
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            watch: debug::Watch::default(),
            msrs: Msrs::default(),
            tsc_offset: 0,
            kvmclock: KvmClock::new(),
            activity: Activity::Running,
            task_entered: false,
            pauses: 0,
            nmi_pending: false,
            nmi_masked: false,
            ended: None,
            deadline: u64::MAX,
            apic_page: None,
            apic,
            replay: Replay::default(),
            pages_added: 0,
            mailbox,
            memory,
            config,
            counters: Counters::default(),
            vectors: Box::new([0; 256]),
            profile: None,
        };
        cpu.reset();
        cpu
    }

    /// Answers a [`Stop::PortRead`] or [`Stop::MmioRead`].
    pub fn complete_read(&mut self, value: u64) {
        self.replay.answer(value);
    }

    /// Confirms a [`Stop::PortWrite`] or [`Stop::MmioWrite`].
    pub fn complete_write(&mut self) {
        self.replay.answer(0);
    }

    /// Completes the instruction whose access was answered; executes nothing further. An
    /// instruction that needs the machine once more stays incomplete: it is asked for again by
    /// the next run, and a saved state repeats it from its start.
    pub fn finish_access(&mut self) {
        if self.replay.is_answered() {
            // What it stops for is asked for again by the next run.
            let _again = self.run_alone();
        }
    }

    /// How long a halted processor may sleep: until its timer fires. `None` for ever.
    pub fn wake_after(&self) -> Option<Duration> {
        let deadline = self.apic.next_deadline_tsc()?;
        Some(
            self.config
                .clock
                .until(deadline.wrapping_sub(self.tsc_offset)),
        )
    }

    /// How the interpreter and translated code differed, when they did.
    pub fn difference(&self) -> Option<&str> {
        #[cfg(target_arch = "x86_64")]
        return self.translator.difference.as_deref();
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// Runs of blocks whose translation came to the interpreter's end.
    pub fn verified(&self) -> u64 {
        #[cfg(target_arch = "x86_64")]
        return self.translator.verified;
        #[cfg(not(target_arch = "x86_64"))]
        0
    }

    /// Are stores only tried?
    pub(crate) fn is_trying(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.journal.is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Instructions that were interpreted: translated code does not count its own.
    pub fn instructions(&self) -> u64 {
        self.instructions
    }

    /// An instruction ended early.
    #[cold]
    pub(crate) fn aborted(&mut self, at: At) -> Exit {
        self.abort_at = at;
        Exit::Abort
    }

    /// The guest's time-stamp counter.
    pub(crate) fn tsc(&self) -> u64 {
        self.config.clock.tsc().wrapping_add(self.tsc_offset)
    }

    /// The guest moves its time-stamp counter.
    pub(crate) fn adjust_tsc(&mut self, delta: u64) {
        self.tsc_offset = self.tsc_offset.wrapping_add(delta);
        self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(delta);
    }
}
