//! Accepts connections, learns what each is for, and answers inquiries.
//!
//! A connection gets a thread of its own for the length of its preamble only, and there are few
//! of those: garbage, silence and half-open peers cost one such thread for
//! [`crate::DestinationOptions::preamble_timeout`], and never hold up a guest that is arriving.

use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::Visitor;
use super::custody::Ledger;
use crate::error::MigrationError;
use crate::options::CancelToken;
use crate::protocol::message::{Answer, Message, Ownership};
use crate::protocol::{Preamble, ProtocolError, Purpose, Token, VERSION};
use crate::transport::{Listener, Transport};
use crate::wire::{Patience, Wire};

/// Connections whose purpose is not known yet, at most.
const MAX_STRANGERS: usize = 16;
/// How long an answer waits for a guest that is being started.
const START_WAIT: Duration = Duration::from_secs(1);
/// How often the thread looks whether it was told to stop.
const SLICE: Duration = Duration::from_millis(50);

pub(super) struct Reception {
    pub(super) listener: Listener,
    pub(super) ledger: Ledger,
    /// What a connection must be for to be let through.
    pub(super) purpose: Purpose,
    pub(super) visitors: SyncSender<Visitor>,
    pub(super) stop: CancelToken,
    pub(super) settled: CancelToken,
    pub(super) preamble_timeout: Duration,
}

/// What the thread of one connection needs.
struct Desk {
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
        let strangers = Arc::new(AtomicUsize::new(0));
        while !self.stop.is_cancelled() && !self.settled.is_cancelled() {
            match self.listener.accept(Instant::now() + SLICE) {
                Ok(Some(transport)) => self.welcome(transport, &strangers),
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
    /// until the hand-over is settled: a source on this machine takes a refused connection as
    /// proof that this process is dead, and would run the guest a second time.
    fn keep_listening(self) {
        let Self {
            listener,
            visitors,
            stop,
            settled,
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

    fn welcome(&self, mut transport: Box<dyn Transport>, strangers: &Arc<AtomicUsize>) {
        if strangers.fetch_add(1, Ordering::AcqRel) >= MAX_STRANGERS {
            strangers.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(
                peer = transport.peer(),
                "too many connections, one was closed"
            );
            transport.shutdown(Shutdown::Both);
            return;
        }
        let desk = Desk {
            ledger: self.ledger.clone(),
            purpose: self.purpose,
            visitors: self.visitors.clone(),
            settled: self.settled.clone(),
            preamble_timeout: self.preamble_timeout,
        };
        let count = Arc::clone(strangers);
        let spawned = Builder::new()
            .name("migration-desk".to_owned())
            .spawn(move || {
                desk.serve(Wire::new(transport));
                count.fetch_sub(1, Ordering::AcqRel);
            });
        if let Err(error) = spawned {
            strangers.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "no thread for a connection");
        }
    }
}

impl Desk {
    fn serve(&self, mut wire: Wire) {
        let patience = Patience::Until(Instant::now() + self.preamble_timeout);
        let result = match wire.receive_preamble(patience) {
            Ok(preamble) => match preamble.purpose {
                purpose if purpose == self.purpose => return self.pass_on(preamble, wire),
                Purpose::Inquiry => self.answer(&preamble, &mut wire),
                Purpose::Move | Purpose::HandOver | Purpose::File => Err(ProtocolError::Preamble {
                    reason: "its purpose is not what is waited for here",
                }
                .into()),
            },
            Err(error) => {
                // Tells a peer of another version which one this is; others ignore it.
                let ours = Preamble {
                    purpose: Purpose::Move,
                    token: Token::from_bytes([0; 16]),
                    body_length: 0,
                };
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
        match self.visitors.try_send(Visitor { preamble, wire }) {
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

    /// Answers `WhoOwns`, and takes the decision with it: see [`crate::ownership`].
    fn answer(&self, preamble: &Preamble, wire: &mut Wire) -> Result<(), MigrationError> {
        let patience = Patience::Idle(self.preamble_timeout);
        wire.send_preamble(preamble, patience)?;
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
        wire.send(&Message::Ownership(ownership), patience)?;
        if answer == Answer::Running && matches!(wire.receive(patience)?, Message::Settled) {
            self.settled.cancel();
        }
        Ok(())
    }
}
