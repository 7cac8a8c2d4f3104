//! Which physical pages hold code that some processor of the VM has decoded.

use std::sync::atomic::{AtomicU32, Ordering};

const SLOTS: usize = 1 << 16;
const CODE: u32 = 1;

/// One counter a page (pages that share one only cost time): odd once the page holds code, and
/// two more for each store that hit it since. A processor that stores to such a page counts it up
/// instead of entering the page in its TLB for writing; a processor that executes compares at
/// every serialising moment. See [`super`] for how that keeps decoded code true.
#[derive(Debug)]
pub struct CodeMap {
    pages: Box<[AtomicU32]>,
    /// Counts stores to pages that hold code.
    stores: AtomicU32,
    /// Counts pages that came to hold code.
    pages_added: AtomicU32,
}

impl Default for CodeMap {
    fn default() -> Self {
        Self::new()
    }
}

impl CodeMap {
    /// No page holds code.
    pub fn new() -> Self {
        Self {
            pages: (0..SLOTS).map(|_| AtomicU32::new(0)).collect(),
            stores: AtomicU32::new(0),
            pages_added: AtomicU32::new(0),
        }
    }

    fn page(&self, frame: u64) -> &AtomicU32 {
        &self.pages[(frame ^ frame >> 16) as usize % SLOTS]
    }

    /// The page comes to hold code. Returns its counter.
    pub(crate) fn add(&self, frame: u64) -> u32 {
        let before = self.page(frame).fetch_or(CODE, Ordering::AcqRel);
        if before & CODE == 0 {
            self.pages_added.fetch_add(1, Ordering::AcqRel);
        }
        before | CODE
    }

    /// Does the page hold code, as far as any processor has decoded any?
    pub(crate) fn holds_code(&self, frame: u64) -> bool {
        self.page(frame).load(Ordering::Acquire) & CODE != 0
    }

    /// A store has hit a page that holds code.
    pub(crate) fn stored(&self, frame: u64) -> u32 {
        let count = self
            .page(frame)
            .fetch_add(2, Ordering::AcqRel)
            .wrapping_add(2);
        self.stores.fetch_add(1, Ordering::AcqRel);
        count
    }

    /// The page's counter.
    pub(crate) fn count(&self, frame: u64) -> u32 {
        self.page(frame).load(Ordering::Acquire)
    }

    /// Stores to code by any processor.
    pub(crate) fn stores(&self) -> u32 {
        self.stores.load(Ordering::Acquire)
    }

    /// Pages that came to hold code.
    #[inline(always)]
    pub(crate) fn pages_added(&self) -> u32 {
        self.pages_added.load(Ordering::Relaxed)
    }
}
