//! Accepts connections, learns what each is for, and answers inquiries.
//!
//! A connection gets a thread of its own for the length of its preamble only, and there are few
//! of those: garbage, silence and half-open peers cost one such thread for
//! [`crate::DestinationOptions::preamble_timeout`], and never hold up a guest that is arriving.
//! When there are too many, the one that has been silent for longest goes: a peer that speaks is
//! done in a round trip, however many are silent.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SendError, Sender, SyncSender, TrySendError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use dunlin_lane::{PageReceiver, StreamLane, StreamReceiver};

use super::Visitor;
use super::custody::Ledger;
use crate::error::MigrationError;
use crate::options::CancelToken;
use crate::postcopy::Switchboard;
use crate::protocol::message::{Answer, Message, Ownership};
use crate::protocol::{Kind, Preamble, ProtocolError, Purpose, Token, VERSION};
use crate::transport::{Listener, Transport};
use crate::wire::{Patience, Wire};

/// Connections whose purpose is not known yet, at most.
const MAX_STRANGERS: usize = 16;
/// Threads for them at most, with those that are about to end.
const MAX_THREADS: usize = 4 * MAX_STRANGERS;
/// How long an answer waits for a guest that is being started.
const START_WAIT: Duration = Duration::from_secs(1);
/// How often the thread looks whether it was told to stop.
const SLICE: Duration = Duration::from_millis(50);

pub(super) struct Reception {
    pub(super) listener: Listener,
    pub(super) lanes: LaneDoor,
    /// Where connections of a post-copy go.
    pub(super) switchboard: Switchboard,
    pub(super) ledger: Ledger,
    /// What a connection must be for to be let through.
    pub(super) purpose: Purpose,
    pub(super) visitors: SyncSender<Visitor>,
    pub(super) stop: CancelToken,
    pub(super) settled: CancelToken,
    pub(super) preamble_timeout: Duration,
}

/// A page lane that has come.
struct ArrivingLane {
    number: u16,
    transport: Box<dyn Transport>,
}

/// Where page lanes of the present session come in.
#[derive(Clone, Default)]
pub(super) struct LaneDoor(Arc<Mutex<Option<Opening>>>);

struct Opening {
    token: Token,
    most: u16,
    sender: Sender<ArrivingLane>,
}

/// An open door: lanes come in until it is dropped or they are collected.
pub(super) struct OpenDoor {
    door: LaneDoor,
    lanes: Receiver<ArrivingLane>,
}

impl LaneDoor {
    fn lock(&self) -> MutexGuard<'_, Option<Opening>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets in at most `most` lanes of a session.
    pub(super) fn open(&self, token: Token, most: u16) -> OpenDoor {
        let (sender, lanes) = channel();
        *self.lock() = Some(Opening {
            token,
            most,
            sender,
        });
        OpenDoor {
            door: self.clone(),
            lanes,
        }
    }

    /// May this lane come in? Each number does once.
    fn admit(&self, preamble: &Preamble) -> Option<Sender<ArrivingLane>> {
        let opening = self.lock();
        let opening = opening.as_ref()?;
        let fits = opening.token == preamble.token && preamble.lane < opening.most;
        fits.then(|| opening.sender.clone())
    }
}

impl OpenDoor {
    /// The lanes 0 to `count` - 1.
    pub(super) fn collect(
        self,
        count: u32,
        until: Instant,
    ) -> Result<Vec<Box<dyn PageReceiver>>, MigrationError> {
        let invalid = |reason: String| ProtocolError::invalid(Kind::Lanes, reason);
        let most = self.door.lock().as_ref().map_or(0, |opening| opening.most);
        if count == 0 || count > most.into() {
            let reason = format!("{count} page lanes, 1 to {most} were asked for");
            return Err(invalid(reason).into());
        }
        let mut slots: Vec<Option<Box<dyn Transport>>> = Vec::new();
        slots.resize_with(count as usize, || None);
        while slots.iter().any(Option::is_none) {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(lane) = self.lanes.recv_timeout(left) else {
                return Err(invalid(format!("not all of {count} page lanes came")).into());
            };
            match slots.get_mut(usize::from(lane.number)) {
                Some(slot @ None) => *slot = Some(lane.transport),
                _ => {
                    return Err(
                        invalid(format!("page lane {} is one too many", lane.number)).into(),
                    );
                }
            }
        }
        let lanes = slots.into_iter().flatten();
        Ok(lanes
            .map(|transport| -> Box<dyn PageReceiver> {
                Box::new(StreamReceiver::new(transport, StreamLane::default()))
            })
            .collect())
    }
}

impl Drop for OpenDoor {
    fn drop(&mut self) {
        *self.door.lock() = None;
    }
}

