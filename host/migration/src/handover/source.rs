//! The process that has the guest.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{
    DepartingMachine, Descriptors, Guest, HandOverFailure, HandOverOptions, HandOverReport,
    Leftovers, RAM, STARTED, host, ms,
};
use crate::error::MigrationError;
use crate::machine::MachineError;
use crate::options::CancelToken;
use crate::ownership::Doubt;
use crate::protocol::message::{
    Attempt as Number, Configuration, Descriptors as DescriptorsBody, Leftovers as LeftoversBody,
    Prepared, Running, States,
};
use crate::protocol::{Kind, Message, Preamble, ProtocolError, Purpose, Token};
use crate::report::{DestinationReport, Outcome, SwitchOverReport};
use crate::source::Verdict;
use crate::source::opening::regions_of;
use crate::transport::{Connector, TransportError};
use crate::wire::{Patience, Wire};

/// How long `Running` may take at most before the source asks by another connection.
const RUNNING_WAIT: Duration = Duration::from_secs(2);
/// How long the last words may take.
const FAREWELL: Duration = Duration::from_millis(500);

/// How an attempt ended, unless by an error.
enum End {
    HandedOver,
    InDoubt(Doubt),
    Gone,
}

/// What became of a pause.
enum Pass {
    Prepared(Prepared, SwitchOverReport),
    Missed,
}

/// A hand-over under way.
struct Session<'a> {
    options: &'a HandOverOptions,
    cancel: CancelToken,
    wire: Wire,
    doubt: Doubt,
    /// Holds a byte once the new process was about to start the guest.
    mark: UnixStream,
    /// Is the guest stopped?
    paused: bool,
    /// Number of the pause, from 1.
    number: u32,
    started: Instant,
    report: HandOverReport,
}

/// Hands the guest of `machine` to the process that `connector` reaches, over a stream that
/// carries descriptors.
///
/// On success the guest runs there, and `machine` is paused and must be dropped.
///
/// # Errors
/// [`HandOverFailure`], which says where the guest is.
pub fn hand_over(
    machine: &mut dyn DepartingMachine,
    connector: &mut dyn Connector,
    options: &HandOverOptions,
    cancel: CancelToken,
) -> Result<HandOverReport, Box<HandOverFailure>> {
    let started = Instant::now();
    let mut report = HandOverReport {
        ram_bytes: machine.memory().size(),
        ..HandOverReport::default()
    };
    let greeted = greet(machine, connector, options, &cancel, &mut report);
    report.built_ms = ms(started.elapsed());
    let (wire, doubt, mark) = match greeted {
        Ok(greeted) => greeted,
        Err(error) => {
            report.total_ms = report.built_ms;
            return Err(failure(error, Guest::RunsHere, report));
        }
    };
    let mut session = Session {
        options,
        cancel,
        wire,
        doubt,
        mark,
        paused: false,
        number: 0,
        started,
        report,
    };
    let result = session.run(machine, connector);
    let result = result.map_err(|error| {
        let guest = session.stay(machine, &error);
        (error, guest)
    });
    let mut report = session.report;
    report.total_ms = ms(started.elapsed());
    match result {
        Ok(End::HandedOver) => {
            report.outcome = Outcome::Moved;
            Ok(report)
        }
        Ok(End::Gone) => Err(failure(MigrationError::Gone, Guest::Gone, report)),
        Ok(End::InDoubt(doubt)) => Err(failure(
            MigrationError::InDoubt,
            Guest::InDoubt(doubt),
            report,
        )),
        Err((error, guest)) => Err(failure(error, guest, report)),
    }
}

fn failure(
    error: MigrationError,
    guest: Guest,
    mut report: HandOverReport,
) -> Box<HandOverFailure> {
    // The only token that stops the waits is the cancel token.
    let error = match error {
        MigrationError::Transport(TransportError::Stopped { .. }) => MigrationError::Cancelled,
        error => error,
    };
    report.outcome = match (&error, &guest) {
        (_, Guest::InDoubt(_)) => Outcome::InDoubt,
        (MigrationError::Cancelled, _) => Outcome::Cancelled,
        _ => Outcome::Failed,
    };
    Box::new(HandOverFailure {
        error,
        guest,
        report,
    })
}

