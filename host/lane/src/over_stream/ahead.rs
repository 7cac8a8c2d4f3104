//! Bytes that were read before their time.

use std::io::IoSliceMut;
use std::ptr::NonNull;

use super::header::HEADER;
use crate::stream::RawSlice;

/// What is read ahead at most, as long as no head asks for more: enough for a few small messages,
/// and little to copy when it turns out to be payload.
const AHEAD: usize = 4096;

/// The beginning of what comes next.
#[derive(Debug)]
pub(super) struct Ahead {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Ahead {
    /// Has room for a header with a table of `table` bytes.
    pub(super) fn new(table: usize) -> Self {
        Self {
            bytes: vec![0; (HEADER + table).max(AHEAD)].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// What is there.
    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The first `count` bytes are used up.
    pub(super) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }

    /// `count` more bytes have been read into the room.
    pub(super) fn add(&mut self, count: usize) {
        self.end = (self.end + count).min(self.bytes.len());
    }

    /// Room for the bytes that come next, so that `wanted` are there when it is filled.
    pub(super) fn room(&mut self, wanted: usize) -> IoSliceMut<'_> {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let limit = wanted.max(AHEAD).min(self.bytes.len());
        IoSliceMut::new(&mut self.bytes[self.end..limit])
    }

    /// As [`Ahead::room`], for reads by address: to be used before anything else of this.
    pub(super) fn raw_room(&mut self) -> RawSlice {
        let mut room = self.room(0);
        let length = room.len();
        let address = NonNull::from(&mut *room).cast();
        // SAFETY: the memory is a part of ours, and the caller uses the slice before it uses us
        // again, so no reference into it lives meanwhile.
        #[expect(unsafe_code, reason = "one read fills windows and this")]
        unsafe {
            RawSlice::new(address, length)
        }
    }
}
