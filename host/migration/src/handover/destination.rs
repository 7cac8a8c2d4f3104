//! The process that the guest is handed to.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PageSet};

use super::{Descriptors, Leftovers, RIGHT, Right};
use crate::destination::custody::Ledger;
use crate::destination::session::check_ram;
use crate::destination::{Destination, Endurance, Host, Received, Visitor, Witness};
use crate::error::MigrationError;
use crate::machine::{DestinationMachine, MachineError};
use crate::options::DestinationOptions;
use crate::pages;
use crate::priority::step_back;
use crate::protocol::message::{Configuration, Prepared, Ready, Running, States};
use crate::protocol::{Kind, Message, ProtocolError, Purpose, Token};
use crate::report::DestinationReport;
use crate::wire::{Patience, Wire};

/// How long mapping memory ahead may take: the old process waits meanwhile, and behind its guest
/// this thread may get little of the processors.
const MAPPING: Duration = Duration::from_secs(8);
/// How long a guest that runs here may be without its leftovers.
const LEFTOVERS_WAIT: Duration = Duration::from_secs(1);

/// A guest that was handed to this process, and runs.
#[derive(Debug)]
pub struct HandOverArrival<M> {
    /// The machine, started.
    pub machine: M,
    /// What was measured.
    pub report: DestinationReport,
    /// What the old process sent after it; none when that died first.
    pub leftovers: Option<Leftovers>,
    /// Answers an old process that asks who owns the guest.
    pub witness: Witness,
}

impl Destination {
    /// Waits until another process of this host has handed its guest over, and the guest runs. The
    /// listener has to be one whose connections carry descriptors.
    ///
    /// `build` makes a machine from what [`crate::SourceMachine::configuration`] said, around the
    /// descriptors that came: RAM under the name [`super::RAM`], the others as
    /// [`super::DepartingMachine::descriptors`] named them. The guest runs in the other process
    /// meanwhile: nothing may touch RAM, not even [`DestinationMachine::restore`], until
    /// [`DestinationMachine::start`].
    ///
    /// # Errors
    /// [`MigrationError`] when the first session did not bring the guest: it stays where it is.
    pub fn accept_hand_over<M: DestinationMachine>(
        self,
        mut build: impl FnMut(&[u8], Descriptors) -> Result<M, MachineError>,
    ) -> Result<HandOverArrival<M>, MigrationError> {
        let receive = |host: &Host<'_>, visitor: &mut Visitor| {
            host.begin(visitor)?;
            let session = Session::begin(host, visitor, &mut build)?;
            session.run()
        };
        let Received {
            guest: (machine, report, leftovers),
            witness,
            failed_sessions: _,
        } = self.welcome(Purpose::HandOver, Endurance::OneSession, receive)?;
        Ok(HandOverArrival {
            machine,
            report,
            leftovers,
            witness,
        })
    }
}

/// Where a session is, once the machine is built.
///
/// ```text
///           SwitchOver             States              Commit
///   Waiting ────────▶ Switching ────────▶ Prepared ───────────▶ (runs)
///      ▲                  │                   │
///      └────── Back ──────┴────── Back ───────┘
/// ```
///
/// Anything else, silence or the end of the stream end the session, and the guest stays where it
/// is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The guest runs in the old process.
    Waiting,
    /// It is paused: the pause's number.
    Switching(u32),
    /// It could run here, and waits for `Commit`.
    Prepared(u32),
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting for the pause",
            Self::Switching(_) => "switching over",
            Self::Prepared(_) => "waiting for the commit",
        }
    }
}

struct Session<'a, M> {
    wire: &'a mut Wire,
    ledger: &'a Ledger,
    options: &'a DestinationOptions,
    token: Token,
    machine: M,
    right: Right,
    stage: Stage,
    last_attempt: u32,
    announced: Instant,
    restore: Duration,
    cpu_at_start: f64,
}

