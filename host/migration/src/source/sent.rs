//! Which content the destination has of pages that were sent before.
//!
//! A page that was written with what it held already need not travel again. Each page that is sent
//! for the second time or more is hashed (XXH3, 64 bits, with a seed that nobody knows), and the
//! hash is compared with that of the last time. Pages of the first round are not hashed: most of
//! them are never sent again, and that round is bound by memory bandwidth.

use std::sync::atomic::{AtomicU64, Ordering};

use dunlin_guest::PageIndex;
use twox_hash::XxHash3_64;

/// Hashes of what was sent, by page; zero stands for a content that is not known.
pub(super) struct Sent {
    seed: u64,
    hashes: Box<[AtomicU64]>,
}

impl Sent {
    /// Nothing is known of `pages` pages.
    pub(super) fn new(pages: u64, seed: u64) -> Self {
        Self {
            seed,
            hashes: (0..pages).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Has the destination this content of the page? Remembers that it will have it.
    ///
    /// Within one round each page belongs to one lane, and rounds do not overlap, so nothing else
    /// than the page's own word is shared.
    pub(super) fn same(&self, page: PageIndex, content: &[u8]) -> bool {
        let hash = XxHash3_64::oneshot_with_seed(self.seed, content).max(1);
        let known = self.hashes.get(page.0 as usize);
        known.is_some_and(|known| known.swap(hash, Ordering::Relaxed) == hash)
    }

    /// The destination may have anything there.
    pub(super) fn forget(&self, page: PageIndex) {
        if let Some(known) = self.hashes.get(page.0 as usize) {
            known.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_content_that_was_sent_last_is_the_same() {
        let sent = Sent::new(2, 5);
        let (page, other) = (PageIndex(1), PageIndex(0));
        assert!(!sent.same(page, &[1; 4096]));
        assert!(sent.same(page, &[1; 4096]));
        assert!(!sent.same(other, &[1; 4096]));
        assert!(!sent.same(page, &[0; 4096]));
        assert!(sent.same(page, &[0; 4096]));
        sent.forget(page);
        assert!(!sent.same(page, &[0; 4096]));
        assert!(!sent.same(PageIndex(2), &[0; 4096]));
        assert!(!sent.same(PageIndex(2), &[0; 4096]));
    }
}
