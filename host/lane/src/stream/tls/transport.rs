//! A stream over which TLS runs.

use std::io::{IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::handshake::{Handshake, Need};
use super::records::{HEADER, MAX_RECORD, opened_bytes, room_for, whole};
use super::session::{Landed, Opened, Session};
use super::targets::Targets;
use super::{TlsFailure, TlsIdentity, TlsName};
use crate::stream::{RawSlice, StreamTraits, Transport, TransportError};

/// Bytes of handshake messages that wait for the rest of one, at most.
const HANDSHAKE_ROOM: usize = 64 << 10;
/// Bytes that are sealed in one go: they stay in a second-level cache.
const SEAL: usize = 256 << 10;
/// Bytes of records that are read in one go, where so many come. Fewer would stay in the cache
/// better, but each read lets the kernel wake the sender and send for it: with 128 KiB the receiver
/// was measured to spend nearly twice the time.
const READ: usize = 512 << 10;
/// Records of at least so many bytes are decrypted to where they belong.
const DIRECT: usize = 4 << 10;
/// How long a refused peer may take to hear why.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Records without content in one call, at most.
const MAX_EMPTY: usize = 32;

/// What this side is doing.
enum State {
    Handshake(Handshake),
    Open(Session),
    /// The peer has said that nothing more comes.
    Ended(Session),
    /// Nothing more goes; why, the next caller has still to learn.
    Failed(Option<TlsFailure>),
}

/// TLS over another stream.
pub struct TlsTransport {
    below: Box<dyn Transport>,
    state: State,
    authority: Arc<Path>,
    /// What the peer's certificate has to be valid for; a client's has only to be signed.
    name: Option<TlsName>,
    /// What has been read from below: first `plain`, then records from `start` to `end`.
    incoming: Vec<u8>,
    plain: Range<usize>,
    start: usize,
    end: usize,
    /// Room for what is read: grows when it is filled at once, so that a connection of small
    /// messages stays small.
    appetite: usize,
    /// What has to be written below, from `sent` on.
    outgoing: Vec<u8>,
    sent: usize,
    /// Bytes of the caller that are in `outgoing`, and of which it does not know yet.
    taken: usize,
}

impl TlsTransport {
    /// The side that connects: the peer's certificate has to be valid for `name`.
    ///
    /// # Errors
    /// [`TransportError::Tls`] when the handshake cannot begin.
    pub fn client(
        below: Box<dyn Transport>,
        identity: &TlsIdentity,
        name: TlsName,
    ) -> Result<Self, TransportError> {
        match identity.client(&name) {
            Ok(handshake) => Ok(Self::new(below, handshake, identity, Some(name))),
            Err(error) => Err(tls_error(below.peer(), error.into())),
        }
    }

    /// The side that accepts: the peer has to have a certificate.
    ///
    /// # Errors
    /// [`TransportError::Tls`] when the handshake cannot begin.
    pub fn server(
        below: Box<dyn Transport>,
        identity: &TlsIdentity,
    ) -> Result<Self, TransportError> {
        match identity.server() {
            Ok(handshake) => Ok(Self::new(below, handshake, identity, None)),
            Err(error) => Err(tls_error(below.peer(), error.into())),
        }
    }

    fn new(
        below: Box<dyn Transport>,
        handshake: Handshake,
        identity: &TlsIdentity,
        name: Option<TlsName>,
    ) -> Self {
        Self {
            below,
            state: State::Handshake(handshake),
            authority: Arc::clone(identity.authority()),
            name,
            incoming: vec![0; MAX_RECORD],
            plain: 0..0,
            start: 0,
            end: 0,
            appetite: 2 * MAX_RECORD,
            outgoing: Vec::new(),
            sent: 0,
            taken: 0,
        }
    }

    /// Goes through with the handshake, if it has not been yet.
    ///
    /// # Errors
    /// [`TransportError::Tls`] says why the two sides do not come together;
    /// [`TransportError::TimedOut`] that it may go on in another call.
    pub fn handshake(&mut self, deadline: Instant) -> Result<(), TransportError> {
        while let State::Handshake(handshake) = &mut self.state {
            let mut early = Vec::new();
            let incoming = &mut self.incoming[self.start..self.end];
            let (used, need) = handshake.step(incoming, &mut self.outgoing, &mut early);
            self.start += used;
            self.keep_early(&early);
            let done = match need {
                Ok(Need::Step) => Ok(()),
                Ok(Need::Bytes) => match self.exchange(deadline) {
                    Err(TransportError::Closed { .. }) => Err(TlsFailure::HungUp),
                    result => result.map(Ok)?,
                },
                Ok(Need::Nothing) => {
                    self.flush(deadline)?;
                    self.open()
                }
                Err(failure) => Err(failure),
            };
            done.map_err(|failure| self.part(failure, deadline))?;
        }
        Ok(())
    }

    /// Sends what there is to send, and waits for something to come.
    fn exchange(&mut self, deadline: Instant) -> Result<(), TransportError> {
        self.flush(deadline)?;
        self.read_below(HANDSHAKE_ROOM, deadline)
    }

    /// Keeps what came under the new keys before this side had them.
    fn keep_early(&mut self, early: &[u8]) {
        if early.is_empty() {
            return;
        }
        let mut incoming = self.incoming[self.plain.clone()].to_vec();
        incoming.extend_from_slice(early);
        self.plain = 0..incoming.len();
        incoming.extend_from_slice(&self.incoming[self.start..self.end]);
        self.start = self.plain.end;
        self.end = incoming.len();
        self.incoming = incoming;
    }

    fn open(&mut self) -> Result<(), TlsFailure> {
        if let State::Handshake(handshake) = std::mem::replace(&mut self.state, State::Failed(None))
        {
            self.state = State::Open(handshake.into_session()?);
        }
        Ok(())
    }

    /// Ends a handshake that failed: the peer hears why, if it listens.
    fn part(&mut self, failure: TlsFailure, deadline: Instant) -> TransportError {
        let deadline = deadline.min(Instant::now() + LAST_WORDS);
        let last = std::mem::replace(&mut self.state, State::Failed(None));
        if let State::Handshake(mut handshake) = last {
            // The alert comes first, before what else is here is looked at.
            let incoming = &mut self.incoming[self.start..self.end];
            let _ = handshake.step(incoming, &mut self.outgoing, &mut Vec::new());
        }
        if self.flush(deadline).is_ok() {
            self.below.shutdown(Shutdown::Write);
            // A socket that is closed with unread bytes takes back what it has sent.
            let mut waste = [0; 4096];
            while Instant::now() < deadline
                && self
                    .below
                    .read(&mut [IoSliceMut::new(&mut waste)], deadline)
                    .is_ok()
            {}
        }
        self.below.shutdown(Shutdown::Both);
        self.failed(failure)
    }

    /// Writes what is in `outgoing`.
    fn flush(&mut self, deadline: Instant) -> Result<(), TransportError> {
        while self.sent < self.outgoing.len() {
            let rest = IoSlice::new(&self.outgoing[self.sent..]);
            self.sent += self.below.write(&[rest], deadline)?;
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(())
    }

    /// Reads more behind `end`; there are `limit` bytes at most then.
    fn read_below(&mut self, limit: usize, deadline: Instant) -> Result<(), TransportError> {
        let front = self.plain.len();
        if self.start > front {
            self.incoming.copy_within(self.plain.clone(), 0);
            self.incoming.copy_within(self.start..self.end, front);
            self.plain = 0..front;
            self.end = front + self.end - self.start;
            self.start = front;
        }
        if self.incoming.len() < limit {
            self.incoming.resize(limit, 0);
        }
        if self.end == self.incoming.len() {
            return Err(self.failed(TlsFailure::Damaged));
        }
        let room = IoSliceMut::new(&mut self.incoming[self.end..]);
        self.end += self.below.read(&mut [room], deadline)?;
        if self.end == self.incoming.len() {
            self.appetite = (2 * self.appetite).min(READ + MAX_RECORD);
        }
        Ok(())
    }

    /// Opens the next record that is here as a whole; false when there is none. Data goes to `targets`
    /// at once where it fits, otherwise it is `plain`.
    fn open_record(&mut self, targets: &mut Targets<'_>) -> Result<bool, TlsFailure> {
        let session = match &mut self.state {
            State::Open(session) => session,
            _ => return Ok(false),
        };
        let bytes = &mut self.incoming[self.start..self.end];
        let Some(length) = whole(bytes)? else {
            return Ok(false);
        };
        let record = &mut bytes[..length];
        // What is small is likelier to be followed by something else than to be worth a write by
        // address.
        let room = targets.room().filter(|room| {
            length >= DIRECT && self.plain.is_empty() && room.len() >= opened_bytes(length)
        });
        let opened = match room {
            Some(room) => match session.open_to(record, room)? {
                Landed::There(count) => {
                    targets.filled(count);
                    Opened::Nothing
                }
                Landed::Here(opened) => opened,
            },
            None => session.open(record)?,
        };
        match opened {
            Opened::Data(count) => {
                let content = self.start + HEADER;
                self.plain = content..content + count;
            }
            Opened::Nothing => {}
            Opened::End => {
                if let State::Open(session) =
                    std::mem::replace(&mut self.state, State::Failed(None))
                {
                    self.state = State::Ended(session);
                }
            }
        }
        self.start += length;
        Ok(true)
    }

    /// Reads at least one byte into `into`, and as many as are here.
    fn fill(&mut self, into: &[RawSlice], deadline: Instant) -> Result<usize, TransportError> {
        self.handshake(deadline)?;
        // What a deadline held back may be what the peer is waiting for.
        match self.flush(Instant::now()) {
            Ok(()) | Err(TransportError::TimedOut { .. }) => {}
            Err(TransportError::Closed { .. }) => {
                // Nothing goes any more; what the peer said before can still be read.
                self.outgoing.clear();
                self.sent = 0;
                self.taken = 0;
            }
            Err(error) => return Err(error),
        }
        let mut targets = Targets::new(into);
        let mut empty = 0;
        loop {
            let count = targets.take(&self.incoming[self.plain.clone()]);
            self.plain.start += count;
            if !self.plain.is_empty() || targets.are_full() {
                return Ok(targets.done());
            }
            let before = targets.done();
            match self.open_record(&mut targets) {
                Ok(true) => {
                    empty += usize::from(self.plain.is_empty() && targets.done() == before);
                    if empty > MAX_EMPTY {
                        return Err(self.failed(TlsFailure::Damaged));
                    }
                }
                Ok(false) if targets.done() > 0 => return Ok(targets.done()),
                Ok(false) => self.wait_for_record(deadline)?,
                Err(failure) if targets.done() > 0 => {
                    self.state = State::Failed(Some(failure));
                    return Ok(targets.done());
                }
                Err(failure) => return Err(self.failed(failure)),
            }
        }
    }

    fn wait_for_record(&mut self, deadline: Instant) -> Result<(), TransportError> {
        match &mut self.state {
            State::Open(_) => self.read_below(self.appetite, deadline),
            State::Handshake(_) | State::Ended(_) | State::Failed(_) => Err(self.over()),
        }
    }

    /// Why nothing more comes or goes.
    fn over(&mut self) -> TransportError {
        if let State::Failed(failure) = &mut self.state
            && let Some(failure) = failure.take()
        {
            return self.failed(failure);
        }
        TransportError::Closed {
            peer: self.peer().to_owned(),
        }
    }

    fn failed(&mut self, failure: TlsFailure) -> TransportError {
        self.state = State::Failed(None);
        let failure = failure.explained(&self.authority, self.name.as_ref());
        tls_error(self.below.peer(), failure)
    }
}

fn tls_error(peer: &str, source: TlsFailure) -> TransportError {
    TransportError::Tls {
        peer: peer.to_owned(),
        source,
    }
}

impl Transport for TlsTransport {
    fn traits(&self) -> StreamTraits {
        StreamTraits {
            name: "tls",
            confidential: true,
        }
    }

    fn read(
        &mut self,
        into: &mut [IoSliceMut<'_>],
        deadline: Instant,
    ) -> Result<usize, TransportError> {
        let slices: Vec<_> = into
            .iter_mut()
            .map(|slice| {
                // SAFETY: the memory is borrowed for as long as this call, and nothing else is
                // done with the borrow meanwhile.
                #[expect(unsafe_code, reason = "all reads go by address")]
                unsafe {
                    RawSlice::new(NonNull::from(&mut **slice).cast(), slice.len())
                }
            })
            .collect();
        self.fill(&slices, deadline)
    }

    fn read_raw(&mut self, into: &[RawSlice], deadline: Instant) -> Result<usize, TransportError> {
        self.fill(into, deadline)
    }

    fn write(&mut self, from: &[IoSlice<'_>], deadline: Instant) -> Result<usize, TransportError> {
        self.write_sealed(deadline, |session, to| {
            let offered = from.iter().map(|slice| slice.len()).sum();
            to.reserve(room_for(SEAL.min(offered)));
            session.seal(&mut from.to_vec(), SEAL, to)
        })
    }

    fn write_raw(&mut self, from: &[RawSlice], deadline: Instant) -> Result<usize, TransportError> {
        self.write_sealed(deadline, |session, to| {
            to.reserve(room_for(SEAL));
            session.seal_raw(from, SEAL, to)
        })
    }

    fn shutdown(&mut self, how: Shutdown) {
        if how != Shutdown::Read
            && let State::Open(session) | State::Ended(session) = &mut self.state
            && session.seal_end(&mut self.outgoing).is_ok()
        {
            // As far as it goes without waiting: the end of the stream says the same.
            let _ = self.flush(Instant::now());
        }
        self.below.shutdown(how);
    }

    fn peer(&self) -> &str {
        self.below.peer()
    }
}

impl TlsTransport {
    /// Writes what `seal` makes of the caller's bytes; says how many of them that were.
    fn write_sealed(
        &mut self,
        deadline: Instant,
        seal: impl FnOnce(&mut Session, &mut Vec<u8>) -> Result<usize, TlsFailure>,
    ) -> Result<usize, TransportError> {
        self.handshake(deadline)?;
        if self.taken == 0 {
            self.flush(deadline)?;
            let session = match &mut self.state {
                State::Open(session) | State::Ended(session) => session,
                State::Handshake(_) | State::Failed(_) => return Err(self.over()),
            };
            match seal(session, &mut self.outgoing) {
                Ok(taken) => self.taken = taken,
                Err(failure) => return Err(self.failed(failure)),
            }
        }
        match self.flush(deadline) {
            Ok(()) => Ok(std::mem::take(&mut self.taken)),
            Err(TransportError::Closed { peer }) => Err(self.last_words(peer)),
            Err(error) => Err(error),
        }
    }

    /// The peer hung up: if it has said why, that is the error.
    fn last_words(&mut self, peer: String) -> TransportError {
        let deadline = Instant::now();
        let mut records = 0;
        while records <= MAX_EMPTY && self.plain.is_empty() && matches!(self.state, State::Open(_))
        {
            match self.open_record(&mut Targets::new(&[])) {
                Ok(true) => records += 1,
                Ok(false) => match self.read_below(self.appetite, deadline) {
                    Ok(()) => {}
                    Err(_) => break,
                },
                Err(failure) => return self.failed(failure),
            }
        }
        TransportError::Closed { peer }
    }
}
