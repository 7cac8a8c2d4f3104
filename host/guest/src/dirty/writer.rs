//! Who wrote a page: what the value of its mark says.

use std::num::NonZeroU8;
use std::sync::atomic::{AtomicU64, Ordering};

/// Who marks a page. The last one to write it is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writer(NonZeroU8);

/// The mark of vCPU 0; one less stands for the machine.
const FIRST_VCPU: u8 = 2;

impl Writer {
    /// A device, the loader, or a vCPU that the engine did not name.
    pub const MACHINE: Self = Self(NonZeroU8::MIN);

    /// vCPU `index`. Those from 253 on are not told apart.
    pub fn vcpu(index: u32) -> Self {
        let mark = u8::try_from(index).map_or(u8::MAX, |index| index.saturating_add(FIRST_VCPU));
        Self(NonZeroU8::MIN.saturating_add(mark - 1))
    }

    /// The value of its marks; never zero, which is clean.
    pub fn mark(self) -> NonZeroU8 {
        self.0
    }
}

/// How many pages each writer was the last to write, summed over the harvests of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorship(Box<[u64; 256]>);

impl Default for Authorship {
    fn default() -> Self {
        Self(Box::new([0; 256]))
    }
}

impl Authorship {
    /// Pages whose last writer was `writer`.
    pub fn of(&self, writer: Writer) -> u64 {
        self.0[usize::from(writer.0.get())]
    }

    /// Pages of each of the first `cpus` vCPUs.
    pub fn of_vcpus(&self, cpus: u32) -> Vec<u64> {
        (0..cpus).map(|cpu| self.of(Writer::vcpu(cpu))).collect()
    }

    /// Pages that any vCPU was named for.
    pub fn named(&self) -> u64 {
        self.0[usize::from(FIRST_VCPU)..].iter().sum()
    }

    /// What has come to this since `earlier`, which was taken from the same log.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut difference = self.clone();
        for (now, before) in difference.0.iter_mut().zip(earlier.0.iter()) {
            *now = now.wrapping_sub(*before);
        }
        difference
    }
}

/// The sums of a log, added to by whoever harvests.
#[derive(Debug)]
pub(super) struct Tally(Box<[AtomicU64; 256]>);

impl Tally {
    pub(super) fn new() -> Self {
        Self(Box::new([const { AtomicU64::new(0) }; 256]))
    }

    pub(super) fn read(&self) -> Authorship {
        let mut sums = Authorship::default();
        for (sum, counted) in sums.0.iter_mut().zip(self.0.iter()) {
            *sum = counted.load(Ordering::Relaxed);
        }
        sums
    }

    /// Adds the number of marks of each value.
    pub(super) fn add(&self, marks: &[u32; 256]) {
        for (sum, &count) in self.0.iter().zip(marks) {
            if count > 0 {
                sum.fetch_add(count.into(), Ordering::Relaxed);
            }
        }
    }
}
