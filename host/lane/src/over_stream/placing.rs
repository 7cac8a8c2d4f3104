//! A write on its way into the windows.

use super::header::{Header, placements};
use crate::page::WindowRange;
use crate::stream::RawSlice;
use crate::windows::Windows;

/// Bytes of placed memory that are looked at together: they stay in a first-level cache.
const LOOK: usize = 4096;

/// The write that is arriving.
#[derive(Debug, Default)]
pub(super) struct Placing {
    /// What is still to be filled, from `next` on.
    slices: Vec<RawSlice>,
    next: usize,
    /// Bytes to come.
    left: usize,
    /// First and last byte of all of it, in the receiver's numbering.
    touches: Option<(u64, u64)>,
    /// The checksum so far, and what it has to become.
    crc: Option<(crc32fast::Hasher, u32)>,
}

impl Placing {
    /// Begins a write: checks where all of it goes.
    pub(super) fn begin(
        &mut self,
        header: &Header,
        table: &[u8],
        windows: &Windows,
    ) -> Result<(), String> {
        self.slices.clear();
        self.next = 0;
        self.left = 0;
        self.touches = None;
        self.crc = header
            .payload_crc
            .map(|expected| (crc32fast::Hasher::new(), expected));
        for placement in placements(table) {
            let slice = windows.resolve(placement).ok_or_else(|| {
                format!(
                    "{} bytes for {:#x} are outside of what was granted",
                    placement.length, placement.target
                )
            })?;
            if slice.is_empty() {
                continue;
            }
            self.left += slice.len();
            let last = placement.target + u64::from(placement.length) - 1;
            let (low, high) = self.touches.unwrap_or((placement.target, last));
            self.touches = Some((low.min(placement.target), high.max(last)));
            if !self.slices.last_mut().is_some_and(|end| end.join(slice)) {
                self.slices.push(slice);
            }
        }
        if overlap(table) {
            return Err("a write has two places for the same byte".to_owned());
        }
        if self.left != header.payload as usize {
            return Err(format!(
                "a write of {} bytes has places for {}",
                header.payload, self.left
            ));
        }
        Ok(())
    }

    /// Bytes to come.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Could what is to come lie in `range`?
    pub(super) fn touches(&self, range: &WindowRange) -> bool {
        self.left > 0
            && self
                .touches
                .is_some_and(|(low, high)| low < range.end && high >= range.start)
    }

    /// What is to be filled, and behind it `behind`.
    pub(super) fn targets(&mut self, behind: RawSlice) -> Targets<'_> {
        self.slices.push(behind);
        Targets(self)
    }

    /// Fills from `bytes` as far as there is something to fill; says how many were taken.
    pub(super) fn copy_from(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices[self.next..] {
            done += slice.copy_from(&bytes[done..]);
            if done == bytes.len() {
                break;
            }
        }
        self.advance(done);
        done
    }

    /// The next `count` bytes are in place.
    pub(super) fn advance(&mut self, mut count: usize) {
        self.left -= count.min(self.left);
        while let Some(slice) = self.slices.get_mut(self.next).filter(|_| count > 0) {
            let front = slice.split_front(count);
            count -= front.len();
            if slice.is_empty() {
                self.next += 1;
            }
            if let Some((crc, _)) = &mut self.crc {
                look_at(front, crc);
            }
        }
    }

    /// All is there: is it what was sent?
    pub(super) fn verify(&mut self) -> Result<(), String> {
        let fits = self
            .crc
            .take()
            .is_none_or(|(crc, expected)| crc.finalize() == expected);
        if fits {
            Ok(())
        } else {
            Err("the checksum of a write does not fit".to_owned())
        }
    }
}

/// Does any byte have two places? What it became would depend on how the stream is cut into reads.
fn overlap(table: &[u8]) -> bool {
    let ranges = || placements(table).map(|place| (place.target, u64::from(place.length)));
    let mut reached = 0;
    let ascending = ranges().all(|(target, length)| {
        let behind = target >= reached;
        reached = target.saturating_add(length);
        behind
    });
    if ascending {
        return false;
    }
    let mut sorted: Vec<_> = ranges().filter(|range| range.1 > 0).collect();
    sorted.sort_unstable();
    !sorted.is_sorted_by(|before, next| before.0.saturating_add(before.1) <= next.0)
}

/// Takes what was placed into the checksum. It is copied out first: no reference may go into a
/// window.
fn look_at(mut placed: RawSlice, crc: &mut crc32fast::Hasher) {
    let mut bytes = [0; LOOK];
    while !placed.is_empty() {
        let count = placed.split_front(LOOK).copy_to(&mut bytes);
        crc.update(&bytes[..count]);
    }
}

/// The targets of one read; the slice behind them is forgotten with this.
pub(super) struct Targets<'a>(&'a mut Placing);

impl Targets<'_> {
    pub(super) fn as_slices(&self) -> &[RawSlice] {
        &self.0.slices[self.0.next..]
    }
}

impl Drop for Targets<'_> {
    fn drop(&mut self) {
        self.0.slices.pop();
    }
}
