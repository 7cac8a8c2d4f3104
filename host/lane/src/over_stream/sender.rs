//! The end that writes.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::net::Shutdown;
use std::time::Instant;

use super::header::{HEADER, Header, Kind};
use super::{StreamLane, lane_error};
use crate::page::{
    Buffer, LaneError, LaneTraits, PageSender, Placement, Ticket, Window, WindowRange,
};
use crate::stream::{RawSlice, Transport, TransportError};
use crate::windows::Windows;

/// An operation that the transport has not taken yet, or not as a whole.
#[derive(Debug)]
struct Operation {
    /// The head; of a message the payload, too.
    head: Vec<u8>,
    payload: Payload,
    /// Bytes that the transport has taken.
    sent: usize,
}

#[derive(Debug)]
enum Payload {
    Nothing,
    Buffer(Buffer),
    /// What is left of it.
    Lent(VecDeque<RawSlice>),
}

impl Operation {
    /// Writes as much as the transport takes of it at once, at least one byte. `None`: there is
    /// nothing left to write.
    fn write(
        &mut self,
        transport: &mut dyn Transport,
        deadline: Instant,
    ) -> Result<Option<usize>, TransportError> {
        let of_head = self.sent.min(self.head.len());
        let head = IoSlice::new(&self.head[of_head..]);
        let count = match &mut self.payload {
            Payload::Buffer(buffer) => {
                let rest = IoSlice::new(&buffer.filled()[self.sent - of_head..]);
                if head.is_empty() && rest.is_empty() {
                    return Ok(None);
                }
                transport.write(&[head, rest], deadline)?
            }
            Payload::Nothing | Payload::Lent(_) if !head.is_empty() => {
                transport.write(&[head], deadline)?
            }
            Payload::Lent(slices) if !slices.is_empty() => {
                let count = transport.write_raw(slices.make_contiguous(), deadline)?;
                drop_front(slices, count);
                count
            }
            Payload::Nothing | Payload::Lent(_) => return Ok(None),
        };
        self.sent += count;
        Ok(Some(count))
    }
}

/// The first `count` bytes are done with.
fn drop_front(slices: &mut VecDeque<RawSlice>, mut count: usize) {
    while let Some(first) = slices.front_mut() {
        count -= first.split_front(count).len();
        if !first.is_empty() {
            break;
        }
        slices.pop_front();
    }
}

/// Sends pages and messages over a byte stream.
pub struct StreamSender {
    transport: Box<dyn Transport>,
    traits: LaneTraits,
    /// The buffer used last comes first again: its bytes are still in the cache.
    free: Vec<Buffer>,
    /// Buffers that exist.
    made: usize,
    /// Operations that are posted and not complete, in order.
    backlog: VecDeque<Operation>,
    /// Memory that writes may come from.
    lent: Windows,
    /// The number of the next operation.
    sequence: u64,
    bytes: u64,
    spare: Vec<u8>,
    broken: bool,
}

impl StreamSender {
    /// Takes over a connected stream; its next byte will be the first of a head.
    pub fn new(transport: Box<dyn Transport>, options: StreamLane) -> Self {
        let traits = options.traits(transport.traits());
        Self {
            transport,
            traits,
            free: Vec::new(),
            made: 0,
            backlog: VecDeque::new(),
            lent: Windows::default(),
            sequence: 0,
            bytes: 0,
            spare: Vec::new(),
            broken: false,
        }
    }

    /// Puts an operation into the backlog.
    fn post(&mut self, operation: Operation) -> Ticket {
        let ticket = Ticket(self.sequence);
        self.sequence += 1;
        self.backlog.push_back(operation);
        ticket
    }

    /// Sends from the backlog until at most `keep` operations are in it.
    fn flush(&mut self, keep: usize, deadline: Instant) -> Result<(), LaneError> {
        if self.broken {
            return Err(self.closed());
        }
        while self.backlog.len() > keep
            && let Some(first) = self.backlog.front_mut()
        {
            loop {
                match first.write(&mut *self.transport, deadline) {
                    Ok(Some(count)) => self.bytes += count as u64,
                    Ok(None) => break,
                    Err(error) => {
                        let error = lane_error(error);
                        self.broken = !matches!(error, LaneError::TimedOut { .. });
                        return Err(error);
                    }
                }
            }
            self.retire();
        }
        Ok(())
    }

    /// The first operation of the backlog is complete.
    fn retire(&mut self) {
        if let Some(Operation { head, payload, .. }) = self.backlog.pop_front() {
            self.spare = head;
            if let Payload::Buffer(buffer) = payload {
                self.recycle(buffer);
            }
        }
    }

    /// The checksum of a payload, where there has to be one.
    fn crc(&self, payload: &[u8]) -> Option<u32> {
        (!self.traits.confidential).then(|| crc32fast::hash(payload))
    }

    fn closed(&self) -> LaneError {
        LaneError::Closed {
            peer: self.transport.peer().to_owned(),
        }
    }

    fn too_large(&self, bytes: usize, limit: usize) -> LaneError {
        LaneError::TooLarge {
            peer: self.transport.peer().to_owned(),
            bytes,
            limit,
        }
    }

