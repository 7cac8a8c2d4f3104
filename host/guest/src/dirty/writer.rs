//! Who wrote a page: what the value of its mark says.

/// Who marks a page. The last one to write it is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writer(u8);

/// The mark of vCPU 0; one less stands for the machine.
const FIRST_VCPU: u8 = 2;

impl Writer {
    /// A device, the loader, or a vCPU that the engine did not name.
    pub const MACHINE: Self = Self(1);

    /// vCPU `index`. Those from 253 on are not told apart.
    pub fn vcpu(index: u32) -> Self {
        Self(u8::try_from(index).map_or(u8::MAX, |index| index.saturating_add(FIRST_VCPU)))
    }

    /// The value of its marks; never zero, which is clean.
    pub fn mark(self) -> u8 {
        self.0
    }
}

/// How many pages each writer was the last to write, summed over harvests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorship(Box<[u64; 256]>);

impl Default for Authorship {
    fn default() -> Self {
        Self(Box::new([0; 256]))
    }
}

impl Authorship {
    /// Nobody has written.
    pub fn new() -> Self {
        Self::default()
    }

    /// Pages whose last writer was `writer`.
    pub fn of(&self, writer: Writer) -> u64 {
        self.0[usize::from(writer.0)]
    }

    /// Pages of each of the first `cpus` vCPUs.
    pub fn of_vcpus(&self, cpus: u32) -> Vec<u64> {
        (0..cpus).map(|cpu| self.of(Writer::vcpu(cpu))).collect()
    }

    /// Pages that any vCPU was named for.
    pub fn named(&self) -> u64 {
        self.0[usize::from(FIRST_VCPU)..].iter().sum()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.0.fill(0);
    }

    #[inline]
    pub(super) fn add(&mut self, mark: u8) {
        self.0[usize::from(mark)] += 1;
    }
}
