//! What of guest RAM has arrived. Lanes note it at the same time.

use std::sync::atomic::{AtomicU64, Ordering};

use dunlin_guest::{Memory, PageIndex, PageSet};

use crate::pages::{self, PAGE};
use crate::protocol::runs::Run;

/// Pages that were ever written, and their hashes when both sides compare them.
pub(crate) struct Inventory {
    memory: Memory,
    /// One bit a page: the others are zero already.
    written: Box<[AtomicU64]>,
    hashes: Option<Box<[AtomicU64]>>,
}

impl Inventory {
    pub(crate) fn new(memory: Memory, hashing: bool) -> Self {
        let zeros = |count: u64| (0..count).map(|_| AtomicU64::new(0)).collect();
        let pages = memory.pages();
        Self {
            written: zeros(pages.div_ceil(64)),
            hashes: hashing.then(|| zeros(pages)),
            memory,
        }
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    fn word(&self, page: PageIndex) -> Option<(&AtomicU64, u64)> {
        let word = self.written.get((page.0 / 64) as usize)?;
        Some((word, 1 << (page.0 % 64)))
    }

    fn is_written(&self, page: PageIndex) -> bool {
        self.word(page)
            .is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    fn note(&self, page: PageIndex) {
        if let Some((word, bit)) = self.word(page)
            && word.load(Ordering::Relaxed) & bit == 0
        {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Somebody else wrote these pages: they are no longer zero by themselves.
    pub(crate) fn note_written(&self, pages: &PageSet) {
        pages.iter().for_each(|page| self.note(page));
    }

    /// The content of these pages lies in RAM.
    pub(crate) fn stored(&self, runs: &[Run]) {
        let mut content = [0; PAGE];
        for page in runs.iter().flat_map(Run::pages) {
            self.note(page);
            if self.hashes.is_some() {
                self.memory.read_page(page, &mut content);
                self.set_hash(page, pages::hash(page, &content));
            }
        }
    }

    /// Puts the content of these pages, one behind the other, into RAM.
    pub(crate) fn store(&self, runs: &[Run], content: &[u8]) {
        let (chunks, _rest) = content.as_chunks::<PAGE>();
        for (page, bytes) in runs.iter().flat_map(Run::pages).zip(chunks) {
            self.memory.write_page(page, bytes);
            self.note(page);
            if self.hashes.is_some() {
                self.set_hash(page, pages::hash(page, bytes));
            }
        }
    }

    /// These pages are zero.
    pub(crate) fn zero(&self, runs: &[Run]) {
        for page in runs.iter().flat_map(Run::pages) {
            if self.is_written(page) {
                self.memory.write_page(page, &[0; PAGE]);
                self.set_hash(page, 0);
            }
        }
    }

    fn set_hash(&self, page: PageIndex, hash: u64) {
        let hashes = self.hashes.as_ref();
        if let Some(known) = hashes.and_then(|hashes| hashes.get(page.0 as usize)) {
            known.store(hash, Ordering::Relaxed);
        }
    }

    /// Hash of RAM as it was stored, while no lane stores.
    pub(crate) fn hash(&self) -> Option<u64> {
        let hashes = self.hashes.as_ref()?;
        let values = hashes.iter().map(|hash| hash.load(Ordering::Relaxed));
        Some(values.fold(0, u64::wrapping_add))
    }

    /// As [`Inventory::hash`], of the pages that are not `missing`.
    pub(crate) fn hash_without(&self, missing: &PageSet) -> Option<u64> {
        let hashes = self.hashes.as_ref()?;
        let known = missing
            .iter()
            .filter_map(|page| hashes.get(page.0 as usize));
        let gone = known.fold(0u64, |sum, hash| {
            sum.wrapping_add(hash.load(Ordering::Relaxed))
        });
        Some(self.hash()?.wrapping_sub(gone))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u32) -> [Run; 1] {
        let first = PageIndex(first);
        [Run { first, count }]
    }

    #[test]
    fn the_hash_follows_what_is_stored() {
        let memory = Memory::new(1 << 20).unwrap();
        let inventory = Inventory::new(memory.clone(), true);
        inventory.store(&run(3, 2), &[7; 2 * PAGE]);
        memory.write_page(PageIndex(9), &[1; PAGE]);
        inventory.stored(&run(9, 1));
        assert_eq!(inventory.hash(), Some(pages::hash_ram(&memory)));
        inventory.zero(&run(3, 1));
        inventory.zero(&run(200, 20));
        assert_eq!(inventory.hash(), Some(pages::hash_ram(&memory)));
        let mut content = [1; PAGE];
        memory.read_page(PageIndex(3), &mut content);
        assert_eq!(content, [0; PAGE]);
    }

    #[test]
    fn pages_that_were_never_written_are_not_touched_for_a_zero() {
        use std::os::unix::fs::MetadataExt;
        let memory = Memory::new(16 << 20).unwrap();
        let inventory = Inventory::new(memory.clone(), false);
        inventory.zero(&run(0, 4096));
        assert_eq!(memory.file().metadata().unwrap().blocks(), 0);
        let mut others = PageSet::new(4096);
        others.insert(PageIndex(5));
        memory.write_page(PageIndex(5), &[1; PAGE]);
        inventory.note_written(&others);
        inventory.zero(&run(5, 1));
        let mut content = [1; PAGE];
        memory.read_page(PageIndex(5), &mut content);
        assert_eq!(content, [0; PAGE]);
    }
}