impl<'a, M: DestinationMachine> Session<'a, M> {
    /// Receives what the machine is made of, and builds it.
    fn begin(
        host: &Host<'a>,
        visitor: &'a mut Visitor,
        build: &mut impl FnMut(&[u8], Descriptors) -> Result<M, MachineError>,
    ) -> Result<Self, MigrationError> {
        let cpu_at_start = pages::thread_cpu_seconds();
        let (options, token) = (host.options, visitor.preamble.token);
        let wire = &mut visitor.wire;
        let patience = Patience::Idle(options.idle_timeout);
        let configuration = match wire.receive(patience)? {
            Message::Configuration(configuration) => configuration,
            other => return Err(unexpected(&other, "waiting for the configuration").into()),
        };
        if configuration.ram_bytes > options.max_ram {
            return Err(MigrationError::Refused {
                reason: format!("it has {} bytes of RAM", configuration.ram_bytes),
            });
        }
        let names = match wire.receive(patience)? {
            Message::Descriptors(body) => body.names,
            other => return Err(unexpected(&other, "waiting for descriptors").into()),
        };
        let came = wire.take_descriptors();
        let mut descriptors = Descriptors::pair(Kind::Descriptors, names, came)?;
        let Some(right) = descriptors.take(RIGHT) else {
            let reason = "the right to run the guest did not come with it";
            return Err(ProtocolError::invalid(Kind::Descriptors, reason).into());
        };
        let machine = build_machine(&configuration, descriptors, build)?;
        let incarnation = host.ledger.incarnation().as_bytes().to_vec();
        let ready = Ready {
            incarnation,
            ..Ready::default()
        };
        wire.send(&Message::Ready(ready), patience)?;
        Ok(Self {
            wire,
            ledger: host.ledger,
            options,
            token,
            machine,
            right: Right::adopt(right),
            stage: Stage::Waiting,
            last_attempt: 0,
            announced: Instant::now(),
            restore: Duration::ZERO,
            cpu_at_start,
        })
    }

    /// Takes the guest over. On success it runs here.
    fn run(mut self) -> Result<(M, DestinationReport, Option<Leftovers>), MigrationError> {
        let patience = Patience::Idle(self.options.idle_timeout);
        loop {
            let message = self.wire.receive(patience)?;
            match (message, self.stage) {
                (Message::KeepAlive(body), _) => self.wire.echo(&body, patience)?,
                (Message::Abort(body), _) => {
                    return Err(MigrationError::Peer {
                        reason: body.reason,
                    });
                }
                (Message::SwitchOver(body), Stage::Waiting)
                    if Some(body.attempt) == self.last_attempt.checked_add(1) =>
                {
                    self.last_attempt = body.attempt;
                    self.stage = Stage::Switching(body.attempt);
                    self.announced = Instant::now();
                }
                (Message::States(body), Stage::Switching(attempt)) if body.attempt == attempt => {
                    self.prepare(body)?;
                }
                (Message::Back(body), Stage::Switching(attempt) | Stage::Prepared(attempt))
                    if body.attempt == attempt =>
                {
                    self.stage = Stage::Waiting;
                }
                (Message::Commit(body), Stage::Prepared(attempt)) if body.attempt == attempt => {
                    return self.take_over();
                }
                (message, stage) => return Err(unexpected(&message, stage.name()).into()),
            }
        }
    }

    fn prepare(&mut self, body: States) -> Result<(), MigrationError> {
        if body.hash_wanted {
            let reason = "nothing is copied, so there is nothing to compare";
            return Err(ProtocolError::invalid(Kind::States, reason).into());
        }
        let begun = Instant::now();
        self.machine.restore(body.states)?;
        self.restore = begun.elapsed();
        check_untouched(&self.machine)?;
        self.stage = Stage::Prepared(body.attempt);
        let prepared = Prepared {
            attempt: body.attempt,
            restore_us: self.restore.as_micros() as u64,
            ..Prepared::default()
        };
        let patience = Patience::Idle(self.options.idle_timeout);
        self.wire.send(&Message::Prepared(prepared), patience)
    }

