//! The side that a guest arrives at.

pub(crate) mod custody;
mod inventory;
mod lanes;
mod missing;
mod preparing;
mod reception;
pub(crate) mod session;

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::MigrationError;
use crate::machine::{DestinationMachine, MachineError};
use crate::options::{CancelToken, DestinationOptions};
use crate::postcopy::{Event, Following, Switchboard};
use crate::protocol::message::{Message, Running};
use crate::protocol::{Preamble, Purpose, Token};
use crate::report::DestinationReport;
use crate::transport::Listener;
use crate::wire::{Patience, Wire};

use custody::Ledger;
use reception::{LaneDoor, Reception};
use session::Session;
pub use session::Stage;

/// How often the wait for a connection looks at the cancel token.
const SLICE: Duration = Duration::from_millis(50);
/// How long the witness waits for `Settled` before it looks whether it was told to stop.
const SETTLED_WAIT: Duration = Duration::from_secs(60);

/// Waits for a guest.
#[derive(Debug)]
pub struct Destination {
    listener: Listener,
    options: DestinationOptions,
}

/// A guest that has arrived, and runs.
#[derive(Debug)]
pub struct Arrival<M> {
    /// The machine, started.
    pub machine: M,
    /// What was measured.
    pub report: DestinationReport,
    /// Answers a source that asks who owns the guest.
    pub witness: Witness,
    /// The rest of the guest's memory, when that follows it. The machine must not be saved, and
    /// its memory not be read past the processor (by its file), before all of it is here.
    pub following: Option<Following>,
    /// Sessions that failed before this one.
    pub failed_sessions: u32,
}

/// Answers a source that lost the connection at the hand-over, on threads of its own, until
/// the source has said that it knows. It keeps the listening socket for that time. Dropping the
/// witness leaves the threads to their work, which is what a VM process wants: it is the socket
/// that tells the source that this process is alive.
#[derive(Debug)]
pub struct Witness {
    settled: CancelToken,
    stop: CancelToken,
    reception: JoinHandle<()>,
}

impl Witness {
    /// Does the source know that the guest runs here?
    pub fn is_settled(&self) -> bool {
        self.settled.is_cancelled()
    }

    /// Waits until the source knows.
    pub fn wait(self) {
        if self.reception.join().is_err() {
            tracing::error!("the thread that answers the source panicked");
        }
    }

    /// Answers no more, although the source may not know yet: its guest may then stay in doubt.
    pub fn stop(self) {
        self.stop.cancel();
        self.wait();
    }
}

/// A connection whose preamble announced what is waited for.
pub(crate) struct Visitor {
    pub(crate) preamble: Preamble,
    pub(crate) wire: Wire,
    /// Who keeps the connection after the guest was started, when its memory follows it.
    pub(crate) keeper: Option<(SyncSender<Event>, Running)>,
}

impl Destination {
    /// A destination that is reached through `listener`.
    pub fn new(listener: Listener, options: DestinationOptions) -> Self {
        Self { listener, options }
    }

    /// Waits until a guest has arrived and runs. `build` makes an empty machine from what
    /// [`crate::SourceMachine::configuration`] said; it is called once for each attempt, and the
    /// machine of a failed attempt is dropped. No vCPU, device or loader may touch the machine's
    /// RAM before [`DestinationMachine::restore`].
    ///
    /// Whatever a connection says, the wait goes on until one completes.
    ///
    /// # Errors
    /// [`MigrationError::Cancelled`] when the token of the options was cancelled;
    /// [`MigrationError::Host`] when there are no random numbers or no threads.
    pub fn accept<M: DestinationMachine>(
        self,
        mut build: impl FnMut(&[u8]) -> Result<M, MachineError>,
    ) -> Result<Arrival<M>, MigrationError> {
        let received = self.welcome(
            Purpose::Move,
            Endurance::UntilOneArrives,
            |guest, visitor| guest.receive(visitor, &mut build),
        )?;
        let Received {
            guest: (machine, report, following),
            witness,
            failed_sessions,
        } = received;
        Ok(Arrival {
            machine,
            report,
            witness,
            following,
            failed_sessions,
        })
    }

