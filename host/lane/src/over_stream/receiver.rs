//! The end that is written to.

use std::io::IoSliceMut;
use std::net::Shutdown;
use std::time::Instant;

use super::ahead::Ahead;
use super::header::{ENTRY, HEADER, Header, Kind};
use super::placing::Placing;
use super::{StreamLane, lane_error};
use crate::page::{LaneError, LaneEvent, LaneTraits, PageReceiver, Window, WindowRange};
use crate::stream::Transport;
use crate::windows::Windows;

/// Steps behind a deadline, none of which has to wait: enough to take what is there already, and
/// few enough to get away from a peer that never stops writing.
const LATE_STEPS: usize = 64;

/// What comes next on the stream.
///
/// ```text
///            ┌─ write ──▶ Write ────┐ all bytes are placed
///  Head ◀────┤                      ├──▶ Head
///            └─ message ▶ Message ──┘ all bytes are here
///
///  any ── damage, a place that was not granted ──▶ Broken
/// ```
#[derive(Debug)]
enum State {
    Head,
    Write,
    Message { filled: usize, crc: Option<u32> },
    Broken(String),
}

/// Receives pages and messages from a byte stream.
pub struct StreamReceiver {
    transport: Box<dyn Transport>,
    traits: LaneTraits,
    windows: Windows,
    ahead: Ahead,
    state: State,
    /// The number that the next operation has to have.
    sequence: u64,
    placing: Placing,
    message: Vec<u8>,
}

impl StreamReceiver {
    /// Takes over a connected stream whose next byte is the first of a head.
    pub fn new(transport: Box<dyn Transport>, options: StreamLane) -> Self {
        let traits = options.traits(transport.traits());
        Self {
            transport,
            traits,
            windows: Windows::default(),
            ahead: Ahead::new(traits.placements * ENTRY),
            state: State::Head,
            sequence: 0,
            placing: Placing::default(),
            message: Vec::new(),
        }
    }

    /// Takes one step: at most one read. True when a message is complete.
    fn step(&mut self, deadline: Instant) -> Result<bool, LaneError> {
        match self.state {
            State::Head => self.head(deadline).map(|()| false),
            State::Write => self.place(deadline).map(|()| false),
            State::Message { filled, crc } => self.fill_message(filled, crc, deadline),
            State::Broken(ref reason) => Err(self.corrupted(reason.clone())),
        }
    }

    fn head(&mut self, deadline: Instant) -> Result<(), LaneError> {
        match self.begin() {
            Ok(None) => Ok(()),
            Ok(Some(wanted)) => {
                let room = self.ahead.room(wanted);
                let read = self.transport.read(&mut [room], deadline);
                self.ahead.add(read.map_err(lane_error)?);
                Ok(())
            }
            Err(reason) => Err(self.broken(reason)),
        }
    }

    /// Begins the operation whose head has been read; otherwise says how many bytes it takes.
    fn begin(&mut self) -> Result<Option<usize>, String> {
        let Some((bytes, rest)) = self.ahead.filled().split_first_chunk::<HEADER>() else {
            return Ok(Some(HEADER));
        };
        let header = self.within_bounds(Header::decode(bytes)?)?;
        let length = HEADER + header.table_bytes();
        let Some(table) = rest.get(..header.table_bytes()) else {
            return Ok(Some(length));
        };
        Header::check_table(bytes, table)?;
        self.state = match header.kind {
            Kind::Write => {
                self.placing.begin(&header, table, &self.windows)?;
                State::Write
            }
            Kind::Message => {
                self.message.clear();
                self.message.resize(header.payload as usize, 0);
                State::Message {
                    filled: 0,
                    crc: header.payload_crc,
                }
            }
        };
        self.ahead.consume(length);
        self.sequence += 1;
        Ok(None)
    }

