//! Frames on their way out of a port.

use std::collections::VecDeque;

/// Frames that a port holds while its other side has no room: about half a megabyte.
const CAPACITY: usize = 512;

/// A bounded queue of frames, each with the lane of the port by which it leaves; the memory of
/// frames that have left is used again.
#[derive(Debug, Default)]
pub(crate) struct FrameQueue {
    frames: VecDeque<(usize, Vec<u8>)>,
    spare: Vec<Vec<u8>>,
}

impl FrameQueue {
    /// False when the queue is full.
    pub(crate) fn push(&mut self, lane: usize, frame: &[u8]) -> bool {
        if self.frames.len() >= CAPACITY {
            return false;
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(frame);
        self.frames.push_back((lane, bytes));
        true
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Lanes and frames, the oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &[u8])> {
        self.frames
            .iter()
            .map(|(lane, bytes)| (*lane, bytes.as_slice()))
    }

    /// Removes the oldest frame; returns its lane and length.
    pub(crate) fn pop(&mut self) -> Option<(usize, usize)> {
        let (lane, bytes) = self.frames.pop_front()?;
        let length = bytes.len();
        self.spare.push(bytes);
        Some((lane, length))
    }
}
