//! The one dirty log: which pages of guest RAM were written since the last harvest.
//!
//! One byte a page, set by an unconditional store *after* the data was written, cleared by an
//! atomic swap *before* the page is read. A store of the mark with release order that follows
//! the data, and a swap with acquire order that precedes the copy, leave no interleaving in
//! which a write is neither copied nor marked: if the swap sees the mark it sees the data, if it
//! does not the mark stays for the next round. A bitmap would need a read before the
//! read-modify-write to be as cheap, and that read may pass the data in the store buffer.
//! Marks are always made, whether anybody harvests or not, so that there is no moment of
//! switching on that a writer could miss. `docs/adr/0002-dirty-log.md` has the measurements.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::PAGE_SIZE;
use crate::memory::PageIndex;

/// Marks of every page of guest RAM, by page index.
#[derive(Debug)]
pub struct DirtyLog {
    /// One mark a page, eight to a word, so that a clean run is skipped by the word.
    words: Box<[AtomicU64]>,
    pages: usize,
}

impl DirtyLog {
    /// A log for `pages` pages, all clean.
    pub fn new(pages: usize) -> Self {
        let words = (0..pages.div_ceil(8)).map(|_| AtomicU64::new(0)).collect();
        Self { words, pages }
    }

    /// Number of pages that the log covers.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The marks as bytes: the byte of page `n` is non-zero when the page is dirty.
    pub fn marks(&self) -> &[AtomicU8] {
        #[expect(
            unsafe_code,
            reason = "bytes and words are two views of the same marks"
        )]
        // SAFETY: the words are owned by `self`, atomic, and at least `pages` bytes long;
        // an `AtomicU8` has no alignment or validity requirement beyond those of a `u64`'s byte.
        // Bytes and words are accessed atomically at different sizes, which the hardware orders
        // as one location does: a swap of the word sees every byte stored before it.
        unsafe {
            std::slice::from_raw_parts(self.words.as_ptr().cast::<AtomicU8>(), self.pages)
        }
    }

    /// Marks one page. Call it after the data was written. A page outside of RAM is ignored.
    #[inline]
    pub fn mark(&self, page: PageIndex) {
        if let Some(mark) = self.marks().get(page.0 as usize) {
            mark.store(1, Ordering::Release);
        }
    }

    /// Marks the pages that `len` bytes from RAM offset `offset` touch.
    pub fn mark_range(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = offset / PAGE_SIZE;
        let last = offset.saturating_add(len - 1) / PAGE_SIZE;
        for page in first..=last.min(self.pages as u64) {
            self.mark(PageIndex(page));
        }
    }

    /// Marks every page of `pages`: what a failed attempt to send must put back.
    pub fn mark_all(&self, pages: &PageSet) {
        for page in pages.iter() {
            self.mark(page);
        }
    }

    /// Is the page marked?
    pub fn is_dirty(&self, page: PageIndex) -> bool {
        self.marks()
            .get(page.0 as usize)
            .is_some_and(|mark| mark.load(Ordering::Acquire) != 0)
    }

    /// Adds the marked pages to `into` and clears their marks.
    ///
    /// Any page that is written from here on is marked again, so whoever copies the pages of
    /// `into` after this call has, together with the next harvest, every write.
    pub fn harvest(&self, into: &mut PageSet) {
        for (index, word) in self.words.iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let marks = word.swap(0, Ordering::AcqRel).to_ne_bytes();
            for (byte, mark) in marks.into_iter().enumerate() {
                if mark != 0 {
                    into.insert(PageIndex((index * 8 + byte) as u64));
                }
            }
        }
    }

    /// How many pages are marked now.
    pub fn count(&self) -> u64 {
        self.marks()
            .iter()
            .map(|mark| u64::from(mark.load(Ordering::Relaxed) != 0))
            .sum()
    }
}

/// A set of pages, by page index: what one harvest found, or what a peer still misses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
    len: u64,
}

