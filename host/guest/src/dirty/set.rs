//! Sets of pages as bitmaps, worked on by the word.

use std::ops::Range;

use crate::memory::PageIndex;

/// Pages in a word.
pub(super) const WORD: u64 = u64::BITS as u64;

/// A set of pages, by page index: what one harvest found, or what a peer still misses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
    len: u64,
}

impl PageSet {
    /// Shares of a set that are worked on apart begin and end at multiples of so many pages.
    pub const SHARE: u64 = WORD;

    /// An empty set over RAM of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self {
            words: vec![0; pages.div_ceil(WORD) as usize],
            pages,
            len: 0,
        }
    }

    /// The set of all pages.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::new(pages);
        set.insert_run(0..pages);
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
        page.0 < self.pages && self.insert_word((page.0 / WORD) as usize, 1 << (page.0 % WORD)) == 1
    }

    /// Adds the pages of `run` that lie in RAM; how many were new.
    pub fn insert_run(&mut self, run: Range<u64>) -> u64 {
        let before = self.len;
        each_word(run.start, run.end.min(self.pages), |index, bits| {
            self.insert_word(index, bits);
        });
        self.len - before
    }

    /// Adds the pages whose bits are set in word `index`, all of which lie in RAM; how many were
    /// new.
    #[inline]
    pub(super) fn insert_word(&mut self, index: usize, bits: u64) -> u64 {
        let word = &mut self.words[index];
        let new = u64::from((bits & !*word).count_ones());
        *word |= bits;
        self.len += new;
        new
    }

    /// Removes a page; false when it was not there.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        if !self.contains(page) {
            return false;
        }
        self.words[(page.0 / WORD) as usize] &= !(1 << (page.0 % WORD));
        self.len -= 1;
        true
    }

    /// Removes the pages of `run`; how many there were.
    pub fn remove_run(&mut self, run: Range<u64>) -> u64 {
        let before = self.len;
        each_word(run.start, run.end.min(self.pages), |index, bits| {
            let word = &mut self.words[index];
            self.len -= u64::from((*word & bits).count_ones());
            *word &= !bits;
        });
        before - self.len
    }

    /// Is the page in the set?
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.words[(page.0 / WORD) as usize] & (1 << (page.0 % WORD)) != 0
    }

    /// Adds all pages of `other` that lie in this set's RAM.
    pub fn union(&mut self, other: &PageSet) {
        let last = self.words.len().saturating_sub(1);
        let tail = self.tail();
        for (index, &bits) in other.words.iter().enumerate().take(self.words.len()) {
            if bits != 0 {
                self.insert_word(index, if index == last { bits & tail } else { bits });
            }
        }
    }

    /// Removes all pages of `other`.
    pub fn subtract(&mut self, other: &PageSet) {
        for (word, &bits) in self.words.iter_mut().zip(&other.words) {
            self.len -= u64::from((*word & bits).count_ones());
            *word &= !bits;
        }
    }

    /// How many pages of `other` are in this set.
    pub fn count_common(&self, other: &PageSet) -> u64 {
        let pairs = self.words.iter().zip(&other.words);
        pairs.map(|(a, b)| u64::from((a & b).count_ones())).sum()
    }

    /// The bits of the last word that stand for pages of RAM.
    fn tail(&self) -> u64 {
        match self.pages % WORD {
            0 => u64::MAX,
            rest => (1 << rest) - 1,
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        if self.len > 0 {
            self.words.fill(0);
            self.len = 0;
        }
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> Pages<'_> {
        Pages {
            words: &self.words,
            index: 0,
            rest: self.words.first().copied().unwrap_or(0),
        }
    }

    /// Those pages in ascending order that lie in the words which `pages` touches: a share of the
    /// set that others do not look at, when its ends are multiples of [`PageSet::SHARE`].
    pub fn within(&self, pages: Range<u64>) -> Pages<'_> {
        let end = (pages.end.div_ceil(WORD) as usize).min(self.words.len());
        let first = (pages.start / WORD) as usize;
        Pages {
            words: &self.words[..end],
            index: first,
            rest: self.words[..end].get(first).copied().unwrap_or(0),
        }
    }

    /// The longest runs of neighbouring pages, in ascending order.
    pub fn runs(&self) -> Runs<'_> {
        Runs { set: self, from: 0 }
    }

    /// The first page of the set that is not before `from`.
    pub fn first_from(&self, from: PageIndex) -> Option<PageIndex> {
        self.find(from.0, true).map(PageIndex)
    }

    /// The set as a bitmap: page 0 in the lowest bit of the first byte, whole words of 8 bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// The set over RAM of `pages` pages that [`PageSet::to_bytes`] gave. `None` when `bytes` has
    /// another length, or names a page outside of RAM.
    pub fn from_bytes(pages: u64, bytes: &[u8]) -> Option<Self> {
        let mut set = Self::new(pages);
        let (words, rest) = bytes.as_chunks();
        if !rest.is_empty() || words.len() != set.words.len() {
            return None;
        }
        for (word, bytes) in set.words.iter_mut().zip(words) {
            *word = u64::from_le_bytes(*bytes);
            set.len += u64::from(word.count_ones());
        }
        let beyond = set.words.last().copied().unwrap_or(0) & !set.tail();
        (beyond == 0).then_some(set)
    }

    /// The words, page 0 in the lowest bit of the first.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    /// The first page from `from` on that is in the set (`wanted`) or is not.
    fn find(&self, from: u64, wanted: bool) -> Option<u64> {
        let flip = if wanted { 0 } else { u64::MAX };
        let first = (from / WORD) as usize;
        let mut word = (self.words.get(first)? ^ flip) & (u64::MAX << (from % WORD));
        let mut index = first;
        while word == 0 {
            index += 1;
            word = self.words.get(index)? ^ flip;
        }
        let page = index as u64 * WORD + u64::from(word.trailing_zeros());
        (page < self.pages).then_some(page)
    }
}

