//! A request of the driver (virtio 1.2, 5.2.6), checked.

use dunlin_guest::memory::Mapping;
use dunlin_storage::SECTOR_SIZE;

use super::{MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS};
use crate::virtio::Chain;

/// Type, reserved, sector.
pub(super) const HEADER_SIZE: u64 = 16;
/// Bytes of the disk's identity.
pub(super) const ID_SIZE: usize = 20;
/// Most data of a request; it bounds how long a pause waits.
const MAX_DATA: u64 = 64 << 20;
/// Sector, number of sectors, flags.
const ZERO_SEGMENT_SIZE: u64 = 16;
const ZERO_UNMAP: u32 = 1;

/// What the driver reads in the last byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    Error = 1,
    Unsupported = 2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Identify,
    Discard,
    WriteZeroes,
    Unknown,
}

#[derive(Debug)]
pub(super) struct Request {
    pub(super) kind: Kind,
    sector: u64,
    /// Bytes of data after the header.
    pub(super) readable: u64,
    /// Bytes of room before the status.
    pub(super) writable: u64,
    pub(super) status_offset: u64,
}

impl Request {
    /// `None` when the chain has no whole header or no room for the status.
    pub(super) fn parse(chain: &Chain, memory: &Mapping) -> Option<Self> {
        let mut header = [0; HEADER_SIZE as usize];
        if chain.read(memory, 0, &mut header) < header.len() {
            return None;
        }
        let writable = chain.writable_length().checked_sub(1)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let kind = match u32::from_le_bytes([a, b, c, d]) {
            0 => Kind::Read,
            1 => Kind::Write,
            4 => Kind::Flush,
            8 => Kind::Identify,
            11 => Kind::Discard,
            13 => Kind::WriteZeroes,
            _ => Kind::Unknown,
        };
        Some(Self {
            kind,
            sector: u64::from_le_bytes(sector),
            readable: chain.readable_length() - HEADER_SIZE,
            writable,
            status_offset: writable,
        })
    }

    /// The first byte on the disk, if `length` bytes from there are whole sectors on it.
    pub(super) fn range(&self, length: u64, capacity: u64) -> Result<u64, Status> {
        if length > MAX_DATA {
            return Err(Status::Error);
        }
        byte_range(self.sector, length, capacity)
    }
}

/// The first byte of a sector, if `length` bytes from there are whole sectors on the disk.
pub(super) fn byte_range(sector: u64, length: u64, capacity: u64) -> Result<u64, Status> {
    let start = sector.checked_mul(SECTOR_SIZE).ok_or(Status::Error)?;
    let end = start.checked_add(length).ok_or(Status::Error)?;
    if end > capacity || !length.is_multiple_of(SECTOR_SIZE) {
        return Err(Status::Error);
    }
    Ok(start)
}

/// A range to discard or to fill with zeroes.
#[derive(Debug, Clone, Copy)]
pub(super) struct ZeroSegment {
    pub(super) sector: u64,
    pub(super) sectors: u32,
    pub(super) unmap: bool,
}

impl ZeroSegment {
    /// The ranges of a request, all of them checked before any is touched.
    pub(super) fn parse(
        request: &Request,
        chain: &Chain,
        memory: &Mapping,
    ) -> Result<Vec<Self>, Status> {
        let count = request.readable / ZERO_SEGMENT_SIZE;
        let whole = request.readable.is_multiple_of(ZERO_SEGMENT_SIZE);
        if !whole || !(1..=u64::from(MAX_ZERO_SEGMENTS)).contains(&count) {
            return Err(Status::Error);
        }
        let mut segments = Vec::with_capacity(count as usize);
        for index in 0..count {
            let mut bytes = [0; ZERO_SEGMENT_SIZE as usize];
            chain.read(memory, HEADER_SIZE + index * ZERO_SEGMENT_SIZE, &mut bytes);
            let [a, b, c, d, e, f, g, h, i, j, k, l, flags @ ..] = bytes;
            let flags = u32::from_le_bytes(flags);
            let allowed = match request.kind {
                Kind::WriteZeroes => ZERO_UNMAP,
                _ => 0,
            };
            if flags & !allowed != 0 {
                return Err(Status::Unsupported);
            }
            let sectors = u32::from_le_bytes([i, j, k, l]);
            if sectors > MAX_ZERO_SECTORS {
                return Err(Status::Error);
            }
            segments.push(Self {
                sector: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
                sectors,
                unmap: flags & ZERO_UNMAP != 0,
            });
        }
        Ok(segments)
    }
}
