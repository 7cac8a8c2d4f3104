//! Where the content of records goes.

use crate::stream::RawSlice;

/// Raw slices that are filled one after the other.
pub(super) struct Targets<'a> {
    slices: &'a [RawSlice],
    first: Option<RawSlice>,
    done: usize,
}

impl<'a> Targets<'a> {
    pub(super) fn new(slices: &'a [RawSlice]) -> Self {
        let mut targets = Self {
            slices,
            first: None,
            done: 0,
        };
        targets.next();
        targets
    }

    /// Bytes that have been filled.
    pub(super) fn done(&self) -> usize {
        self.done
    }

    /// Goes on to the next slice that has room.
    fn next(&mut self) {
        while self.first.is_none_or(|first| first.is_empty())
            && let Some((next, rest)) = self.slices.split_first()
        {
            self.first = Some(*next);
            self.slices = rest;
        }
    }

    /// The place that is filled next.
    pub(super) fn room(&self) -> Option<RawSlice> {
        self.first.filter(|first| !first.is_empty())
    }

    /// So many bytes of the room have been filled.
    pub(super) fn filled(&mut self, count: usize) {
        if let Some(first) = &mut self.first {
            self.done += first.split_front(count).len();
        }
        self.next();
    }

    /// Is there no room left?
    pub(super) fn are_full(&self) -> bool {
        self.first.is_none_or(|first| first.is_empty())
    }

    /// Fills from `bytes`; says how many fitted.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> usize {
        let before = self.done;
        while !bytes.is_empty()
            && let Some(first) = &mut self.first
            && !first.is_empty()
        {
            let count = first.split_front(bytes.len()).copy_from(bytes);
            bytes = &bytes[count..];
            self.done += count;
            self.next();
        }
        self.done - before
    }
}
