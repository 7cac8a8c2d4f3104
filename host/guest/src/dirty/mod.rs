//! The one dirty log: which pages of guest RAM were written since the last harvest, and by whom.
//!
//! One byte a page, set by an unconditional store *after* the data was written, cleared by an
//! atomic swap *before* the page is read. A store of the mark with release order that follows
//! the data, and a swap with acquire order that precedes the copy, leave no interleaving in
//! which a write is neither copied nor marked: if the swap sees the mark it sees the data, if it
//! does not the mark stays for the next round. A bitmap would need a read before the
//! read-modify-write to be as cheap, and that read may pass the data in the store buffer.
//! Marks are always made, whether anybody harvests or not, so that there is no moment of
//! switching on that a writer could miss. Since any value but zero is a mark, its value names the
//! [`Writer`] at no cost. `docs/adr/0002-dirty-log.md` has the measurements.

mod set;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::PAGE_SIZE;
use crate::memory::PageIndex;
pub use set::{PageSet, Pages, Runs};
use writer::Tally;
pub use writer::{Authorship, Writer};

/// Marks in a word of the log.
const MARKS: usize = 8;
/// Words of the log that make one word of a [`PageSet`].
const GROUP: usize = set::WORD as usize / MARKS;
/// One mark in each byte.
const ONES: u64 = 0x0101_0101_0101_0101;

/// Marks of every page of guest RAM, by page index.
#[derive(Debug)]
pub struct DirtyLog {
    /// One mark a page, eight to a word, so that a clean run is skipped by the group of words.
    words: Box<[AtomicU64]>,
    pages: usize,
    /// Who made the marks that were harvested.
    tally: Tally,
}

impl DirtyLog {
    /// A log for `pages` pages, all clean.
    pub fn new(pages: usize) -> Self {
        let words = (0..pages.div_ceil(MARKS))
            .map(|_| AtomicU64::new(0))
            .collect();
        Self {
            words,
            pages,
            tally: Tally::new(),
        }
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
        self.mark_by(page, Writer::MACHINE);
    }

    /// Marks one page, written by `writer`.
    #[inline]
    pub fn mark_by(&self, page: PageIndex, writer: Writer) {
        if let Some(mark) = self.marks().get(page.0 as usize) {
            mark.store(writer.mark().get(), Ordering::Release);
        }
    }

    /// Marks the pages that `len` bytes from RAM offset `offset` touch.
    pub fn mark_range(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = offset / PAGE_SIZE;
        let last = offset.saturating_add(len - 1) / PAGE_SIZE;
        let end = last.saturating_add(1).min(self.pages as u64);
        if let Some(marks) = self.marks().get(first as usize..end as usize) {
            for mark in marks {
                mark.store(Writer::MACHINE.mark().get(), Ordering::Release);
            }
        }
    }

    /// Marks every page of `pages`: what a failed attempt to send must put back.
    pub fn mark_all(&self, pages: &PageSet) {
        for (index, &bits) in pages.words().iter().enumerate() {
            self.mark_bits(index as u64 * set::WORD, bits);
        }
    }

