//! What a signal's handler may touch.

use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering};

use super::Doing;
use crate::cpu::Cpu;
use crate::exec::op::slot;

/// Samples that wait to be collected: eight seconds of a thousand a second.
const RING: usize = 8192;

/// One look at a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) doing: Doing,
    pub(super) user: bool,
    /// The guest's linear address; of translated code, only its page is right.
    pub(super) address: u64,
    /// Where in the code cache.
    pub(super) code: u32,
}

/// A place of the ring.
#[derive(Debug, Default)]
struct Place {
    /// `Doing`, user mode in bit 8, the place in the code cache from bit 32 on.
    what: AtomicU64,
    address: AtomicU64,
}

/// A processor as a sampler sees it.
///
/// All of it is used by one thread, and by signals' handlers on that thread.
#[derive(Debug)]
pub struct Probe {
    /// The processor while it runs, otherwise null.
    cpu: AtomicPtr<Cpu>,
    /// What the thread does while the processor does not run, and where that stands.
    outside: AtomicU8,
    cpl: AtomicU8,
    address: AtomicU64,
    /// Addresses of translated code in this process.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "there is no translated code")
    )]
    code: Range<usize>,
    ring: Box<[Place]>,
    /// Samples that were ever taken, and collected.
    taken: AtomicUsize,
    collected: AtomicUsize,
    lost: AtomicU64,
}

impl Probe {
    pub(super) fn new(code: Range<usize>) -> Self {
        Self {
            cpu: AtomicPtr::new(ptr::null_mut()),
            outside: AtomicU8::new(Doing::Stopped as u8),
            cpl: AtomicU8::new(0),
            address: AtomicU64::new(0),
            code,
            ring: (0..RING).map(|_| Place::default()).collect(),
            taken: AtomicUsize::new(0),
            collected: AtomicUsize::new(0),
            lost: AtomicU64::new(0),
        }
    }

    /// The processor runs, and stays where it is until [`Probe::leave`].
    pub(super) fn enter(&self, cpu: *mut Cpu) {
        self.cpu.store(cpu, Ordering::Release);
    }

    pub(super) fn leave(&self) {
        self.cpu.store(ptr::null_mut(), Ordering::Release);
    }

    pub(super) fn stand_at(&self, address: u64, cpl: u8) {
        self.address.store(address, Ordering::Relaxed);
        self.cpl.store(cpl, Ordering::Relaxed);
    }

    pub(super) fn set_outside(&self, doing: Doing) {
        self.outside.store(doing as u8, Ordering::Relaxed);
    }

    /// Takes a sample of the thread that calls, which was interrupted at `program_counter` of the host.
    /// Neither waits, nor allocates, nor calls the system: made for a signal's handler.
    ///
    /// # Safety
    /// The caller is the thread that runs the probe's processor, or a handler of a signal that
    /// interrupted it.
    #[expect(unsafe_code, reason = "the processor is looked at while it runs")]
    pub unsafe fn sample(&self, program_counter: usize) {
        let cpu = self.cpu.load(Ordering::Acquire);
        let sample = if cpu.is_null() {
            Sample {
                doing: Doing::from_number(self.outside.load(Ordering::Relaxed)),
                user: self.cpl.load(Ordering::Relaxed) == 3,
                address: self.address.load(Ordering::Relaxed),
                code: 0,
            }
        } else {
            // SAFETY: it is there while it runs, and this thread runs it.
            unsafe { self.look(cpu, program_counter) }
        };
        self.put(sample);
    }

    /// # Safety
    /// `cpu` is a processor that this thread runs.
    #[expect(unsafe_code, reason = "the processor is looked at while it runs")]
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(unused_variables, reason = "there is no translated code")
    )]
    unsafe fn look(&self, cpu: *const Cpu, program_counter: usize) -> Sample {
        // SAFETY: the processor is there. Each read is of an aligned word that only this thread writes,
        // so that it has the old or the new value, and any value will do: it is only counted.
        let (doing, rip, begun, base, cpl) = unsafe {
            (
                (*cpu).doing.load(Ordering::Relaxed),
                ptr::read_volatile(&raw const (*cpu).rip),
                ptr::read_volatile(&raw const (*cpu).regs[slot::RIP as usize]),
                ptr::read_volatile(&raw const (*cpu).regs[slot::CS as usize]),
                ptr::read_volatile(&raw const (*cpu).cpl),
            )
        };
        let user = cpl == 3;
        #[cfg(target_arch = "x86_64")]
        if self.code.contains(&program_counter) {
            return Sample {
                doing: Doing::Translated,
                user,
                // SAFETY: as above; translated code keeps it in memory.
                address: unsafe { ptr::read_volatile(&raw const (*cpu).native.page) },
                code: (program_counter - self.code.start) as u32,
            };
        }
        let doing = Doing::from_number(doing);
        #[cfg(target_arch = "x86_64")]
        let doing = {
            // SAFETY: as above.
            let budget = unsafe { ptr::read_volatile(&raw const (*cpu).budget) };
            match doing {
                Doing::Interpreted if budget & crate::native::ALONE != 0 => Doing::Stepped,
                doing => doing,
            }
        };
        // The register names the next instruction between blocks; within one, its slot has the
        // block's first.
        let address = match doing {
            Doing::Interpreted | Doing::Stepped | Doing::FillingTlb => begun,
            _ => rip,
        };
        let address = address.wrapping_add(base);
        // What returns to user mode has changed the privilege already, and is still the kernel's: in the
        // upper half.
        let user = user && address >> 63 == 0;
        Sample {
            doing,
            user,
            address,
            code: 0,
        }
    }

    fn put(&self, sample: Sample) {
        let taken = self.taken.load(Ordering::Relaxed);
        if taken.wrapping_sub(self.collected.load(Ordering::Relaxed)) >= RING {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let place = &self.ring[taken % RING];
        let what = u64::from(sample.code) << 32 | u64::from(sample.user) << 8 | sample.doing as u64;
        place.what.store(what, Ordering::Relaxed);
        place.address.store(sample.address, Ordering::Relaxed);
        self.taken.store(taken.wrapping_add(1), Ordering::Release);
    }

    /// The oldest sample.
    pub(super) fn take(&self) -> Option<Sample> {
        let collected = self.collected.load(Ordering::Relaxed);
        if collected == self.taken.load(Ordering::Acquire) {
            return None;
        }
        let place = &self.ring[collected % RING];
        let what = place.what.load(Ordering::Relaxed);
        let sample = Sample {
            doing: Doing::from_number(what as u8),
            user: what >> 8 & 1 != 0,
            address: place.address.load(Ordering::Relaxed),
            code: (what >> 32) as u32,
        };
        self.collected
            .store(collected.wrapping_add(1), Ordering::Release);
        Some(sample)
    }

    /// Samples for which there was no room.
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Samples that were taken or lost so far. Any thread may ask.
    pub fn seen(&self) -> u64 {
        self.taken.load(Ordering::Relaxed) as u64 + self.lost.load(Ordering::Relaxed)
    }
}