/// What the thread of one connection needs.
struct Desk {
    lanes: LaneDoor,
    switchboard: Switchboard,
    ledger: Ledger,
    purpose: Purpose,
    visitors: SyncSender<Visitor>,
    settled: CancelToken,
    preamble_timeout: Duration,
}

impl Reception {
    pub(super) fn spawn(self) -> Result<JoinHandle<()>, MigrationError> {
        Builder::new()
            .name("migration-door".to_owned())
            .spawn(move || self.run())
            .map_err(|source| MigrationError::Host {
                what: "a thread",
                source,
            })
    }

    fn run(self) {
        let mut strangers = Strangers::default();
        while !self.stop.is_cancelled() && !self.settled.is_cancelled() {
            match self.listener.accept(Instant::now() + SLICE) {
                Ok(Some(transport)) => self.welcome(transport, &mut strangers),
                Ok(None) => {}
                Err(error) => {
                    let error = MigrationError::from(error);
                    tracing::error!(error = %error.chain(), "no more connections are accepted");
                    return self.keep_listening();
                }
            }
        }
    }

    /// Nobody comes in any more, and whoever waits for visitors learns so. The socket stays open
    /// until the hand-over is settled: nobody else is to answer at this address meanwhile.
    fn keep_listening(self) {
        let Self {
            listener,
            visitors,
            stop,
            settled,
            lanes: _,
            switchboard: _,
            ledger: _,
            purpose: _,
            preamble_timeout: _,
        } = self;
        drop(visitors);
        while !stop.is_cancelled() && !settled.is_cancelled() {
            std::thread::sleep(SLICE);
        }
        drop(listener);
    }

    fn welcome(&self, mut transport: Box<dyn Transport>, strangers: &mut Strangers) {
        let Some(stay) = strangers.admit() else {
            tracing::warn!(
                peer = transport.peer(),
                "too many connections, one was closed"
            );
            transport.shutdown(Shutdown::Both);
            return;
        };
        let desk = Desk {
            lanes: self.lanes.clone(),
            switchboard: self.switchboard.clone(),
            ledger: self.ledger.clone(),
            purpose: self.purpose,
            visitors: self.visitors.clone(),
            settled: self.settled.clone(),
            preamble_timeout: self.preamble_timeout,
        };
        let spawned = Builder::new()
            .name("migration-desk".to_owned())
            .spawn(move || {
                let mut wire = Wire::new(transport);
                wire.set_stops(vec![stay.leave.clone()]);
                desk.serve(wire);
                drop(stay);
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a connection");
        }
    }
}

/// Connections whose purpose is not known yet, the oldest first.
#[derive(Default)]
struct Strangers {
    all: VecDeque<Weak<Stay>>,
    threads: Arc<AtomicUsize>,
}

/// One stranger, for as long as its thread runs.
struct Stay {
    /// Make room for another.
    leave: CancelToken,
    threads: Arc<AtomicUsize>,
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.threads.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Strangers {
    /// Room for one more, if need be that of the oldest; none when those that were sent away are
    /// still about to go.
    fn admit(&mut self) -> Option<Arc<Stay>> {
        self.all.retain(|stay| stay.strong_count() > 0);
        if self.threads.load(Ordering::Acquire) >= MAX_THREADS {
            return None;
        }
        if self.all.len() >= MAX_STRANGERS
            && let Some(oldest) = self.all.pop_front().and_then(|stay| stay.upgrade())
        {
            tracing::warn!("too many connections, the oldest was closed");
            oldest.leave.cancel();
        }
        self.threads.fetch_add(1, Ordering::AcqRel);
        let stay = Arc::new(Stay {
            leave: CancelToken::new(),
            threads: Arc::clone(&self.threads),
        });
        self.all.push_back(Arc::downgrade(&stay));
        Some(stay)
    }
}

/// It is known what a connection is for: it need not make room any more.
fn known(mut wire: Wire) -> Wire {
    wire.set_stops(Vec::new());
    wire
}

impl Desk {
    fn serve(&self, mut wire: Wire) {
        let patience = Patience::Until(Instant::now() + self.preamble_timeout);
        let result = match wire.receive_preamble(patience) {
            Ok(preamble) => match preamble.purpose {
                Purpose::Lane => return self.admit(&preamble, known(wire), patience),
                Purpose::PostCopy => return self.connect(&preamble, known(wire), patience),
                purpose if purpose == self.purpose => return self.pass_on(preamble, known(wire)),
                Purpose::Inquiry => self.answer(&preamble, &mut wire),
                Purpose::Move | Purpose::HandOver | Purpose::File => Err(ProtocolError::Preamble {
                    reason: "its purpose is not what is waited for here",
                }
                .into()),
            },
            Err(error) => {
                // Tells a peer of another version which one this is; others ignore it.
                let ours = Preamble::connection(Purpose::Move, Token::from_bytes([0; 16]));
                let told = match &error {
                    MigrationError::Protocol(ProtocolError::Version { .. }) => {
                        wire.send_preamble(&ours, patience)
                    }
                    _ => Ok(()),
                };
                told.and(Err(error))
            }
        };
        if let Err(error) = result {
            tracing::warn!(
                peer = wire.peer(), version = VERSION, error = %error.chain(),
                "a connection to the migration address was refused"
            );
        }
        wire.shutdown();
    }

