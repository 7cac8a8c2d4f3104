//! The side that a guest arrives at.

mod custody;
mod reception;
pub(crate) mod session;
pub(crate) mod store;

use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::MigrationError;
use crate::machine::{DestinationMachine, MachineError};
use crate::options::{CancelToken, DestinationOptions};
use crate::protocol::message::Message;
use crate::protocol::{Preamble, Token};
use crate::report::DestinationReport;
use crate::transport::Listener;
use crate::wire::{Patience, Wire};

use custody::Ledger;
use reception::Reception;
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

/// A connection whose preamble announced a move.
struct Visitor {
    preamble: Preamble,
    wire: Wire,
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
        let Self { listener, options } = self;
        let incarnation = Token::random().map_err(|source| MigrationError::Host {
            what: "random numbers",
            source,
        })?;
        let ledger = Ledger::new(incarnation);
        let (visitors, door) = sync_channel(1);
        let stop = CancelToken::new();
        let settled = CancelToken::new();
        let reception = Reception {
            listener,
            ledger: ledger.clone(),
            visitors,
            stop: stop.clone(),
            settled: settled.clone(),
            preamble_timeout: options.preamble_timeout,
        };
        let reception = reception.spawn()?;
        let arrival = wait_for_guest(&door, &ledger, &options, &mut build);
        let (machine, report, wire, failed_sessions) = match arrival {
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
        spawn_farewell(wire, settled.clone(), stop.clone());
        Ok(Arrival {
            machine,
            report,
            witness: Witness {
                settled,
                stop,
                reception,
            },
            failed_sessions,
        })
    }
}

fn wait_for_guest<M: DestinationMachine>(
    door: &Receiver<Visitor>,
    ledger: &Ledger,
    options: &DestinationOptions,
    build: &mut impl FnMut(&[u8]) -> Result<M, MachineError>,
) -> Result<(M, DestinationReport, Wire, u32), MigrationError> {
    let mut failed = 0;
    loop {
        if options.cancel.is_cancelled() {
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
        match receive(&mut visitor, ledger, options, build) {
            Ok((machine, report)) => return Ok((machine, report, visitor.wire, failed)),
            Err(error) => {
                // First the promise, then the words: the source may act on either.
                ledger.relinquish(token);
                failed += 1;
                tracing::warn!(%peer, %token, error = %error.chain(), "an incoming migration failed");
                visitor.wire.abort(error.chain());
            }
        }
    }
}

fn receive<M: DestinationMachine>(
    visitor: &mut Visitor,
    ledger: &Ledger,
    options: &DestinationOptions,
    build: &mut impl FnMut(&[u8]) -> Result<M, MachineError>,
) -> Result<(M, DestinationReport), MigrationError> {
    let wire = &mut visitor.wire;
    let token = visitor.preamble.token;
    wire.send_preamble(&visitor.preamble, Patience::Idle(options.idle_timeout))?;
    let Some(fence) = ledger.offer(token) else {
        return Err(MigrationError::Refused {
            reason: "its session was already over".to_owned(),
        });
    };
    wire.set_stops(vec![options.cancel.clone(), fence]);
    Session::begin(wire, ledger, options, token, build)?.run()
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