/// Calls `each` with every word that `start..end` touches, and the bits of the range in it.
fn each_word(start: u64, end: u64, mut each: impl FnMut(usize, u64)) {
    let mut at = start;
    while at < end {
        let bit = at % WORD;
        let count = (end - at).min(WORD - bit);
        each((at / WORD) as usize, (u64::MAX >> (WORD - count)) << bit);
        at += count;
    }
}

/// See [`PageSet::iter`].
#[derive(Debug, Clone)]
pub struct Pages<'a> {
    words: &'a [u64],
    index: usize,
    /// What is left of the word at `index`.
    rest: u64,
}

impl Iterator for Pages<'_> {
    type Item = PageIndex;

    #[inline]
    fn next(&mut self) -> Option<PageIndex> {
        while self.rest == 0 {
            self.index += 1;
            self.rest = *self.words.get(self.index)?;
        }
        let bit = self.rest.trailing_zeros();
        self.rest &= self.rest - 1;
        Some(PageIndex(self.index as u64 * WORD + u64::from(bit)))
    }
}

/// See [`PageSet::runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    set: &'a PageSet,
    from: u64,
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let start = self.set.find(self.from, true)?;
        self.from = self.set.find(start, false).unwrap_or(self.set.pages);
        Some(start..self.from)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn of(pages: u64, members: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::new(pages);
        for &page in members {
            set.insert(PageIndex(page));
        }
        set
    }

    fn members(set: &PageSet) -> BTreeSet<u64> {
        set.iter().map(|page| page.0).collect()
    }

    #[test]
    fn a_bitmap_of_another_ram_is_no_set() {
        let bytes = PageSet::full(70).to_bytes();
        assert_eq!(PageSet::from_bytes(70, &bytes), Some(PageSet::full(70)));
        for pages in [0, 64, 69, 129] {
            assert_eq!(PageSet::from_bytes(pages, &bytes), None, "{pages}");
        }
        assert_eq!(PageSet::from_bytes(70, &bytes[1..]), None);
        let full = PageSet::full(70);
        assert_eq!(full.first_from(PageIndex(69)), Some(PageIndex(69)));
        assert_eq!(full.first_from(PageIndex(70)), None);
    }

    #[test]
    fn a_full_set_has_every_page_and_no_more() {
        for pages in [1, 63, 64, 65, 128, 1000] {
            let set = PageSet::full(pages);
            assert_eq!(set.len(), pages);
            assert_eq!(set.iter().count() as u64, pages);
            let all = 0..pages;
            assert_eq!(set.runs().collect::<Vec<_>>(), std::slice::from_ref(&all));
        }
        assert!(PageSet::new(0).iter().next().is_none());
        assert!(PageSet::full(0).runs().next().is_none());
    }

    #[test]
    fn a_larger_sets_pages_beyond_the_end_are_not_taken() {
        let mut small = PageSet::new(70);
        small.union(&PageSet::full(200));
        assert_eq!(small, PageSet::full(70));
    }

    proptest! {
        #[test]
        fn a_page_set_behaves_like_a_set(pages in proptest::collection::vec(0u64..200, 0..100)) {
            let mut set = PageSet::new(150);
            let mut model = BTreeSet::new();
            for page in pages {
                if page % 3 == 0 {
                    prop_assert_eq!(set.remove(PageIndex(page)), model.remove(&page));
                } else {
                    prop_assert_eq!(set.insert(PageIndex(page)), page < 150 && model.insert(page));
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(members(&set), model);
        }

        #[test]
        fn shares_are_the_whole_without_overlap(
            pages in proptest::collection::btree_set(0u64..700, 0..300),
            cuts in proptest::collection::btree_set(0u64..12, 0..5),
        ) {
            let set = of(700, &pages);
            let mut shared = Vec::new();
            let mut from = 0;
            for cut in cuts.into_iter().chain([20]) {
                let to = cut * PageSet::SHARE;
                shared.extend(set.within(from..to).map(|page| page.0));
                from = to;
            }
            prop_assert_eq!(shared, pages.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn runs_are_what_was_put_in_by_runs(
            runs in proptest::collection::vec((0u64..300, 0u64..150, any::<bool>()), 0..20),
        ) {
            let mut set = PageSet::new(290);
            let mut model = BTreeSet::new();
            for (start, length, put) in runs {
                let run = start..start + length;
                let before = model.len() as u64;
                if put {
                    model.extend(run.clone().filter(|page| *page < 290));
                    prop_assert_eq!(set.insert_run(run), model.len() as u64 - before);
                } else {
                    model.retain(|page| !run.contains(page));
                    prop_assert_eq!(set.remove_run(run), before - model.len() as u64);
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.runs().flatten().collect::<BTreeSet<_>>(), model);
            let mut end = None;
            for run in set.runs() {
                prop_assert!(!run.is_empty());
                prop_assert!(end.is_none_or(|end| end < run.start), "neighbours are one run");
                end = Some(run.end);
            }
        }

        #[test]
        fn sets_are_joined_parted_and_compared_as_sets(
            a in proptest::collection::btree_set(0u64..130, 0..130),
            b in proptest::collection::btree_set(0u64..130, 0..130),
        ) {
            let (left, right) = (of(130, &a), of(130, &b));
            let mut joined = left.clone();
            joined.union(&right);
            prop_assert_eq!(members(&joined), a.union(&b).copied().collect());
            prop_assert_eq!(joined.len(), a.union(&b).count() as u64);
            let mut parted = left.clone();
            parted.subtract(&right);
            prop_assert_eq!(members(&parted), a.difference(&b).copied().collect());
            prop_assert_eq!(parted.len(), a.difference(&b).count() as u64);
            prop_assert_eq!(left.count_common(&right), a.intersection(&b).count() as u64);
        }
    }
}
