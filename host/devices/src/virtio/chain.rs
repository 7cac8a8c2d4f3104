//! A descriptor chain, copied out of guest memory and checked, and the bytes that it describes.

use dunlin_guest::GuestAddress;
use dunlin_guest::memory::Mapping;
use vm_memory::Bytes;

/// A part of guest RAM that a descriptor names. It was checked to lie within RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) address: u64,
    pub(super) length: u32,
}

/// Buffers that the driver made available together: first those that the device reads, then
/// those that it writes (virtio 1.2, 2.7.4.2). Reused between requests, so that a request costs
/// no allocation.
#[derive(Debug, Default)]
pub struct Chain {
    pub(super) head: u16,
    pub(super) readable: Vec<Segment>,
    pub(super) writable: Vec<Segment>,
    readable_length: u64,
    writable_length: u64,
}

impl Chain {
    pub(super) fn clear(&mut self, head: u16) {
        let Self {
            head: old_head,
            readable,
            writable,
            readable_length,
            writable_length,
        } = self;
        *old_head = head;
        readable.clear();
        writable.clear();
        *readable_length = 0;
        *writable_length = 0;
    }

    pub(super) fn push_readable(&mut self, segment: Segment) {
        self.readable_length += u64::from(segment.length);
        self.readable.push(segment);
    }

    pub(super) fn push_writable(&mut self, segment: Segment) {
        self.writable_length += u64::from(segment.length);
        self.writable.push(segment);
    }

    /// The index by which the driver knows the chain.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes for the device to read.
    pub fn readable_length(&self) -> u64 {
        self.readable_length
    }

    /// Bytes for the device to write.
    pub fn writable_length(&self) -> u64 {
        self.writable_length
    }

    /// Copies bytes from the readable part, from `offset` on. Returns how many there were.
    pub fn read(&self, memory: &Mapping, offset: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        for (address, length) in pieces(&self.readable, offset, into.len()) {
            let part = &mut into[done..done + length];
            if memory.read_slice(part, GuestAddress(address)).is_err() {
                break;
            }
            done += length;
        }
        done
    }

    /// Copies bytes to the writable part, from `offset` on. Returns how many fitted.
    pub fn write(&self, memory: &Mapping, offset: u64, from: &[u8]) -> usize {
        let mut done = 0;
        for (address, length) in pieces(&self.writable, offset, from.len()) {
            let part = &from[done..done + length];
            if memory.write_slice(part, GuestAddress(address)).is_err() {
                break;
            }
            done += length;
        }
        done
    }
}

/// The pieces of guest memory that hold `length` bytes from `offset` of the segments.
fn pieces(
    segments: &[Segment],
    offset: u64,
    length: usize,
) -> impl Iterator<Item = (u64, usize)> + '_ {
    let mut skip = offset;
    let mut left = length;
    segments.iter().filter_map(move |segment| {
        let size = u64::from(segment.length);
        if skip >= size {
            skip -= size;
            return None;
        }
        let count = (size - skip).min(left as u64) as usize;
        let address = segment.address + skip;
        skip = 0;
        left -= count;
        (count > 0).then_some((address, count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_guest::Memory;

    #[test]
    fn bytes_cross_the_borders_of_segments() {
        let memory = Memory::new(1 << 20).unwrap();
        let mut chain = Chain::default();
        chain.clear(3);
        for (address, length) in [(0x100, 3), (0x200, 1), (0x300, 4)] {
            chain.push_readable(Segment { address, length });
            chain.push_writable(Segment { address, length });
        }
        assert_eq!(chain.write(memory.mapping(), 1, b"abcdefghi"), 7);
        let mut back = [0; 9];
        assert_eq!(chain.read(memory.mapping(), 1, &mut back), 7);
        assert_eq!(&back[..7], b"abcdefg");
        assert_eq!(chain.read(memory.mapping(), 8, &mut back), 0);
        assert_eq!(chain.read(memory.mapping(), u64::MAX, &mut back), 0);
        assert_eq!(chain.writable_length(), 8);
    }
}