    fn pass_on(&self, preamble: Preamble, wire: Wire) {
        let visitor = Visitor {
            preamble,
            wire,
            keeper: None,
        };
        match self.visitors.try_send(visitor) {
            Ok(()) => {}
            Err(TrySendError::Full(mut visitor) | TrySendError::Disconnected(mut visitor)) => {
                let patience = Patience::Until(Instant::now() + self.preamble_timeout);
                let told = visitor.wire.send_preamble(&visitor.preamble, patience);
                if told.is_ok() {
                    let reason = "the destination is busy with another guest";
                    visitor.wire.abort(reason.to_owned());
                }
                visitor.wire.shutdown();
            }
        }
    }

    /// Gives a connection of a post-copy to its session.
    fn connect(&self, preamble: &Preamble, wire: Wire, patience: Patience) {
        let peer = wire.peer().to_owned();
        if let Err(error) = self.switchboard.connect(preamble, wire, patience) {
            tracing::warn!(peer, error = %error.chain(), "a connection of a post-copy was refused");
        }
    }

    /// Gives a page lane to the session that waits for it.
    fn admit(&self, preamble: &Preamble, mut wire: Wire, patience: Patience) {
        let Some(session) = self.lanes.admit(preamble) else {
            tracing::warn!(peer = wire.peer(), "a page lane of no session was refused");
            return wire.shutdown();
        };
        if let Err(error) = wire.send_preamble(preamble, patience) {
            tracing::debug!(error = %error.chain(), "a page lane broke off");
            return wire.shutdown();
        }
        let lane = ArrivingLane {
            number: preamble.lane,
            transport: wire.into_transport(),
        };
        // A session that has ended meanwhile needs no lane.
        if let Err(SendError(mut lane)) = session.send(lane) {
            lane.transport.shutdown(Shutdown::Both);
        }
    }

    /// Answers `WhoOwns`, and takes the decision with it: see [`crate::ownership`].
    fn answer(&self, preamble: &Preamble, wire: &mut Wire) -> Result<(), MigrationError> {
        let patience = Patience::Until(Instant::now() + self.preamble_timeout);
        wire.send_preamble(preamble, patience)?;
        let header = wire.receive_header(patience)?;
        if header.kind != Kind::WhoOwns {
            return Err(ProtocolError::Unexpected {
                kind: header.kind,
                state: "waiting for a question",
            }
            .into());
        }
        let body = match wire.receive(patience)? {
            Message::WhoOwns(body) => body,
            other => {
                return Err(ProtocolError::Unexpected {
                    kind: other.kind(),
                    state: "waiting for a question",
                }
                .into());
            }
        };
        let incarnation = <[u8; 16]>::try_from(body.incarnation.as_slice())
            .map_or_else(|_| Token::from_bytes([0; 16]), Token::from_bytes);
        let (answer, running) = self.ledger.ask(preamble.token, incarnation, START_WAIT);
        tracing::info!(token = %preamble.token, ?answer, "the source asked who owns the guest");
        let ownership = Ownership {
            answer: answer as i32,
            running,
        };
        // The ledger may have waited.
        let patience = Patience::Until(Instant::now() + self.preamble_timeout);
        wire.send(&Message::Ownership(ownership), patience)?;
        // A source whose guest's memory is still to follow leaves it open.
        if answer == Answer::Running && matches!(wire.receive(patience), Ok(Message::Settled)) {
            self.settled.cancel();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_been_silent_for_longest_makes_room() {
        let mut strangers = Strangers::default();
        let stays: Vec<_> = (0..MAX_STRANGERS)
            .filter_map(|_| strangers.admit())
            .collect();
        assert!(stays.iter().all(|stay| !stay.leave.is_cancelled()));
        let newcomer = strangers.admit().unwrap();
        let left: Vec<_> = stays.iter().map(|stay| stay.leave.is_cancelled()).collect();
        assert!(left[0] && !left[1..].contains(&true), "{left:?}");
        assert!(!newcomer.leave.is_cancelled());
        drop(stays);
        assert_eq!(strangers.threads.load(Ordering::Acquire), 1);
    }

    #[test]
    fn threads_that_do_not_end_are_bounded() {
        let mut strangers = Strangers::default();
        let stays: Vec<_> = (0..2 * MAX_THREADS)
            .filter_map(|_| strangers.admit())
            .collect();
        assert_eq!(stays.len(), MAX_THREADS);
    }
}
