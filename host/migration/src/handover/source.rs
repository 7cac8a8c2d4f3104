//! The process that has the guest.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    Claimed, DepartingMachine, Descriptors, Guest, HandOverFailure, HandOverOptions,
    HandOverReport, Leftovers, RAM, RIGHT, Right, host, ms,
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
/// The guest runs for so many times the length of a pause that was taken back, before the next one.
const REST: u32 = 4;
/// But no longer than this.
const LONGEST_REST: Duration = Duration::from_secs(1);
/// Between two looks at the cancel token meanwhile.
const SLICE: Duration = Duration::from_millis(10);
/// How long the last words may take.
const FAREWELL: Duration = Duration::from_millis(500);

/// How an attempt ended, unless by an error.
enum End {
    HandedOver,
    InDoubt(Doubt),
    Gone,
}

/// What became of a guest that was given away without an answer.
enum Found {
    Running(Running),
    Claimed(Claimed),
}

/// What became of a pause.
enum Pass {
    Prepared(Prepared, SwitchOverReport),
    /// It would be too long; has the new process said all the same that it has restored?
    Missed {
        restored: bool,
    },
}

/// A hand-over under way.
struct Session<'a> {
    options: &'a HandOverOptions,
    cancel: CancelToken,
    wire: Wire,
    doubt: Doubt,
    right: Arc<Right>,
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
    let (wire, doubt, right) = match greeted {
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
        right: Arc::new(right),
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
    let right = session.right;
    let mut report = session.report;
    report.total_ms = ms(started.elapsed());
    match result {
        Ok(End::HandedOver) => {
            report.outcome = Outcome::Moved;
            Ok(report)
        }
        Ok(End::Gone) => Err(failure(MigrationError::Gone, Guest::Gone, report)),
        Ok(End::InDoubt(doubt)) => {
            let guest = Guest::InDoubt(doubt);
            let mut failure = failure(MigrationError::InDoubt, guest, report);
            failure.right = Some(right);
            Err(failure)
        }
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
        right: None,
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
) -> Result<(Wire, Doubt, Right), MigrationError> {
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
    let right = Right::new().map_err(host("an eventfd"))?;
    let theirs = right.copy().map_err(host("a descriptor"))?;
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
                return Ok((wire, Doubt { token, incarnation }, right));
            }
            other => hear(&mut wire, other, patience, "waiting for the machine")?,
        }
    }
}

/// RAM, the right to run the guest, and what else the machine is built around.
fn copies(
    machine: &mut dyn DepartingMachine,
    right: OwnedFd,
) -> Result<Descriptors, MigrationError> {
    let ram = machine.memory().file().try_clone();
    let ram = ram.map_err(host("a descriptor"))?;
    let mut all = Descriptors::new();
    all.add(RAM, ram.into());
    all.add(RIGHT, right);
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
                Pass::Missed { restored } => {
                    let pause = self.take_back(machine, paused_at, number)?;
                    if self.number < self.options.tries {
                        self.rest(pause, restored)?;
                    }
                }
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
            Ok(_) => Ok(Pass::Missed { restored: true }),
            Err(MigrationError::Transport(TransportError::TimedOut { .. })) => {
                Ok(Pass::Missed { restored: false })
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
    ) -> Result<Duration, MigrationError> {
        machine.resume()?;
        self.paused = false;
        let pause = paused_at.elapsed();
        let pause_ms = ms(pause);
        tracing::info!(pause_ms, "a hand-over would have missed its limit");
        self.report.aborted_pauses_ms.push(pause_ms);
        let patience = self.idle();
        self.wire.flush(patience)?;
        self.wire.send(&Message::Back(number), patience)?;
        Ok(pause)
    }

    /// Lets the guest run for a while after a pause that was taken back, and at least until the new
    /// process has restored what came in it: the next pause would wait for that too.
    fn rest(&mut self, pause: Duration, restored: bool) -> Result<(), MigrationError> {
        if !restored {
            self.await_prepared(self.idle())?;
        }
        let end = Instant::now() + (pause * REST).min(LONGEST_REST);
        while Instant::now() < end {
            if self.cancel.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            std::thread::sleep(SLICE);
        }
        Ok(())
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
                self.wire.shutdown();
                match self.find_out(connector, &lost) {
                    Found::Running(running) => running,
                    Found::Claimed(Claimed::Here) => {
                        machine.resume()?;
                        self.paused = false;
                        return Err(lost);
                    }
                    Found::Claimed(Claimed::Gone) => return Ok(End::Gone),
                    Found::Claimed(Claimed::There) => return Ok(End::InDoubt(self.doubt)),
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

    /// What became of a guest that was given away without an answer. As long as the new process has
    /// not taken the right to run it, nobody needs to be asked.
    fn find_out(&self, connector: &mut dyn Connector, lost: &MigrationError) -> Found {
        let claimed = self.right.claim(connector);
        if claimed != Claimed::There {
            return Found::Claimed(claimed);
        }
        tracing::warn!(error = %lost.chain(), "the new process has the guest, and is asked for it");
        let until = Instant::now() + self.options.inquiry_timeout;
        match crate::source::resolve(connector, &self.doubt, until) {
            Verdict::RunsThere(running) => Found::Running(running),
            // Where it did not start the guest it has given the right back.
            Verdict::NeverThere | Verdict::Unknown => Found::Claimed(self.right.claim(connector)),
        }
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
        let Leftovers { body, descriptors } = machine.leftovers();
        let patience = Patience::Until(Instant::now() + FAREWELL);
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
