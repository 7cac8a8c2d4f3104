//! The block device (virtio 1.2, 5.2) over a [`Disk`].
//!
//! Requests are served one after the other by the worker and are finished when they are: nothing is
//! in flight while the device is paused.

mod request;
#[cfg(test)]
mod tests;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dunlin_storage::{Disk, DiskError, SECTOR_SIZE};
use prost::Message;

use self::request::{Kind, Request, Status, ZeroSegment};
use super::log_limit::LogLimit;
use super::{Chain, DeviceConfig, DeviceType, Queue, Queues, RingError, VirtioDevice, Wait};
use crate::component::Reach;

const QUEUE_SIZE: u16 = 256;
/// Requests in a round.
const BATCH: usize = 32;
/// Bytes that are copied between guest and disk at once.
const BUFFER_SIZE: usize = 128 << 10;
/// Most buffers of a request, apart from header and status.
const MAX_SEGMENTS: u32 = 126;
/// Most ranges of a discard or of a request to write zeroes.
const MAX_ZERO_SEGMENTS: u32 = 16;
/// Most sectors in such a range: 1 GiB.
const MAX_ZERO_SECTORS: u32 = 1 << 21;

/// Feature bits of the device (5.2.3).
mod feature {
    pub(super) const SEGMENT_MAX: u64 = 1 << 2;
    pub(super) const READ_ONLY: u64 = 1 << 5;
    pub(super) const BLOCK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// What a block device did since it was made.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Requests that failed.
    pub errors: AtomicU64,
}

/// A disk as the guest sees it.
#[derive(Debug)]
pub struct Block {
    disk: Box<dyn Disk>,
    id: [u8; request::ID_SIZE],
    config: Arc<DeviceConfig>,
    /// The driver said that it flushes; else each write is durable before it completes.
    driver_flushes: bool,
    /// Something may have been written since the last flush.
    unflushed: bool,
    chain: Chain,
    buffer: Vec<u8>,
    counters: Arc<BlockCounters>,
    log_limit: LogLimit,
}

/// Saved state of [`Block`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct BlockState {
    /// Bytes on the disk.
    #[prost(uint64, tag = "1")]
    pub capacity: u64,
    /// Is writing refused?
    #[prost(bool, tag = "2")]
    pub read_only: bool,
}

impl Block {
    /// A device for `disk`. The guest reads `serial`, cut to 20 bytes, as the disk's identity.
    pub fn new(disk: Box<dyn Disk>, serial: &str) -> Self {
        let mut id = [0; request::ID_SIZE];
        for (byte, value) in id.iter_mut().zip(serial.bytes()) {
            *byte = value;
        }
        Self {
            id,
            config: DeviceConfig::new(config_bytes(disk.capacity())),
            disk,
            driver_flushes: false,
            // Whoever had the image before may have left that to this device.
            unflushed: true,
            chain: Chain::default(),
            buffer: vec![0; BUFFER_SIZE],
            counters: Arc::default(),
            log_limit: LogLimit::default(),
        }
    }