    /// Could a receiver take this write of `filled` bytes at all?
    fn check(&self, filled: usize, to: &[Placement]) -> Result<(), LaneError> {
        let limit = filled.min(self.traits.buffer_bytes);
        let places = to.iter().map(|to| u64::from(to.length)).sum::<u64>() as usize;
        if places != limit || to.len() > self.traits.placements {
            return Err(self.too_large(places.max(filled), limit));
        }
        let behind_all = |to: &&Placement| to.target.checked_add(to.length.into()).is_none();
        match to.iter().find(behind_all) {
            Some(outside) => Err(self.not_granted(outside)),
            None => Ok(()),
        }
    }

    fn not_granted(&self, outside: &Placement) -> LaneError {
        LaneError::NotGranted {
            peer: self.transport.peer().to_owned(),
            start: outside.target,
            end: outside.target.saturating_add(outside.length.into()),
        }
    }

    /// A head for a payload of so many bytes, which follows it.
    fn head(&mut self, kind: Kind, payload: usize, crc: Option<u32>, to: &[Placement]) -> Vec<u8> {
        let mut head = std::mem::take(&mut self.spare);
        head.clear();
        head.reserve(HEADER);
        let header = Header {
            kind,
            placements: to.len() as u16,
            payload: payload as u32,
            sequence: self.sequence,
            payload_crc: crc,
        };
        header.encode(to, &mut head);
        head
    }
}

impl PageSender for StreamSender {
    fn traits(&self) -> LaneTraits {
        self.traits
    }

    fn peer(&self) -> &str {
        self.transport.peer()
    }

    /// Passed over: a stream registers nothing.
    fn announce(&mut self, _range: WindowRange, _deadline: Instant) -> Result<(), LaneError> {
        Ok(())
    }

    /// A stream's receiver takes a write out of the stream only after it has granted what it
    /// wants to grant, so there is nothing to wait for.
    fn await_grant(&mut self, _range: WindowRange, _deadline: Instant) -> Result<(), LaneError> {
        Ok(())
    }

    fn buffer(&mut self, deadline: Instant) -> Result<Buffer, LaneError> {
        while self.free.is_empty() && self.made == self.traits.buffers && !self.backlog.is_empty() {
            self.flush(self.backlog.len() - 1, deadline)?;
        }
        if let Some(buffer) = self.free.pop() {
            return Ok(buffer);
        }
        if self.made == self.traits.buffers {
            // The caller has all of them: only it can change that.
            return Err(LaneError::TimedOut {
                peer: self.transport.peer().to_owned(),
            });
        }
        self.made += 1;
        let bytes = vec![0; self.traits.buffer_bytes];
        Ok(Buffer::new(self.made - 1, bytes.into_boxed_slice()))
    }

    fn recycle(&mut self, mut buffer: Buffer) {
        buffer.clear();
        self.free.push(buffer);
    }

    fn write(
        &mut self,
        from: Buffer,
        to: &[Placement],
        deadline: Instant,
    ) -> Result<Ticket, LaneError> {
        if let Err(error) = self.check(from.filled().len(), to) {
            self.recycle(from);
            return Err(error);
        }
        let crc = self.crc(from.filled());
        let operation = Operation {
            head: self.head(Kind::Write, from.filled().len(), crc, to),
            payload: Payload::Buffer(from),
            sent: 0,
        };
        let ticket = self.post(operation);
        self.flush(0, deadline)?;
        Ok(ticket)
    }

    /// Payloads with checksums have to stay as they were when the sum was made.
    fn lend(&mut self, window: Window, _deadline: Instant) -> Result<bool, LaneError> {
        if self.traits.confidential {
            self.lent.grant(window);
        }
        Ok(self.traits.confidential)
    }

    fn write_lent(&mut self, places: &[Placement], deadline: Instant) -> Result<Ticket, LaneError> {
        let mut slices = VecDeque::new();
        for place in places {
            let slice = self.lent.resolve(*place);
            slices.push_back(slice.ok_or_else(|| self.not_granted(place))?);
        }
        let bytes = slices.iter().map(RawSlice::len).sum();
        self.check(bytes, places)?;
        let operation = Operation {
            head: self.head(Kind::Write, bytes, None, places),
            payload: Payload::Lent(slices),
            sent: 0,
        };
        let ticket = self.post(operation);
        self.flush(0, deadline)?;
        Ok(ticket)
    }

    fn send(&mut self, message: &[u8], deadline: Instant) -> Result<Ticket, LaneError> {
        if message.len() > self.traits.message_bytes {
            return Err(self.too_large(message.len(), self.traits.message_bytes));
        }
        let crc = self.crc(message);
        let mut head = self.head(Kind::Message, message.len(), crc, &[]);
        head.extend_from_slice(message);
        let ticket = self.post(Operation {
            head,
            payload: Payload::Nothing,
            sent: 0,
        });
        self.flush(0, deadline)?;
        Ok(ticket)
    }

    fn complete(&mut self, ticket: Ticket, deadline: Instant) -> Result<(), LaneError> {
        let later = self.sequence.saturating_sub(ticket.0.saturating_add(1)) as usize;
        self.flush(later, deadline)
    }

    fn bytes_sent(&self) -> u64 {
        self.bytes
    }

    fn close(&mut self) {
        self.transport.shutdown(Shutdown::Write);
    }
}
