//! Records whose content stays where it lies.

use std::io::IoSlice;
use std::ops::Range;

/// Slices in one write, at most (the kernel takes no more).
const MAX_SLICES: usize = 1024;

/// Records on their way out. Most of their content lies in memory of the caller, where it has been
/// encrypted; what belongs between those pieces is here.
#[derive(Debug, Default)]
pub(super) struct Sealed {
    /// Everything else: headers, tags, and small records as a whole.
    frames: Vec<u8>,
    /// Pieces of the caller's memory, each with the place in `frames` that it comes at.
    pieces: Vec<(usize, Range<usize>)>,
    /// Bytes of all of it that have gone.
    sent: usize,
    length: usize,
    /// Where the pieces' numbering begins in the caller's memory.
    from: usize,
}

impl Sealed {
    /// Begins anew, with what the caller has from its byte `from` on.
    pub(super) fn begin(&mut self, from: usize) {
        self.from = from;
        self.frames.clear();
        self.pieces.clear();
        self.sent = 0;
        self.length = 0;
    }

    /// Where headers, tags and small records go.
    pub(super) fn frames(&mut self) -> &mut Vec<u8> {
        &mut self.frames
    }

    /// Here comes a piece of the caller's memory.
    pub(super) fn piece(&mut self, range: Range<usize>) {
        self.pieces.push((self.frames.len(), range));
    }

    /// All is here.
    pub(super) fn complete(&mut self) {
        let pieces = self.pieces.iter().map(|(_, range)| range.len());
        self.length = self.frames.len() + pieces.sum::<usize>();
    }

    /// So many more bytes have gone.
    pub(super) fn advance(&mut self, count: usize) {
        self.sent += count;
    }

    /// Has all gone?
    pub(super) fn is_gone(&self) -> bool {
        self.sent >= self.length
    }

    /// What is to go next: not all of it, when that is in too many pieces.
    pub(super) fn rest<'a>(&'a self, payload: &'a [u8]) -> Vec<IoSlice<'a>> {
        let mut slices = Vec::with_capacity(MAX_SLICES.min(2 * self.pieces.len() + 1));
        let mut skip = self.sent;
        let mut push = |bytes: &'a [u8]| {
            let from = skip.min(bytes.len());
            skip -= from;
            if from < bytes.len() && slices.len() < MAX_SLICES {
                slices.push(IoSlice::new(&bytes[from..]));
            }
        };
        let mut framed = 0;
        for (at, range) in &self.pieces {
            push(&self.frames[framed..*at]);
            push(&payload[self.from..][range.clone()]);
            framed = *at;
        }
        push(&self.frames[framed..]);
        slices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_has_gone_the_rest_follows() {
        let payload: Vec<u8> = (100..200).collect();
        let mut sealed = Sealed::default();
        sealed.begin(7);
        sealed.frames().extend([1, 2, 3]);
        sealed.piece(0..33);
        sealed.frames().extend([4, 5]);
        sealed.piece(33..92);
        sealed.frames().push(6);
        sealed.complete();
        let whole: Vec<u8> = [1, 2, 3]
            .into_iter()
            .chain(107..140)
            .chain([4, 5])
            .chain(140..199)
            .chain([6])
            .collect();
        for sent in 0..=whole.len() {
            let rest: Vec<u8> = sealed
                .rest(&payload)
                .iter()
                .flat_map(|s| s.to_vec())
                .collect();
            assert_eq!(rest, whole[sent..]);
            assert_eq!(sealed.is_gone(), sent == whole.len());
            sealed.advance(1);
        }
        sealed.begin(0);
        sealed.complete();
        assert!(sealed.is_gone() && sealed.rest(&payload).is_empty());
    }
}