    /// Refuses what no honest sender says, before anything is allocated or waited for.
    fn within_bounds(&self, header: Header) -> Result<Header, String> {
        let (payload, placements) = match header.kind {
            Kind::Write => (self.traits.buffer_bytes, self.traits.placements),
            Kind::Message => (self.traits.message_bytes, 0),
        };
        if header.payload as usize > payload || usize::from(header.placements) > placements {
            return Err(format!(
                "{:?} of {} bytes in {} places, at most {payload} in {placements} are allowed",
                header.kind, header.payload, header.placements
            ));
        }
        if header.sequence != self.sequence {
            return Err(format!(
                "operation {} came where {} was due",
                header.sequence, self.sequence
            ));
        }
        if header.payload_crc.is_some() == self.traits.confidential {
            return Err("an operation with, or without, a checksum against agreement".to_owned());
        }
        Ok(header)
    }

    fn place(&mut self, deadline: Instant) -> Result<(), LaneError> {
        let taken = self.placing.copy_from(self.ahead.filled());
        self.ahead.consume(taken);
        if self.placing.left() > 0 {
            let targets = self.placing.targets(self.ahead.raw_room());
            let read = self.transport.read_raw(targets.as_slices(), deadline);
            drop(targets);
            let read = read.map_err(lane_error)?;
            self.ahead.add(read.saturating_sub(self.placing.left()));
            self.placing.advance(read.min(self.placing.left()));
        }
        if self.placing.left() == 0 {
            let verified = self.placing.verify();
            verified.map_err(|reason| self.broken(reason))?;
            self.state = State::Head;
        }
        Ok(())
    }

    fn fill_message(
        &mut self,
        filled: usize,
        crc: Option<u32>,
        deadline: Instant,
    ) -> Result<bool, LaneError> {
        let missing = &mut self.message[filled..];
        let here = self.ahead.filled();
        let taken = here.len().min(missing.len());
        let (front, missing) = missing.split_at_mut(taken);
        front.copy_from_slice(&here[..taken]);
        self.ahead.consume(taken);
        let mut filled = filled + taken;
        self.state = State::Message { filled, crc };
        if !missing.is_empty() {
            let wanted = missing.len();
            let into = &mut [IoSliceMut::new(missing), self.ahead.room(0)];
            let read = self.transport.read(into, deadline).map_err(lane_error)?;
            self.ahead.add(read.saturating_sub(wanted));
            filled += read.min(wanted);
            self.state = State::Message { filled, crc };
        }
        if filled < self.message.len() {
            return Ok(false);
        }
        if crc.is_some_and(|expected| crc32fast::hash(&self.message) != expected) {
            return Err(self.broken("the checksum of a message does not fit".to_owned()));
        }
        self.state = State::Head;
        Ok(true)
    }

    fn broken(&mut self, reason: String) -> LaneError {
        let error = self.corrupted(reason.clone());
        self.state = State::Broken(reason);
        error
    }

    fn corrupted(&self, reason: String) -> LaneError {
        LaneError::Corrupted {
            peer: self.transport.peer().to_owned(),
            reason,
        }
    }
}

impl PageReceiver for StreamReceiver {
    fn traits(&self) -> LaneTraits {
        self.traits
    }

    fn peer(&self) -> &str {
        self.transport.peer()
    }

    fn grant(&mut self, window: Window, _deadline: Instant) -> Result<(), LaneError> {
        self.windows.grant(window);
        Ok(())
    }

    fn revoke(&mut self, range: WindowRange) -> Result<(), LaneError> {
        self.windows.revoke(&range);
        if matches!(self.state, State::Write) && self.placing.touches(&range) {
            return Err(self.broken("memory was taken back under a write".to_owned()));
        }
        Ok(())
    }

    fn receive(
        &mut self,
        message: &mut Vec<u8>,
        deadline: Instant,
    ) -> Result<LaneEvent, LaneError> {
        let mut late = 0;
        while late < LATE_STEPS {
            if self.step(deadline)? {
                std::mem::swap(message, &mut self.message);
                return Ok(LaneEvent::Message);
            }
            late += usize::from(Instant::now() >= deadline);
        }
        Err(LaneError::TimedOut {
            peer: self.transport.peer().to_owned(),
        })
    }

    fn close(&mut self) {
        self.transport.shutdown(Shutdown::Both);
    }
}