/// Reaches the other process and lets it build the machine.
fn greet(
    machine: &mut dyn DepartingMachine,
    connector: &mut dyn Connector,
    options: &HandOverOptions,
    cancel: &CancelToken,
    report: &mut HandOverReport,
) -> Result<(Wire, Doubt, UnixStream), MigrationError> {
    let token = Token::random().map_err(host("random numbers"))?;
    let deadline = Instant::now() + options.connect_timeout;
    let mut wire = Wire::new(connector.connect(deadline)?);
    wire.set_stops(vec![cancel.clone()]);
    let patience = Patience::Until(deadline);
    let preamble = Preamble::connection(Purpose::HandOver, token);
    wire.send_preamble(&preamble, patience)?;
    if wire.receive_preamble(patience)? != preamble {
        let reason = "it does not belong to this session";
        return Err(ProtocolError::Preamble { reason }.into());
    }
    let memory = machine.memory();
    let configuration = Configuration {
        machine: machine.configuration(),
        ram_bytes: memory.size(),
        regions: regions_of(memory),
        ..Configuration::default()
    };
    wire.send(&Message::Configuration(configuration), patience)?;
    let (mark, theirs) = UnixStream::pair().map_err(host("a socket"))?;
    mark.set_nonblocking(true).map_err(host("a socket"))?;
    let (names, descriptors) = copies(machine, theirs)?.into_parts();
    report.descriptors.clone_from(&names);
    let message = Message::Descriptors(DescriptorsBody { names });
    wire.send_with(&message, descriptors, patience)?;
    loop {
        match wire.receive(patience)? {
            Message::Ready(ready) => {
                let incarnation = <[u8; 16]>::try_from(ready.incarnation.as_slice());
                let Ok(incarnation) = incarnation else {
                    let reason = "incarnation is not 16 bytes";
                    return Err(ProtocolError::invalid(Kind::Ready, reason).into());
                };
                let incarnation = Token::from_bytes(incarnation);
                return Ok((wire, Doubt { token, incarnation }, mark));
            }
            other => hear(&mut wire, other, patience, "waiting for the machine")?,
        }
    }
}

/// RAM, the other end of the mark, and what else the machine is built around.
fn copies(
    machine: &mut dyn DepartingMachine,
    mark: UnixStream,
) -> Result<Descriptors, MigrationError> {
    let ram = machine.memory().file().try_clone();
    let ram = ram.map_err(host("a descriptor"))?;
    let mut all = Descriptors::new();
    all.add(RAM, ram.into());
    all.add(STARTED, mark.into());
    all.0.extend(machine.descriptors()?.0);
    Ok(all)
}

/// What may come at any time.
fn hear(
    wire: &mut Wire,
    message: Message,
    patience: Patience,
    state: &'static str,
) -> Result<(), MigrationError> {
    match message {
        Message::KeepAlive(body) => wire.echo(&body, patience),
        Message::Abort(body) => Err(MigrationError::Peer {
            reason: body.reason,
        }),
        other => Err(ProtocolError::Unexpected {
            kind: other.kind(),
            state,
        }
        .into()),
    }
}