    /// What the device did so far; stays readable while the device runs.
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.counters)
    }

    /// Serves the request in `chain`; returns how many bytes were written to it.
    fn serve(&mut self, chain: &Chain, queue: &Queue) -> u32 {
        let memory = queue.memory().mapping();
        let Some(request) = Request::parse(chain, memory) else {
            // Without a header or a place for the status there is no way to answer.
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
            return 0;
        };
        let (status, data) = match self.perform(&request, chain, queue) {
            Ok(data) => (Status::Ok, data),
            Err(status) => {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                (status, 0)
            }
        };
        chain.write(memory, request.status_offset, &[status as u8]);
        data + 1
    }

    /// Does what the request asks for; returns how many bytes of data were written to the chain.
    fn perform(&mut self, request: &Request, chain: &Chain, queue: &Queue) -> Result<u32, Status> {
        match request.kind {
            Kind::Read => self.read(request, chain, queue),
            Kind::Write => self.write(request, chain, queue),
            Kind::Flush => {
                self.counters.flushes.fetch_add(1, Ordering::Relaxed);
                self.flush()
            }
            Kind::Identify => {
                let room = request.writable.min(self.id.len() as u64) as usize;
                let memory = queue.memory().mapping();
                Ok(chain.write(memory, 0, &self.id[..room]) as u32)
            }
            Kind::Discard | Kind::WriteZeroes => {
                let segments = ZeroSegment::parse(request, chain, queue.memory().mapping())?;
                for segment in segments {
                    self.zero(request.kind, segment)?;
                }
                self.written()
            }
            Kind::Unknown => Err(Status::Unsupported),
        }
    }

    fn read(&mut self, request: &Request, chain: &Chain, queue: &Queue) -> Result<u32, Status> {
        let start = request.range(request.writable, self.disk.capacity())?;
        let memory = queue.memory().mapping();
        let mut done = 0;
        while done < request.writable {
            let count = (request.writable - done).min(BUFFER_SIZE as u64) as usize;
            let part = &mut self.buffer[..count];
            let result = self.disk.read(start + done, part);
            chain.write(memory, done, part);
            self.check(result)?;
            done += count as u64;
        }
        let counter = &self.counters.read_bytes;
        counter.fetch_add(done, Ordering::Relaxed);
        Ok(done as u32)
    }

    fn write(&mut self, request: &Request, chain: &Chain, queue: &Queue) -> Result<u32, Status> {
        let start = request.range(request.readable, self.disk.capacity())?;
        let memory = queue.memory().mapping();
        let mut done = 0;
        while done < request.readable {
            let count = (request.readable - done).min(BUFFER_SIZE as u64) as usize;
            let part = &mut self.buffer[..count];
            chain.read(memory, request::HEADER_SIZE + done, part);
            let result = self.disk.write(start + done, part);
            self.unflushed = true;
            self.check(result)?;
            done += count as u64;
        }
        let counter = &self.counters.written_bytes;
        counter.fetch_add(done, Ordering::Relaxed);
        self.written()
    }

    fn zero(&mut self, kind: Kind, segment: ZeroSegment) -> Result<(), Status> {
        let length = u64::from(segment.sectors) * SECTOR_SIZE;
        let start = request::byte_range(segment.sector, length, self.disk.capacity())?;
        self.unflushed = true;
        let result = if kind == Kind::Discard || segment.unmap {
            self.disk.discard(start, length)
        } else {
            self.disk.write_zeroes(start, length)
        };
        self.check(result)
    }

    /// Something was written: durable at once unless the driver flushes by itself.
    fn written(&mut self) -> Result<u32, Status> {
        if self.driver_flushes {
            Ok(0)
        } else {
            self.flush()
        }
    }

    fn flush(&mut self) -> Result<u32, Status> {
        if self.unflushed {
            let result = self.disk.flush();
            self.check(result)?;
            self.unflushed = false;
        }
        Ok(0)
    }

    fn check(&self, result: Result<(), DiskError>) -> Result<(), Status> {
        let Err(error) = result else { return Ok(()) };
        if self.log_limit.allows() {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, cause, "disk request failed");
        }
        Err(Status::Error)
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let always = feature::SEGMENT_MAX | feature::BLOCK_SIZE | feature::FLUSH;
        always
            | if self.disk.is_read_only() {
                feature::READ_ONLY
            } else {
                feature::DISCARD | feature::WRITE_ZEROES
            }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, features: u64) {
        self.driver_flushes = features & feature::FLUSH != 0;
    }

    fn reset(&mut self) {
        self.driver_flushes = false;
    }

    fn process(&mut self, queues: &mut Queues) -> Result<Wait, RingError> {
        let mut chain = std::mem::take(&mut self.chain);
        let mut served = 0;
        let mut wait = Wait::MORE;
        while served < BATCH && !queues.should_yield() {
            let Some(queue) = queues.get(0) else {
                wait = Wait::default();
                break;
            };
            if !queue.pop(&mut chain)? {
                wait = Wait::default();
                break;
            }
            let written = self.serve(&chain, queue);
            queue.push_used(chain.head(), written)?;
            served += 1;
        }
        self.chain = chain;
        queues.signal(0)?;
        Ok(wait)
    }

    fn back_end(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The other side of a move may not see this host's page cache.
    fn pause(&mut self, reach: Reach) {
        if reach == Reach::AnyHost {
            // A failure was logged; the guest's next flush tries again here, or elsewhere cannot
            // know.
            let _ = self.flush();
        }
    }

    fn save(&self) -> Vec<u8> {
        let Self {
            disk,
            id: _,
            config: _,
            driver_flushes: _,
            unflushed: _,
            chain: _,
            buffer: _,
            counters: _,
            log_limit: _,
        } = self;
        let state = BlockState {
            capacity: disk.capacity(),
            read_only: disk.is_read_only(),
        };
        state.encode_to_vec()
    }

    fn restore(&mut self, _features: u64, state: &[u8]) -> Result<(), String> {
        let BlockState {
            capacity,
            read_only,
        } = BlockState::decode(state).map_err(|error| error.to_string())?;
        if capacity != self.disk.capacity() {
            let own = self.disk.capacity();
            return Err(format!("disk has {own} bytes here, {capacity} there"));
        }
        if read_only != self.disk.is_read_only() {
            return Err("disk is read-only on one side only".into());
        }
        Ok(())
    }
}

/// The device's configuration (5.2.4).
fn config_bytes(capacity: u64) -> Vec<u8> {
    let mut bytes = vec![0; 60];
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..offset + value.len()].copy_from_slice(value);
    };
    put(0, &(capacity / SECTOR_SIZE).to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &(SECTOR_SIZE as u32).to_le_bytes());
    // Discard: sectors, ranges, alignment in sectors. Zeroes: sectors, ranges, may unmap.
    put(36, &MAX_ZERO_SECTORS.to_le_bytes());
    put(40, &MAX_ZERO_SEGMENTS.to_le_bytes());
    put(44, &8u32.to_le_bytes());
    put(48, &MAX_ZERO_SECTORS.to_le_bytes());
    put(52, &MAX_ZERO_SEGMENTS.to_le_bytes());
    put(56, &[1]);
    bytes
}