    /// `Commit` came. From the ledger's word on the guest is owned here.
    fn take_over(mut self) -> Result<(M, DestinationReport, Option<Leftovers>), MigrationError> {
        if !self.ledger.commit(self.token) {
            return Err(MigrationError::Refused {
                reason: "the old process took it back before the commit arrived".to_owned(),
            });
        }
        let begun = Instant::now();
        if !self.right.take().map_err(super::host("an eventfd"))? {
            return Err(MigrationError::Refused {
                reason: "the old process took it back before it was started".to_owned(),
            });
        }
        if let Err(error) = self.machine.start() {
            if let Err(error) = self.right.give_back() {
                tracing::error!(%error, "the old process cannot go on with the guest");
            }
            return Err(error.into());
        }
        let report = DestinationReport {
            restore_ms: self.restore.as_secs_f64() * 1e3,
            start_ms: begun.elapsed().as_secs_f64() * 1e3,
            blackout_ms: self.announced.elapsed().as_secs_f64() * 1e3,
            cpu_seconds: pages::thread_cpu_seconds() - self.cpu_at_start,
        };
        let running = Running {
            restore_us: self.restore.as_micros() as u64,
            start_us: (report.start_ms * 1e3) as u64,
            blackout_us: (report.blackout_ms * 1e3) as u64,
            cpu_us: (report.cpu_seconds * 1e6) as u64,
            ..Running::default()
        };
        self.ledger.running(self.token, running.clone());
        self.wire.set_stops(Vec::new());
        let patience = Patience::Idle(self.options.idle_timeout);
        let leftovers = match self.wire.send(&Message::Running(running), patience) {
            Ok(()) => self.await_leftovers(),
            Err(error) => Err(error),
        };
        let leftovers = leftovers.unwrap_or_else(|error| {
            // It will ask, and the witness will answer.
            tracing::warn!(error = %error.chain(), "the old process left nothing behind");
            None
        });
        Ok((self.machine, report, leftovers))
    }

    fn await_leftovers(&mut self) -> Result<Option<Leftovers>, MigrationError> {
        let patience = Patience::Until(Instant::now() + LEFTOVERS_WAIT);
        let body = match self.wire.receive(patience)? {
            Message::Leftovers(body) => body,
            other => return Err(unexpected(&other, "waiting for leftovers").into()),
        };
        let came = self.wire.take_descriptors();
        Ok(Some(Leftovers {
            body: body.body,
            descriptors: Descriptors::pair(Kind::Leftovers, body.names, came)?,
        }))
    }
}

/// Builds the machine and maps the RAM that is in use, so that the guest meets no cold page.
fn build_machine<M: DestinationMachine>(
    configuration: &Configuration,
    descriptors: Descriptors,
    build: &mut impl FnMut(&[u8], Descriptors) -> Result<M, MachineError>,
) -> Result<M, MigrationError> {
    let machine = build(&configuration.machine, descriptors)?;
    check_ram(machine.memory(), configuration)?;
    check_untouched(&machine)?;
    if let Err(error) = map_resident(machine.memory()) {
        // The guest is slower for a while, no more.
        tracing::warn!(%error, "memory is mapped as the guest touches it");
    }
    Ok(machine)
}

/// The guest runs in the old process meanwhile, perhaps on the same processor: what takes the
/// time steps back behind it, on a thread of its own, since priority once given away is gone.
fn map_resident(memory: &Memory) -> io::Result<u64> {
    thread::scope(|scope| {
        let work = || {
            step_back();
            memory.map_resident(Instant::now() + MAPPING)
        };
        let thread = thread::Builder::new().name("map-memory".into());
        let mapped = thread.spawn_scoped(scope, work)?.join();
        mapped.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The guest may run on in the old process at any moment: its memory is not ours yet.
fn check_untouched(machine: &impl DestinationMachine) -> Result<(), MigrationError> {
    let memory = machine.memory();
    let mut written = PageSet::new(memory.pages());
    memory.dirty_log().harvest(&mut written);
    if written.is_empty() {
        return Ok(());
    }
    Err(MigrationError::Refused {
        reason: format!(
            "{} pages of its memory were written before it was given away",
            written.len()
        ),
    })
}

fn unexpected(message: &Message, state: &'static str) -> ProtocolError {
    ProtocolError::Unexpected {
        kind: message.kind(),
        state,
    }
}