impl Session<'_> {
    fn run(
        &mut self,
        machine: &mut dyn DepartingMachine,
        connector: &mut dyn Connector,
    ) -> Result<End, MigrationError> {
        while self.number < self.options.tries {
            if self.cancel.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            self.number += 1;
            let number = Number {
                attempt: self.number,
            };
            self.wire
                .send(&Message::SwitchOver(number.clone()), self.idle())?;
            let paused_at = Instant::now();
            machine.pause()?;
            self.paused = true;
            match self.pass(machine, paused_at)? {
                Pass::Prepared(prepared, times) => {
                    return self.commit(machine, connector, paused_at, (prepared, times));
                }
                Pass::Missed => self.take_back(machine, paused_at, number)?,
            }
        }
        Err(MigrationError::PauseTooLong {
            tries: self.options.tries,
            limit_ms: ms(self.options.downtime_limit),
        })
    }

    fn idle(&self) -> Patience {
        Patience::Idle(self.options.idle_timeout)
    }

    /// Everything between the pause and `Commit`, under the limit.
    fn pass(
        &mut self,
        machine: &mut dyn DepartingMachine,
        paused_at: Instant,
    ) -> Result<Pass, MigrationError> {
        let mut times = SwitchOverReport {
            stopped_ms: ms(paused_at.elapsed()),
            ..SwitchOverReport::default()
        };
        let deadline = paused_at + self.options.downtime_limit;
        let states = machine.save()?;
        times.saved_ms = ms(paused_at.elapsed());
        let body = Message::States(States {
            attempt: self.number,
            states,
            hash_wanted: false,
        });
        let bytes_before = self.wire.bytes_sent();
        let sent = self.wire.send(&body, Patience::Until(deadline));
        times.sent_ms = ms(paused_at.elapsed());
        times.state_bytes = self.wire.bytes_sent() - bytes_before;
        let prepared = sent.and_then(|()| self.await_prepared(Patience::Until(deadline)));
        times.prepared_ms = ms(paused_at.elapsed());
        match prepared {
            Ok(prepared) if Instant::now() < deadline => Ok(Pass::Prepared(prepared, times)),
            Ok(_) | Err(MigrationError::Transport(TransportError::TimedOut { .. })) => {
                Ok(Pass::Missed)
            }
            Err(error) => Err(error),
        }
    }

    fn await_prepared(&mut self, patience: Patience) -> Result<Prepared, MigrationError> {
        loop {
            match self.wire.receive(patience)? {
                Message::Prepared(body) if body.attempt == self.number => return Ok(body),
                // The answer to a pause that was taken back.
                Message::Prepared(body) if body.attempt < self.number => {}
                other => hear(&mut self.wire, other, patience, "switching over")?,
            }
        }
    }

    /// The guest runs on here, and then the other process is told.
    fn take_back(
        &mut self,
        machine: &mut dyn DepartingMachine,
        paused_at: Instant,
        number: Number,
    ) -> Result<(), MigrationError> {
        machine.resume()?;
        self.paused = false;
        let pause_ms = ms(paused_at.elapsed());
        tracing::info!(pause_ms, "a hand-over would have missed its limit");
        self.report.aborted_pauses_ms.push(pause_ms);
        let patience = self.idle();
        self.wire.flush(patience)?;
        self.wire.send(&Message::Back(number), patience)
    }

    /// Gives the guest up, and finds out what became of it.
    fn commit(
        &mut self,
        machine: &mut dyn DepartingMachine,
        connector: &mut dyn Connector,
        paused_at: Instant,
        (prepared, mut times): (Prepared, SwitchOverReport),
    ) -> Result<End, MigrationError> {
        if self.cancel.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        self.report.paused_at_ms = Some(ms(paused_at - self.started));
        self.wire.set_stops(Vec::new());
        let running = match self.await_running() {
            Ok(running) => running,
            Err(lost) => {
                tracing::warn!(error = %lost.chain(), "the hand-over is open, asking who owns the guest");
                self.wire.shutdown();
                let until = Instant::now() + self.options.inquiry_timeout;
                match crate::source::resolve(connector, &self.doubt, until) {
                    Verdict::RunsThere(running) => running,
                    Verdict::NeverThere if self.ended_with(connector) => return Ok(End::Gone),
                    Verdict::NeverThere => {
                        machine.resume()?;
                        self.paused = false;
                        return Err(lost);
                    }
                    Verdict::Unknown => return Ok(End::InDoubt(self.doubt)),
                }
            }
        };
        times.running_ms = ms(paused_at.elapsed());
        self.report.blackout_ms = Some(times.running_ms);
        self.report.switch_over = Some(times);
        self.report.destination = Some(DestinationReport {
            restore_ms: prepared.restore_us as f64 / 1e3,
            start_ms: running.start_us as f64 / 1e3,
            blackout_ms: running.blackout_us as f64 / 1e3,
            cpu_seconds: running.cpu_us as f64 / 1e6,
        });
        self.say_farewell(machine);
        Ok(End::HandedOver)
    }

    /// Did the new process die after it began to start the guest? Then memory is not what the
    /// states here go with. One that lives has promised that no processor has run.
    fn ended_with(&self, connector: &dyn Connector) -> bool {
        connector.peer_is_dead() == Some(true) && matches!((&self.mark).read(&mut [0]), Ok(1..))
    }

    /// Writes `Commit` and waits for `Running`.
    fn await_running(&mut self) -> Result<Running, MigrationError> {
        let number = Number {
            attempt: self.number,
        };
        let wait = RUNNING_WAIT.min(self.options.idle_timeout);
        let patience = Patience::Until(Instant::now() + wait);
        self.wire.send(&Message::Commit(number), patience)?;
        loop {
            match self.wire.receive(patience)? {
                Message::Running(running) => return Ok(running),
                other => hear(&mut self.wire, other, patience, "handing over")?,
            }
        }
    }

    /// The guest runs there: what is left follows it.
    fn say_farewell(&mut self, machine: &mut dyn DepartingMachine) {
        let patience = Patience::Until(Instant::now() + FAREWELL);
        let Leftovers { body, descriptors } = machine.leftovers();
        let (names, descriptors) = descriptors.into_parts();
        let leftovers = Message::Leftovers(LeftoversBody { body, names });
        let told = self
            .wire
            .send_with(&leftovers, descriptors, patience)
            .and_then(|()| self.wire.send(&Message::Settled, patience));
        if let Err(error) = told {
            tracing::debug!(error = %error.chain(), "the new process was not told the end");
        }
        self.wire.shutdown();
    }

    /// The guest stays here.
    fn stay(&mut self, machine: &mut dyn DepartingMachine, error: &MigrationError) -> Guest {
        let mut guest = Guest::RunsHere;
        if self.paused
            && let Err(error) = machine.resume()
        {
            let error: MigrationError = MachineError::into(error);
            tracing::error!(error = %error.chain(), "the guest did not resume");
            guest = Guest::PausedHere;
        }
        match error {
            MigrationError::Transport(TransportError::TimedOut { .. }) => self.wire.shutdown(),
            error => self.wire.abort(error.chain()),
        }
        guest
    }
}
