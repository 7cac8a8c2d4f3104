//! The connections of a post-copy: how the source opens them and how they find their session.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dunlin_lane::{StreamLane, StreamReceiver, StreamSender};

use super::inflow::DestinationLinks;
use super::outflow::SourceLinks;
use super::parcel::MAX_MESSAGE;
use crate::error::MigrationError;
use crate::protocol::message::{Gone, Running};
use crate::protocol::{Message, Preamble, ProtocolError, Purpose, Token};
use crate::transport::Connector;
use crate::wire::{Patience, Wire};

/// Events that wait for a session, at most.
const QUEUE: usize = 64;

/// Control, when a generation is not the first; that has the session's own.
const CONTROL: u16 = 0;
const REQUESTS: u16 = 1;
const URGENT: u16 = 2;
const FIRST_BULK: u16 = 3;

/// Number of a set of connections; later ones are greater.
pub(crate) type Generation = u32;

/// Which connection of which generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinkName {
    pub(crate) generation: Generation,
    number: u16,
}

impl LinkName {
    fn preamble(self, token: Token) -> Preamble {
        Preamble {
            body_length: self.generation.into(),
            lane: self.number,
            ..Preamble::connection(Purpose::PostCopy, token)
        }
    }

    fn of(preamble: &Preamble) -> Result<Self, ProtocolError> {
        let generation = u32::try_from(preamble.body_length).ok();
        let generation = generation.ok_or(ProtocolError::Preamble {
            reason: "it names no connection of a post-copy",
        })?;
        let number = preamble.lane;
        Ok(Self { generation, number })
    }

    pub(crate) fn is_control(self) -> bool {
        self.number == CONTROL
    }
}

fn lane() -> StreamLane {
    StreamLane {
        message_bytes: MAX_MESSAGE,
        ..StreamLane::default()
    }
}

/// Opens one connection.
fn open(
    connector: &mut dyn Connector,
    token: Token,
    name: LinkName,
    deadline: Instant,
) -> Result<Wire, MigrationError> {
    let mut wire = Wire::new(connector.connect(deadline)?);
    let patience = Patience::Until(deadline);
    let preamble = name.preamble(token);
    wire.send_preamble(&preamble, patience)?;
    if wire.receive_preamble(patience)? != preamble {
        let reason = "it does not belong to this session";
        return Err(ProtocolError::Preamble { reason }.into());
    }
    Ok(wire)
}

/// Opens a new control connection.
pub(super) fn open_control(
    connector: &mut dyn Connector,
    token: Token,
    generation: Generation,
    deadline: Instant,
) -> Result<Wire, MigrationError> {
    let name = LinkName {
        generation,
        number: CONTROL,
    };
    open(connector, token, name, deadline)
}

/// Opens all connections but control.
pub(crate) fn open_links(
    connector: &mut dyn Connector,
    token: Token,
    generation: Generation,
    bulk_lanes: u16,
    deadline: Instant,
) -> Result<SourceLinks, MigrationError> {
    let mut link = |number| open(connector, token, LinkName { generation, number }, deadline);
    let requests = link(REQUESTS)?;
    let urgent = StreamSender::new(link(URGENT)?.into_transport(), lane());
    let mut bulk: Vec<Box<dyn dunlin_lane::PageSender>> = Vec::new();
    for index in 0..bulk_lanes {
        let wire = link(FIRST_BULK.saturating_add(index))?;
        bulk.push(Box::new(StreamSender::new(wire.into_transport(), lane())));
    }
    Ok(SourceLinks {
        requests,
        urgent: Box::new(urgent),
        bulk,
    })
}

/// Something that a session of a post-copy learns.
pub(crate) enum Event {
    /// A connection has come; its preamble was answered.
    Link(LinkName, Wire),
    /// The flow of pages has changed.
    Changed,
    /// The guest runs, as was said on this connection.
    Started(Wire, Running),
    /// The guest was ended.
    End(String),
    /// The guest did not start, and belongs to the source again.
    Relinquished,
}

/// Connections of one generation that have come.
pub(crate) struct Collection {
    pub(super) generation: Generation,
    bulk_lanes: u16,
    requests: Option<Wire>,
    urgent: Option<Wire>,
    bulk: Vec<Wire>,
}

impl Collection {
    pub(crate) fn new(generation: Generation, bulk_lanes: u16) -> Self {
        Self {
            generation,
            bulk_lanes,
            requests: None,
            urgent: None,
            bulk: Vec::new(),
        }
    }