impl PageSet {
    /// An empty set over RAM of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64) as usize],
            pages,
            len: 0,
        }
    }

    /// The set of all pages.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::new(pages);
        for page in 0..pages {
            set.insert(PageIndex(page));
        }
        set
    }

    /// Number of pages in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Has the set no page?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a page; false when it was there, or lies outside of RAM.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        if page.0 >= self.pages {
            return false;
        }
        let word = &mut self.words[(page.0 / 64) as usize];
        let bit = 1 << (page.0 % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.len += u64::from(new);
        new
    }

    /// Removes a page; false when it was not there.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        if !self.contains(page) {
            return false;
        }
        self.words[(page.0 / 64) as usize] &= !(1 << (page.0 % 64));
        self.len -= 1;
        true
    }

    /// Is the page in the set?
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.words[(page.0 / 64) as usize] & (1 << (page.0 % 64)) != 0
    }

    /// Adds all pages of `other`.
    pub fn union(&mut self, other: &PageSet) {
        for page in other.iter() {
            self.insert(page);
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.len = 0;
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = rest.trailing_zeros();
                rest &= rest - 1;
                Some(PageIndex(index as u64 * 64 + u64::from(bit)))
            })
        })
    }
}

/// The part of the log that belongs to one region of RAM; what vm-memory calls a bitmap.
#[derive(Debug, Clone)]
pub struct DirtyRange {
    log: Arc<DirtyLog>,
    /// RAM offset of the range's first byte.
    base: u64,
}

impl DirtyRange {
    /// The marks from RAM offset `base` on.
    pub fn new(log: Arc<DirtyLog>, base: u64) -> Self {
        Self { log, base }
    }
}

impl WithBitmapSlice<'_> for DirtyRange {
    type S = DirtyRange;
}

impl BitmapSlice for DirtyRange {}

impl Bitmap for DirtyRange {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log
            .mark_range(self.base.saturating_add(offset as u64), len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.is_dirty(PageIndex(
            self.base.saturating_add(offset as u64) / PAGE_SIZE,
        ))
    }

    fn slice_at(&self, offset: usize) -> DirtyRange {
        DirtyRange {
            log: Arc::clone(&self.log),
            base: self.base.saturating_add(offset as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_harvest_returns_each_mark_once() {
        let log = DirtyLog::new(100);
        log.mark(PageIndex(3));
        log.mark(PageIndex(99));
        log.mark(PageIndex(100));
        let mut set = PageSet::new(100);
        log.harvest(&mut set);
        assert_eq!(set.iter().map(|p| p.0).collect::<Vec<_>>(), [3, 99]);
        let mut again = PageSet::new(100);
        log.harvest(&mut again);
        assert!(again.is_empty());
    }

    #[test]
    fn a_range_marks_every_page_that_it_touches() {
        let log = DirtyLog::new(8);
        log.mark_range(4095, 2);
        assert_eq!(log.count(), 2);
        log.mark_range(8 * 4096 - 1, u64::MAX);
        assert!(log.is_dirty(PageIndex(7)));
    }

    #[test]
    fn no_write_is_lost_between_writer_and_harvester() {
        // A writer counts in a page and marks it; the harvester copies what is marked. When the
        // writer is done and a last harvest was made, the copy must equal the original.
        let log = Arc::new(DirtyLog::new(64));
        let data: Arc<Vec<AtomicU64>> = Arc::new((0..64).map(|_| AtomicU64::new(0)).collect());
        let done = Arc::new(AtomicU8::new(0));
        let writer = {
            let (log, data, done) = (log.clone(), data.clone(), done.clone());
            std::thread::spawn(move || {
                for i in 0..200_000u64 {
                    let page = (i * 7 % 64) as usize;
                    data[page].store(i, Ordering::Relaxed);
                    log.mark(PageIndex(page as u64));
                }
                done.store(1, Ordering::Release);
            })
        };
        let mut copy = vec![0; 64];
        loop {
            let last = done.load(Ordering::Acquire) == 1;
            let mut set = PageSet::new(64);
            log.harvest(&mut set);
            for page in set.iter() {
                copy[page.0 as usize] = data[page.0 as usize].load(Ordering::Relaxed);
            }
            if last {
                break;
            }
        }
        writer.join().unwrap();
        let original: Vec<u64> = data.iter().map(|d| d.load(Ordering::Relaxed)).collect();
        assert_eq!(copy, original);
    }

    proptest! {
        #[test]
        fn a_page_set_behaves_like_a_set(pages in proptest::collection::vec(0u64..200, 0..100)) {
            let mut set = PageSet::new(150);
            let mut model = std::collections::BTreeSet::new();
            for page in pages {
                if page % 3 == 0 {
                    prop_assert_eq!(set.remove(PageIndex(page)), model.remove(&page));
                } else {
                    prop_assert_eq!(set.insert(PageIndex(page)), page < 150 && model.insert(page));
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.iter().map(|p| p.0).collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
        }
    }
}