    /// Marks page `first` + n for each set bit n: a word of a bitmap that somebody else keeps.
    #[inline]
    pub fn mark_bits(&self, first: u64, bits: u64) {
        if bits == 0 {
            return;
        }
        let at = first as usize;
        if bits == u64::MAX && at.is_multiple_of(MARKS) && at + 64 <= self.pages {
            // Other marks of these pages are overwritten by as good ones.
            for word in &self.words[at / MARKS..][..GROUP] {
                word.store(ONES, Ordering::Release);
            }
            return;
        }
        let mut rest = bits;
        while rest != 0 {
            self.mark(PageIndex(
                first.saturating_add(rest.trailing_zeros().into()),
            ));
            rest &= rest - 1;
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
        let mut counts = [0; 256];
        for (index, group) in self.words.chunks(GROUP).enumerate() {
            if !has_marks(group) {
                continue;
            }
            let mut bits = 0;
            for (at, word) in group.iter().enumerate() {
                if word.load(Ordering::Relaxed) != 0 {
                    let marks = word.swap(0, Ordering::AcqRel);
                    bits |= set_bits(marks) << (at * MARKS);
                    count_marks(marks, &mut counts);
                }
            }
            into.insert_word(index, bits);
        }
        self.tally.add(&counts);
    }

    /// Who was the last to write the pages of all harvests until now.
    pub fn authorship(&self) -> Authorship {
        self.tally.read()
    }

    /// How many pages are marked now. Clears nothing.
    pub fn count(&self) -> u64 {
        let marked = |group: &[AtomicU64]| {
            let marks = |word: &AtomicU64| flags(word.load(Ordering::Relaxed)).count_ones();
            u64::from(group.iter().map(marks).sum::<u32>())
        };
        let groups = self.words.chunks(GROUP);
        groups.filter(|group| has_marks(group)).map(marked).sum()
    }
}

#[inline]
fn count_marks(marks: u64, counts: &mut [u32; 256]) {
    for mark in marks.to_ne_bytes() {
        if mark != 0 {
            counts[usize::from(mark)] += 1;
        }
    }
}

/// Is a word of the group not zero? Without a branch a word.
#[inline]
fn has_marks(group: &[AtomicU64]) -> bool {
    let load = |sum, word: &AtomicU64| sum | word.load(Ordering::Relaxed);
    group.iter().fold(0, load) != 0
}

/// The highest bit of each byte that is not zero.
#[inline]
fn flags(marks: u64) -> u64 {
    const LOW: u64 = 0x7f * ONES;
    (((marks & LOW) + LOW) | marks) & !LOW
}

/// One bit for each byte that is not zero, the first byte in memory in the lowest.
#[inline]
fn set_bits(marks: u64) -> u64 {
    // Each flag, moved to the lowest bit of its byte, is carried by the product to its place in
    // the highest byte; no two meet.
    (flags(marks).to_le() >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
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

    #[test]
    fn the_log_knows_who_wrote_a_page_last() {
        let log = DirtyLog::new(1000);
        log.mark_by(PageIndex(1), Writer::vcpu(0));
        log.mark_by(PageIndex(2), Writer::vcpu(1));
        log.mark_by(PageIndex(2), Writer::vcpu(3));
        log.mark_by(PageIndex(999), Writer::vcpu(5000));
        log.mark(PageIndex(7));
        let mut set = PageSet::new(1000);
        log.harvest(&mut set);
        let by = log.authorship();
        assert_eq!(set.len(), 5 - 1);
        assert_eq!(by.of_vcpus(4), [1, 0, 0, 1]);
        assert_eq!(by.of(Writer::vcpu(4000)), 1);
        assert_eq!((by.of(Writer::MACHINE), by.named()), (1, 3));
        assert_eq!(log.count(), 0);
        log.mark_by(PageIndex(2), Writer::vcpu(1));
        log.harvest(&mut set);
        assert_eq!(log.authorship().since(&by).of_vcpus(4), [0, 1, 0, 0]);
    }

    proptest! {
        #[test]
        fn the_log_is_a_set_of_pages_whatever_its_marks(
            pages in 1u64..400,
            marks in proptest::collection::vec((0u64..420, 0u32..300), 0..300),
            bitmap in any::<u64>(),
            at in 0u64..400,
        ) {
            let log = DirtyLog::new(pages as usize);
            let mut model = std::collections::BTreeSet::new();
            for (page, cpu) in marks {
                log.mark_by(PageIndex(page), Writer::vcpu(cpu));
                model.insert(page);
            }
            for bits in [bitmap, u64::MAX] {
                log.mark_bits(at, bits);
                model.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| at + bit));
            }
            model.retain(|page| *page < pages);
            prop_assert_eq!(log.count(), model.len() as u64);
            let mut set = PageSet::new(pages);
            set.insert(PageIndex(0));
            log.harvest(&mut set);
            log.mark_all(&set);
            model.insert(0);
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.iter().map(|page| page.0).collect::<std::collections::BTreeSet<_>>(), model);
            prop_assert_eq!(log.count(), set.len());
        }
    }
}
