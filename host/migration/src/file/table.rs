//! The page table: which pages lie where in the file.
//!
//! A frame of it is a count (4 bytes) and that many extents:
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | first page, by index |
//! | 8..16 | where its content lies in the file, in pages from the beginning |
//! | 16..20 | number of pages, at most 16 |
//! | 20..24 | CRC-32 of the content |
//!
//! Extents ascend by page. A page that no extent has is zero.

use dunlin_guest::PageIndex;

use crate::pages::PAGE;
use crate::protocol::frame::{EXTENT_LENGTH, MAX_EXTENTS};
use crate::protocol::{Kind, ProtocolError};

/// Most pages in an extent: what is read and checked at once when a guest waits for one of them.
pub(super) const EXTENT_PAGES: usize = 16;

/// Consecutive pages that lie one behind the other in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// The first page.
    pub(super) first: PageIndex,
    /// Where the content lies, in pages from the beginning of the file.
    pub(super) at: u64,
    /// Number of pages.
    pub(super) count: u32,
    /// CRC-32 of the content.
    pub(super) crc: u32,
}

impl Extent {
    /// Where the content lies, in bytes from the beginning of the file.
    pub(super) fn offset(&self) -> u64 {
        self.at * PAGE as u64
    }

    fn encode(&self, into: &mut Vec<u8>) {
        into.extend_from_slice(&self.first.0.to_le_bytes());
        into.extend_from_slice(&self.at.to_le_bytes());
        into.extend_from_slice(&self.count.to_le_bytes());
        into.extend_from_slice(&self.crc.to_le_bytes());
    }

    fn decode(bytes: &[u8; EXTENT_LENGTH]) -> Self {
        let half = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 4)) << 32;
        Self {
            first: PageIndex(word(0)),
            at: word(8),
            count: half(16),
            crc: half(20),
        }
    }
}

/// The payloads of the frames that hold these extents.
pub(super) fn encode(extents: &[Extent]) -> impl Iterator<Item = Vec<u8>> + '_ {
    extents.chunks(MAX_EXTENTS).map(|chunk| {
        let mut payload = Vec::with_capacity(4 + chunk.len() * EXTENT_LENGTH);
        payload.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
        for extent in chunk {
            extent.encode(&mut payload);
        }
        payload
    })
}

/// A page table that is being read, and then looked up in.
#[derive(Debug)]
pub(super) struct Table {
    extents: Vec<Extent>,
    pages: u64,
    /// The pages of the file that hold content.
    area: std::ops::Range<u64>,
    /// Pages of RAM.
    ram: u64,
}

impl Table {
    /// An empty table of a guest with `ram` pages, whose content lies in the pages `area` of the
    /// file.
    pub(super) fn new(ram: u64, area: std::ops::Range<u64>) -> Self {
        Self {
            extents: Vec::new(),
            pages: 0,
            area,
            ram,
        }
    }

    /// Adds the extents of one frame.
    pub(super) fn add(&mut self, payload: &[u8]) -> Result<(), ProtocolError> {
        let invalid = |reason: &str| Err(ProtocolError::invalid(Kind::PageTable, reason));
        let Some((count, entries)) = payload.split_first_chunk::<4>() else {
            return invalid("it is too short");
        };
        let (entries, rest) = entries.as_chunks::<EXTENT_LENGTH>();
        if !rest.is_empty() || u32::from_le_bytes(*count) as usize != entries.len() {
            return invalid("its length does not fit its count");
        }
        for extent in entries.iter().map(Extent::decode) {
            self.check(&extent)?;
            self.pages += u64::from(extent.count);
            self.extents.push(extent);
        }
        Ok(())
    }

    fn check(&self, extent: &Extent) -> Result<(), ProtocolError> {
        let next = self.extents.last().map_or(0, end);
        let count = u64::from(extent.count);
        let within = |start: u64, limits: &std::ops::Range<u64>| {
            start >= limits.start
                && start
                    .checked_add(count)
                    .is_some_and(|end| end <= limits.end)
        };
        if (1..=EXTENT_PAGES as u64).contains(&count)
            && within(extent.first.0, &(next..self.ram))
            && within(extent.at, &self.area)
        {
            return Ok(());
        }
        let reason = format!(
            "{count} pages from page {} of {} at page {} of the file",
            extent.first.0, self.ram, extent.at
        );
        Err(ProtocolError::invalid(Kind::PageTable, reason))
    }

    /// Pages with content.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// All extents, by page.
    pub(super) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// What to do about a page: its extent, or the pages around it that are zero.
    pub(super) fn find(&self, page: PageIndex) -> Found<'_> {
        let behind = self.extents.partition_point(|extent| end(extent) <= page.0);
        let next = self.extents.get(behind);
        match next {
            Some(extent) if extent.first <= page => Found::Extent(extent),
            _ => Found::Zeros(page.0..next.map_or(self.ram, |extent| extent.first.0)),
        }
    }
}

/// What a page is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    /// It has content.
    Extent(&'a Extent),
    /// It is zero, as are those from it to the end of this range.
    Zeros(std::ops::Range<u64>),
}

fn end(extent: &Extent) -> u64 {
    extent.first.0 + u64::from(extent.count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extent(first: u64, at: u64, count: u32) -> Extent {
        Extent {
            first: PageIndex(first),
            at,
            count,
            crc: 7,
        }
    }

    fn table(extents: &[Extent]) -> Result<Table, ProtocolError> {
        let mut table = Table::new(1000, 3..50);
        for payload in encode(extents) {
            table.add(&payload)?;
        }
        Ok(table)
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for wrong in [
            vec![extent(0, 3, 0)],
            vec![extent(0, 3, 17)],
            vec![extent(999, 3, 2)],
            vec![extent(u64::MAX, 3, 1)],
            vec![extent(0, 2, 1)],
            vec![extent(0, 49, 2)],
            vec![extent(0, u64::MAX, 2)],
            vec![extent(5, 3, 2), extent(6, 5, 1)],
            vec![extent(5, 3, 2), extent(1, 5, 1)],
        ] {
            assert!(table(&wrong).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn each_page_is_found_where_it_lies(
            steps in proptest::collection::vec((0u64..20, 1u32..=16), 0..20),
        ) {
            let (mut next, mut at, mut extents) = (0, 3, Vec::new());
            for (gap, count) in steps {
                if at + u64::from(count) > 50 {
                    break;
                }
                extents.push(extent(next + gap, at, count));
                next += gap + u64::from(count);
                at += u64::from(count);
            }
            let table = table(&extents).unwrap();
            prop_assert_eq!(table.extents(), &extents[..]);
            prop_assert_eq!(table.pages(), at - 3);
            for page in 0..1000 {
                let holds = |e: &&Extent| (e.first.0..end(e)).contains(&page);
                match (table.find(PageIndex(page)), extents.iter().find(holds)) {
                    (Found::Extent(found), Some(there)) => prop_assert_eq!(found, there),
                    (Found::Zeros(zeros), None) => {
                        prop_assert_eq!(zeros.start, page);
                        prop_assert!(extents.iter().all(|e| end(e) <= page || e.first.0 >= zeros.end));
                    }
                    (found, there) => prop_assert!(false, "{found:?} for {there:?}"),
                }
            }
        }

        #[test]
        fn random_bytes_never_leave_their_bounds(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut table = Table::new(1000, 3..50);
            if table.add(&payload).is_ok() {
                for extent in table.extents() {
                    prop_assert!(end(extent) <= 1000 && extent.at + u64::from(extent.count) <= 50);
                }
            }
        }
    }
}