    /// Waits until a session of that purpose has brought a guest, which `session` receives.
    pub(crate) fn welcome<G>(
        self,
        purpose: Purpose,
        endurance: Endurance,
        mut session: impl FnMut(&Host<'_>, &mut Visitor) -> Result<G, MigrationError>,
    ) -> Result<Received<G>, MigrationError> {
        let Self { listener, options } = self;
        let incarnation = Token::random().map_err(|source| MigrationError::Host {
            what: "random numbers",
            source,
        })?;
        let ledger = Ledger::new(incarnation);
        let (visitors, door) = sync_channel(1);
        let stop = CancelToken::new();
        let settled = CancelToken::new();
        let lanes = LaneDoor::default();
        let switchboard = Switchboard::new();
        let reception = Reception {
            listener,
            lanes: lanes.clone(),
            switchboard: switchboard.clone(),
            ledger: ledger.clone(),
            purpose,
            visitors,
            stop: stop.clone(),
            settled: settled.clone(),
            preamble_timeout: options.preamble_timeout,
        };
        let reception = reception.spawn()?;
        let host = Host {
            ledger: &ledger,
            lanes: &lanes,
            switchboard: &switchboard,
            settled: &settled,
            options: &options,
        };
        let (guest, visitor, failed_sessions) =
            match host.wait_for_guest(&door, endurance, &mut session) {
                Ok(arrival) => arrival,
                Err(error) => {
                    stop.cancel();
                    if reception.join().is_err() {
                        tracing::error!("the thread that accepts connections panicked");
                    }
                    return Err(error);
                }
            };
        drop(door);
        match visitor.keeper {
            // A keeper that is gone has settled all.
            Some((keeper, running)) => {
                let _gone = keeper.send(Event::Started(visitor.wire, running));
            }
            None => spawn_farewell(visitor.wire, settled.clone(), stop.clone()),
        }
        Ok(Received {
            guest,
            witness: Witness {
                settled,
                stop,
                reception,
            },
            failed_sessions,
        })
    }
}

/// How long a destination waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endurance {
    /// Until a guest has arrived, however many sessions fail before.
    UntilOneArrives,
    /// For one session.
    OneSession,
}

/// A guest that has arrived by whatever session.
pub(crate) struct Received<G> {
    pub(crate) guest: G,
    pub(crate) witness: Witness,
    pub(crate) failed_sessions: u32,
}

/// What sessions share.
pub(crate) struct Host<'a> {
    pub(crate) ledger: &'a Ledger,
    lanes: &'a LaneDoor,
    switchboard: &'a Switchboard,
    settled: &'a CancelToken,
    pub(crate) options: &'a DestinationOptions,
}

impl Host<'_> {
    fn wait_for_guest<G>(
        &self,
        door: &Receiver<Visitor>,
        endurance: Endurance,
        session: &mut impl FnMut(&Self, &mut Visitor) -> Result<G, MigrationError>,
    ) -> Result<(G, Visitor, u32), MigrationError> {
        let mut failed = 0;
        loop {
            if self.options.cancel.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            let mut visitor = match door.recv_timeout(SLICE) {
                Ok(visitor) => visitor,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(MigrationError::Refused {
                        reason: "the listening socket failed".to_owned(),
                    });
                }
            };
            let token = visitor.preamble.token;
            let peer = visitor.wire.peer().to_owned();
            match session(self, &mut visitor) {
                Ok(guest) => return Ok((guest, visitor, failed)),
                Err(error) => {
                    // First the promise, then the words: the source may act on either.
                    self.ledger.relinquish(token);
                    failed += 1;
                    tracing::warn!(%peer, %token, error = %error.chain(), "an incoming migration failed");
                    visitor.wire.abort(error.chain());
                    if endurance == Endurance::OneSession {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Answers the preamble; the guest is offered from now on.
    pub(crate) fn begin(&self, visitor: &mut Visitor) -> Result<(), MigrationError> {
        let wire = &mut visitor.wire;
        let patience = Patience::Idle(self.options.idle_timeout);
        wire.send_preamble(&visitor.preamble, patience)?;
        let Some(fence) = self.ledger.offer(visitor.preamble.token) else {
            return Err(MigrationError::Refused {
                reason: "its session was already over".to_owned(),
            });
        };
        wire.set_stops(vec![self.options.cancel.clone(), fence]);
        Ok(())
    }

    fn receive<M: DestinationMachine>(
        &self,
        visitor: &mut Visitor,
        build: &mut impl FnMut(&[u8]) -> Result<M, MachineError>,
    ) -> Result<(M, DestinationReport, Option<Following>), MigrationError> {
        self.begin(visitor)?;
        let token = visitor.preamble.token;
        let came = Session::begin(&mut visitor.wire, self, token, build)?.run()?;
        let following = came.following.map(|(following, running)| {
            visitor.keeper = Some((following.events(), running));
            following
        });
        Ok((came.machine, came.report, following))
    }
}

/// Waits on a thread of its own until the source says `Settled` on the session's connection.
/// When it does not, an inquiry will bring it.
fn spawn_farewell(mut wire: Wire, settled: CancelToken, stop: CancelToken) {
    let work = move || {
        wire.set_stops(vec![stop, settled.clone()]);
        loop {
            match wire.receive(Patience::Idle(SETTLED_WAIT)) {
                Ok(Message::Settled) => {
                    settled.cancel();
                    break;
                }
                Ok(Message::KeepAlive(_)) => {}
                Ok(_) | Err(_) => break,
            }
        }
        wire.shutdown();
    };
    let spawned = std::thread::Builder::new()
        .name("migration-end".to_owned())
        .spawn(work);
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread to wait for the end of the migration");
    }
}
