//! Frames over a transport: sequence numbers, checksums, deadlines, and what is left over when a
//! deadline strikes in the middle of a frame.

use std::io::{IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::error::MigrationError;
use crate::options::CancelToken;
use crate::protocol::frame::HEADER_LENGTH;
use crate::protocol::message::{Abort, KeepAlive};
use crate::protocol::{Header, Kind, Message, Preamble, ProtocolError, preamble};
use crate::transport::{Transport, TransportError};

/// How often a wait looks at the stop tokens.
const SLICE: Duration = Duration::from_millis(20);
/// Memory for a payload grows by at most this much ahead of what has arrived.
const GROWTH: usize = 256 << 10;

/// How long to wait for the peer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Patience {
    /// Until this moment, whatever moves.
    Until(Instant),
    /// As long as bytes move; this long when none do.
    Idle(Duration),
}

impl Patience {
    fn deadline(self) -> Instant {
        match self {
            Self::Until(instant) => instant,
            Self::Idle(duration) => Instant::now() + duration,
        }
    }
}

/// One connection, framed in both directions.
pub(crate) struct Wire {
    transport: Box<dyn Transport>,
    stops: Vec<CancelToken>,
    /// Frames begun in each direction.
    sent: u64,
    received: u64,
    bytes_sent: u64,
    bytes_received: u64,
    /// The rest of a frame that a deadline cut: sent before anything else.
    unsent: Vec<u8>,
    /// A frame that has arrived in part.
    header: Option<Header>,
    partial: Vec<u8>,
}

impl Wire {
    pub(crate) fn new(transport: Box<dyn Transport>) -> Self {
        Self {
            transport,
            stops: Vec::new(),
            sent: 0,
            received: 0,
            bytes_sent: 0,
            bytes_received: 0,
            unsent: Vec::new(),
            header: None,
            partial: Vec::new(),
        }
    }

    /// Waits end when one of these tokens is cancelled.
    pub(crate) fn set_stops(&mut self, stops: Vec<CancelToken>) {
        self.stops = stops;
    }

    /// Bytes that the transport has taken.
    pub(crate) fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    pub(crate) fn peer(&self) -> &str {
        self.transport.peer()
    }

    /// Bytes that have arrived.
    pub(crate) fn bytes_received(&self) -> u64 {
        self.bytes_received
    }

