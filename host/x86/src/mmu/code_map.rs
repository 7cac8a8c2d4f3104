//! Which physical pages hold code that some processor of the VM has decoded.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const SLOTS: usize = 1 << 16;
/// One processor that holds decoded code of the page.
const HOLDER: u64 = 1;
/// One store that hit the page while somebody held it.
const STORE: u64 = 1 << 24;
const HOLDERS: u64 = STORE - 1;

/// How many processors hold decoded code of each page, and how many stores have hit it meanwhile
/// (pages that share a counter only cost time). A processor that stores to such a page counts the
/// store instead of entering the page in its TLB for writing; one that executes compares the
/// counts at every serialising moment. The overview of the `mmu` module has the whole protocol.
#[derive(Debug)]
pub struct CodeMap {
    pages: Box<[AtomicU64]>,
    /// Counts stores to pages that hold code.
    stores: AtomicU32,
    /// Counts the times that a page came to hold code.
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
            pages: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            stores: AtomicU32::new(0),
            pages_added: AtomicU32::new(0),
        }
    }

    fn page(&self, frame: u64) -> &AtomicU64 {
        &self.pages[(frame ^ frame >> 16) as usize % SLOTS]
    }

    /// A processor comes to hold code of the page. Returns the stores so far.
    pub(crate) fn add(&self, frame: u64) -> u64 {
        let before = self.page(frame).fetch_add(HOLDER, Ordering::AcqRel);
        self.pages_added.fetch_add(1, Ordering::AcqRel);
        before / STORE
    }

    /// A processor has dropped its code of the page.
    pub(crate) fn release(&self, frame: u64) {
        self.page(frame).fetch_sub(HOLDER, Ordering::AcqRel);
    }

    /// Does any processor hold code of the page?
    pub(crate) fn holds_code(&self, frame: u64) -> bool {
        self.page(frame).load(Ordering::Acquire) & HOLDERS != 0
    }

    /// A store has hit a page that holds code. Returns the stores so far.
    pub(crate) fn stored(&self, frame: u64) -> u64 {
        let before = self.page(frame).fetch_add(STORE, Ordering::AcqRel);
        self.stores.fetch_add(1, Ordering::AcqRel);
        before.wrapping_add(STORE) / STORE
    }

    /// The stores that have hit the page.
    pub(crate) fn count(&self, frame: u64) -> u64 {
        self.page(frame).load(Ordering::Acquire) / STORE
    }

    /// Stores to code by any processor.
    pub(crate) fn stores(&self) -> u32 {
        self.stores.load(Ordering::Acquire)
    }

    /// How often a page came to hold code.
    #[inline(always)]
    pub(crate) fn pages_added(&self) -> u32 {
        self.pages_added.load(Ordering::Relaxed)
    }
}
