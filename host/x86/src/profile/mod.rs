//! Where a processor's time goes: samples of what it is doing, and counts of what it did.
//!
//! ```text
//!  a sampler's signal ─► Probe::sample, on the processor's thread: three words into a ring
//!                                     │ Cpu::collect_samples, between two runs, and before
//!                                     ▼ translated code is forgotten
//!                         Profile: samples by what was done, and by the guest's address
//! ```
//!
//! The place of the host's program counter tells translated code, and the code cache's own table
//! which block of the guest that is. For all else the processor keeps one byte ([`Doing`]), which is
//! stored at places that take long. A processor that nobody profiles has neither ring nor table.
//! [`Counters`] are always kept, at the same places.

mod probe;
mod tally;

use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use probe::Probe;
use probe::Sample;
pub use tally::{Place, Profile};

use crate::cpu::{Cpu, Stop};

/// What a processor's thread is found doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Doing {
    /// The guest's code, translated.
    Translated,
    /// Blocks of the guest's code that are not translated, and the ways between blocks.
    Interpreted,
    /// Single instructions that translated code leaves to the interpreter.
    Stepped,
    /// Finding and decoding blocks.
    Decoding,
    /// Translating blocks.
    Translating,
    /// Walking page tables, and entering pages into the TLB.
    FillingTlb,
    /// Timers, interrupts and exceptions: what lies between instructions.
    Delivering,
    /// A device, at an IN or OUT.
    Port,
    /// A device, at a load or store.
    Mmio,
    /// Waiting for an interrupt.
    Halted,
    /// Stopped by the machine: paused, slowed down, or told something.
    Stopped,
}

impl Doing {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::Translated,
        Self::Interpreted,
        Self::Stepped,
        Self::Decoding,
        Self::Translating,
        Self::FillingTlb,
        Self::Delivering,
        Self::Port,
        Self::Mmio,
        Self::Halted,
        Self::Stopped,
    ];

    fn from_number(number: u8) -> Self {
        let known = Self::ALL.get(usize::from(number));
        known.copied().unwrap_or(Self::Interpreted)
    }
}

/// What a processor did since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Pages entered into the TLB.
    pub tlb_fills: u64,
    /// Flushes of the whole TLB, or of all that is not global (loads of CR3, for the most part).
    pub tlb_flushes: u64,
    /// Flushes of one page (INVLPG).
    pub page_flushes: u64,
    /// Blocks decoded.
    pub decoded_blocks: u64,
    /// Blocks translated.
    pub translated_blocks: u64,
    /// Times that all translated code was forgotten.
    pub code_flushes: u64,
    /// Bytes of translated code now.
    pub code_bytes: u64,
    /// RDMSR.
    pub msr_reads: u64,
    /// WRMSR.
    pub msr_writes: u64,
}

impl Counters {
    /// What was done since `before`; `code_bytes` stay those of now.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            tlb_fills: self.tlb_fills - before.tlb_fills,
            tlb_flushes: self.tlb_flushes - before.tlb_flushes,
            page_flushes: self.page_flushes - before.page_flushes,
            decoded_blocks: self.decoded_blocks - before.decoded_blocks,
            translated_blocks: self.translated_blocks - before.translated_blocks,
            code_flushes: self.code_flushes - before.code_flushes,
            code_bytes: self.code_bytes,
            msr_reads: self.msr_reads - before.msr_reads,
            msr_writes: self.msr_writes - before.msr_writes,
        }
    }
}

impl Cpu {
    /// Notes what is done from here on; returns what was done before, for [`Cpu::go_back`].
    #[inline(always)]
    pub(crate) fn begin(&self, doing: Doing) -> u8 {
        let before = self.doing.load(Ordering::Relaxed);
        self.doing.store(doing as u8, Ordering::Relaxed);
        before
    }

    /// What was done before is done again.
    #[inline(always)]
    pub(crate) fn go_back(&self, before: u8) {
        self.doing.store(before, Ordering::Relaxed);
    }

    /// Notes what the thread does for this processor while that does not run, until the next run.
    pub fn begin_outside(&self, doing: Doing) {
        if let Some(profile) = &self.profile {
            profile.probe.set_outside(doing);
        }
    }

    /// What it did since it was made.
    pub fn counters(&self) -> Counters {
        #[cfg(target_arch = "x86_64")]
        let code_bytes = self.translator.used() as u64;
        #[cfg(not(target_arch = "x86_64"))]
        let code_bytes = 0;
        Counters {
            code_bytes,
            ..self.counters
        }
    }

    /// How often each vector was delivered since it was made: exceptions and interrupts, of software
    /// too.
    pub fn vectors(&self) -> &[u64; 256] {
        &self.vectors
    }

    /// Where the guest's system calls enter its kernel: IA32_LSTAR, 0 before it is set.
    pub fn system_call_entry(&self) -> u64 {
        self.msrs.lstar
    }

    /// Begins a profile. Whoever has the probe may sample on the thread that runs this processor, and
    /// on no other; see [`Probe::sample`].
    pub fn begin_profile(&mut self) -> Arc<Probe> {
        #[cfg(target_arch = "x86_64")]
        let code = self.translator.mapping();
        #[cfg(not(target_arch = "x86_64"))]
        let code = 0..0;
        let probe = Arc::new(Probe::new(code));
        probe.stand_at(self.linear_rip(), self.cpl);
        self.profile = Some(Box::new(Taken {
            probe: Arc::clone(&probe),
            profile: Profile::default(),
        }));
        probe
    }

    /// Sorts the samples that were taken since the last call into the profile, if one is taken: their
    /// ring holds some seconds of them.
    pub fn collect_samples(&mut self) {
        let Some(mut taken) = self.profile.take() else {
            return;
        };
        let Taken { probe, profile } = &mut *taken;
        while let Some(sample) = probe.take() {
            let place = self.place(&sample);
            profile.add(sample.doing, place);
        }
        self.profile = Some(taken);
    }

    /// Ends the profile; what came of it, if one was taken.
    pub fn end_profile(&mut self) -> Option<Profile> {
        self.collect_samples();
        let taken = self.profile.take()?;
        let mut profile = taken.profile;
        profile.lost = taken.probe.lost();
        Some(profile)
    }

    /// Where the guest was. In translated code that is the beginning of the trace's first block.
    fn place(&self, sample: &Sample) -> Option<Place> {
        #[cfg(target_arch = "x86_64")]
        if sample.doing == Doing::Translated {
            let block = self.translator.made_at(sample.code)?;
            return Some(Place {
                address: sample.address & !crate::mmu::PAGE_OFFSET | u64::from(block.start),
                user: block.user,
            });
        }
        Some(Place {
            address: sample.address,
            user: sample.user,
        })
    }

    /// Runs as [`Cpu::run`] does, seen by the probe of the profile.
    pub(crate) fn run_profiled(&mut self) -> Stop {
        let probe = self
            .profile
            .as_ref()
            .map(|profile| Arc::clone(&profile.probe));
        let cpu: *mut Self = self;
        if let Some(probe) = &probe {
            probe.enter(cpu);
        }
        let stop = self.run_until_stop();
        if let Some(probe) = &probe {
            probe.leave();
            probe.stand_at(self.linear_rip(), self.cpl);
        }
        stop
    }
}

/// A profile that is being taken.
#[derive(Debug)]
pub(crate) struct Taken {
    probe: Arc<Probe>,
    profile: Profile,
}

#[cfg(test)]
mod tests;