    /// Was one of the stop tokens cancelled?
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped()
    }

    /// The transport, when nothing but preambles went over it.
    pub(crate) fn into_transport(self) -> Box<dyn Transport> {
        self.transport
    }

    pub(crate) fn shutdown(&mut self) {
        self.transport.shutdown(Shutdown::Both);
    }

    pub(crate) fn send_preamble(
        &mut self,
        preamble: &Preamble,
        patience: Patience,
    ) -> Result<(), MigrationError> {
        self.write_all(&[&preamble.encode()], patience)
    }

    pub(crate) fn receive_preamble(
        &mut self,
        patience: Patience,
    ) -> Result<Preamble, MigrationError> {
        let mut bytes = [0; preamble::LENGTH];
        self.read_exact(&mut [IoSliceMut::new(&mut bytes)], patience)?;
        Ok(Preamble::decode(&bytes)?)
    }

    /// Sends a control message.
    pub(crate) fn send(
        &mut self,
        message: &Message,
        patience: Patience,
    ) -> Result<(), MigrationError> {
        self.send_frame(message.kind(), &[&message.encode()], patience)
    }

    /// Sends a control message with descriptors, over a stream that carries them.
    pub(crate) fn send_with(
        &mut self,
        message: &Message,
        descriptors: Vec<OwnedFd>,
        patience: Patience,
    ) -> Result<(), MigrationError> {
        self.transport.attach(descriptors)?;
        self.send(message, patience)
    }

    /// The descriptors that came with what was received so far.
    pub(crate) fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        self.transport.detach()
    }

    /// Sends one frame whose payload is the concatenation of `parts`. When the deadline strikes
    /// midway, the rest is kept and goes out before the next frame, or with [`Wire::flush`].
    pub(crate) fn send_frame(
        &mut self,
        kind: Kind,
        parts: &[&[u8]],
        patience: Patience,
    ) -> Result<(), MigrationError> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if length > kind.max_payload() as usize {
            return Err(ProtocolError::Length {
                kind,
                length: length as u64,
                limit: u64::from(kind.max_payload()),
            }
            .into());
        }
        self.flush(patience)?;
        let mut crc = crc32fast::Hasher::new();
        for part in parts {
            crc.update(part);
        }
        let header = Header {
            length: length as u32,
            kind,
            sequence: self.sent,
            payload_crc: crc.finalize(),
        }
        .encode();
        self.sent += 1;
        let mut all: Vec<&[u8]> = Vec::with_capacity(parts.len() + 1);
        all.push(&header);
        all.extend_from_slice(parts);
        self.write_all(&all, patience)
    }

    /// Sends what a deadline left over.
    pub(crate) fn flush(&mut self, patience: Patience) -> Result<(), MigrationError> {
        if self.unsent.is_empty() {
            return Ok(());
        }
        let rest = std::mem::take(&mut self.unsent);
        self.write_all(&[&rest], patience)
    }

    fn write_all(&mut self, parts: &[&[u8]], patience: Patience) -> Result<(), MigrationError> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let mut done = 0;
        let mut deadline = patience.deadline();
        while done < total {
            let slices: Vec<IoSlice<'_>> = rest_of(parts, done).map(IoSlice::new).collect();
            let slice_end = deadline.min(Instant::now() + SLICE);
            match self.transport.write(&slices, slice_end) {
                Ok(count) => {
                    done += count;
                    self.bytes_sent += count as u64;
                    if let Patience::Idle(_) = patience {
                        deadline = patience.deadline();
                    }
                }
                Err(TransportError::TimedOut { .. })
                    if Instant::now() < deadline && !self.stopped() => {}
                Err(error) => {
                    self.unsent.clear();
                    for part in rest_of(parts, done) {
                        self.unsent.extend_from_slice(part);
                    }
                    return Err(self.timed_out_or_stopped(error).into());
                }
            }
        }
        Ok(())
    }

    /// Receives the next control message.
    pub(crate) fn receive(&mut self, patience: Patience) -> Result<Message, MigrationError> {
        let header = self.receive_header(patience)?;
        let payload = self.receive_payload(patience)?;
        Ok(Message::decode(header.kind, &payload)?)
    }

    /// Receives a control message if one has arrived as a whole.
    pub(crate) fn try_receive(&mut self) -> Result<Option<Message>, MigrationError> {
        match self.receive(Patience::Until(Instant::now())) {
            Ok(message) => Ok(Some(message)),
            Err(MigrationError::Transport(TransportError::TimedOut { .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Receives the next frame's header. Its payload has to be received before the next one.
    pub(crate) fn receive_header(&mut self, patience: Patience) -> Result<Header, MigrationError> {
        if let Some(header) = self.header {
            return Ok(header);
        }
        self.fill(HEADER_LENGTH, patience)?;
        let mut bytes = [0; HEADER_LENGTH];
        bytes.copy_from_slice(&self.partial);
        let header = Header::decode(&bytes, self.received)?;
        self.received += 1;
        self.partial.clear();
        self.header = Some(header);
        Ok(header)
    }

    /// Receives and checks the payload of the header that came last.
    pub(crate) fn receive_payload(
        &mut self,
        patience: Patience,
    ) -> Result<Vec<u8>, MigrationError> {
        let Some(header) = self.header else {
            return Ok(Vec::new());
        };
        self.fill(header.length as usize, patience)?;
        let payload = std::mem::take(&mut self.partial);
        self.header = None;
        header.check_payload(crc32fast::hash(&payload))?;
        Ok(payload)
    }

    fn fill(&mut self, target: usize, patience: Patience) -> Result<(), MigrationError> {
        while self.partial.len() < target {
            let have = self.partial.len();
            let mut partial = std::mem::take(&mut self.partial);
            partial.resize(target.min(have + GROWTH), 0);
            let (got, result) = self.read_some(&mut partial[have..], patience);
            partial.truncate(have + got);
            self.partial = partial;
            result?;
        }
        Ok(())
    }

    /// Fills `into` as far as it goes; says how far that was.
    fn read_some(
        &mut self,
        into: &mut [u8],
        patience: Patience,
    ) -> (usize, Result<(), MigrationError>) {
        let mut done = 0;
        while done < into.len() {
            match self.read_once(&mut [IoSliceMut::new(&mut into[done..])], patience) {
                Ok(count) => done += count,
                Err(error) => return (done, Err(error)),
            }
        }
        (done, Ok(()))
    }

    /// Fills all of `into`, or fails.
    pub(crate) fn read_exact(
        &mut self,
        mut into: &mut [IoSliceMut<'_>],
        patience: Patience,
    ) -> Result<(), MigrationError> {
        IoSliceMut::advance_slices(&mut into, 0);
        while !into.is_empty() {
            let count = self.read_once(into, patience)?;
            IoSliceMut::advance_slices(&mut into, count);
        }
        Ok(())
    }

    fn read_once(
        &mut self,
        into: &mut [IoSliceMut<'_>],
        patience: Patience,
    ) -> Result<usize, MigrationError> {
        let deadline = patience.deadline();
        loop {
            let slice_end = deadline.min(Instant::now() + SLICE);
            match self.transport.read(into, slice_end) {
                Ok(count) => {
                    self.bytes_received += count as u64;
                    return Ok(count);
                }
                Err(TransportError::TimedOut { .. })
                    if Instant::now() < deadline && !self.stopped() => {}
                Err(error) => return Err(self.timed_out_or_stopped(error).into()),
            }
        }
    }

    /// Tells the peer why this side gives up, if it can still be told, and ends the stream.
    pub(crate) fn abort(&mut self, reason: String) {
        let patience = Patience::Until(Instant::now() + Duration::from_millis(500));
        self.stops.clear();
        match self.send(&Message::Abort(Abort { reason }), patience) {
            Ok(()) => self.linger(patience.deadline()),
            Err(error) => {
                tracing::debug!(error = %error.chain(), "the peer could not be told of the end");
            }
        }
        self.shutdown();
    }

    /// Discards what still comes until the peer ends the stream: a TCP socket that is closed with
    /// unread bytes resets the connection, and the peer never reads the last words.
    fn linger(&mut self, deadline: Instant) {
        self.transport.shutdown(Shutdown::Write);
        let mut waste = vec![0; 64 << 10];
        while self
            .transport
            .read(&mut [IoSliceMut::new(&mut waste)], deadline)
            .is_ok()
            && Instant::now() < deadline
        {}
    }

    /// Answers a sign of life that asks for an echo.
    pub(crate) fn echo(
        &mut self,
        keep_alive: &KeepAlive,
        patience: Patience,
    ) -> Result<(), MigrationError> {
        if keep_alive.echo == 0 {
            return Ok(());
        }
        let answer = KeepAlive {
            echo: 0,
            number: keep_alive.number,
        };
        self.send(&Message::KeepAlive(answer), patience)
    }

    fn stopped(&self) -> bool {
        self.stops.iter().any(CancelToken::is_cancelled)
    }

    fn timed_out_or_stopped(&self, error: TransportError) -> TransportError {
        match error {
            TransportError::TimedOut { peer } if self.stopped() => TransportError::Stopped { peer },
            error => error,
        }
    }
}

/// What is left of `parts` behind the first `done` bytes.
fn rest_of<'a>(parts: &'a [&'a [u8]], mut done: usize) -> impl Iterator<Item = &'a [u8]> + 'a {
    parts.iter().filter_map(move |part| {
        let skip = done.min(part.len());
        done -= skip;
        (skip < part.len()).then(|| &part[skip..])
    })
}