    /// Adds a connection; one of another generation is closed.
    pub(crate) fn add(&mut self, name: LinkName, mut wire: Wire) {
        if name.generation != self.generation {
            return wire.shutdown();
        }
        match name.number {
            CONTROL => wire.shutdown(),
            REQUESTS => self.requests = Some(wire),
            URGENT => self.urgent = Some(wire),
            _ if self.bulk.len() < usize::from(self.bulk_lanes) => self.bulk.push(wire),
            _ => wire.shutdown(),
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.requests.is_some()
            && self.urgent.is_some()
            && self.bulk.len() == usize::from(self.bulk_lanes)
    }

    /// The connections, when all have come.
    pub(crate) fn into_links(self) -> Option<DestinationLinks> {
        if !self.is_complete() {
            return None;
        }
        let receiver = |wire: Wire| -> Box<dyn dunlin_lane::PageReceiver> {
            Box::new(StreamReceiver::new(wire.into_transport(), lane()))
        };
        Some(DestinationLinks {
            requests: self.requests?,
            urgent: receiver(self.urgent?),
            bulk: self.bulk.into_iter().map(receiver).collect(),
        })
    }
}

/// Waits for all connections of a generation.
pub(crate) fn collect(
    line: &Receiver<Event>,
    generation: Generation,
    bulk_lanes: u16,
    patience: Duration,
) -> Result<DestinationLinks, MigrationError> {
    let deadline = Instant::now() + patience;
    let mut collection = Collection::new(generation, bulk_lanes);
    while !collection.is_complete() {
        let left = deadline.saturating_duration_since(Instant::now());
        match line.recv_timeout(left) {
            Ok(Event::Link(name, wire)) => collection.add(name, wire),
            Ok(_) => {}
            Err(_none) => break,
        }
    }
    collection.into_links().ok_or(MigrationError::Refused {
        reason: "not all connections of a post-copy came".to_owned(),
    })
}

struct Lines {
    open: Option<(Token, SyncSender<Event>)>,
    /// Why there is none any more.
    over: String,
}

/// Leads connections to the session that they belong to. A destination has one at a time.
#[derive(Clone)]
pub(crate) struct Switchboard(Arc<Mutex<Lines>>);

impl std::fmt::Debug for Switchboard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Switchboard")
    }
}

impl Switchboard {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Lines {
            open: None,
            over: "no guest of this session is here".to_owned(),
        })))
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session begins, and ends any other's.
    pub(crate) fn open(&self, token: Token) -> (SyncSender<Event>, Receiver<Event>) {
        let (sender, receiver) = sync_channel(QUEUE);
        self.lines().open = Some((token, sender.clone()));
        (sender, receiver)
    }

    /// A session is over; whoever asks for it is told why.
    pub(crate) fn close(&self, token: Token, reason: &str) {
        let mut lines = self.lines();
        if lines.open.as_ref().is_some_and(|(open, _)| *open == token) {
            lines.open = None;
            reason.clone_into(&mut lines.over);
        }
    }

    /// Answers a connection's preamble and passes it on.
    pub(crate) fn connect(
        &self,
        preamble: &Preamble,
        mut wire: Wire,
        patience: Patience,
    ) -> Result<(), MigrationError> {
        let name = LinkName::of(preamble)?;
        wire.send_preamble(preamble, patience)?;
        let (line, over) = {
            let lines = self.lines();
            let open = lines.open.as_ref();
            let line = open.filter(|(token, _)| *token == preamble.token);
            (line.map(|(_, line)| line.clone()), lines.over.clone())
        };
        let Some(line) = line else {
            if name.is_control() {
                return turn_away(wire, over, patience);
            }
            wire.shutdown();
            return Err(MigrationError::Refused { reason: over });
        };
        let event = match line.try_send(Event::Link(name, wire)) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full(event) | TrySendError::Disconnected(event)) => event,
        };
        if let Event::Link(_, mut wire) = event {
            wire.shutdown();
        }
        Err(MigrationError::Refused {
            reason: "the session takes no more connections".to_owned(),
        })
    }
}

/// Tells a source that its guest is not here.
fn turn_away(mut wire: Wire, reason: String, patience: Patience) -> Result<(), MigrationError> {
    wire.receive(patience)?;
    let told = wire.send(&Message::Gone(Gone { reason }), patience);
    wire.shutdown();
    told
}
