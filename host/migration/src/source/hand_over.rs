//! The switch-over: the guest stops, the rest follows, and ownership passes or does not.

use std::time::{Duration, Instant};

use super::attempt::{Attempt, ms};
use super::inquiry::{self, Verdict};
use super::lanes::Finished;
use super::policy::{Overheads, Pause};
use super::{End, Phase};
use crate::error::MigrationError;
use crate::machine::SourceMachine;
use crate::options::{Step, Verification};
use crate::pages;
use crate::protocol::Message;
use crate::protocol::message::{Attempt as Number, Prepared, Running, States};
use crate::report::{DestinationReport, RoundKind, SwitchOverReport};
use crate::transport::{Connector, TransportError};
use crate::wire::Patience;

/// How long `Running` may take at most before the source asks by another connection.
const RUNNING_WAIT: Duration = Duration::from_secs(2);
/// How long the last word to the destination may take.
const SETTLED_WAIT: Duration = Duration::from_millis(500);

/// What became of a switch-over.
pub(super) enum Switched {
    /// The attempt is over.
    End(End),
    /// The limit would have been missed: the guest runs on here.
    TakenBack,
}

/// What became of the pause before `Commit`.
enum Pass {
    Prepared(Prepared),
    Missed,
}

impl Attempt<'_, '_> {
    /// Stops the guest, sends the rest, and hands over if that keeps the downtime limit,
    /// or `pause` has none.
    ///
    /// An error means that the guest is still the source's, and perhaps paused.
    pub(super) fn switch_over(
        &mut self,
        machine: &mut dyn SourceMachine,
        connector: &mut dyn Connector,
        pause: Pause,
    ) -> Result<Switched, MigrationError> {
        let (paused_at, mut times) = self.stop_guest(machine)?;
        let limit = self.options.downtime_limit;
        let deadline = (pause == Pause::Limited).then(|| paused_at + limit - self.policy.reserve());
        match self.last_pass(machine, paused_at, deadline, &mut times)? {
            Pass::Prepared(prepared) => {
                times.prepared_ms = ms(paused_at.elapsed());
                self.report.paused_at_ms = Some(ms(paused_at - self.started));
                self.tell(Step::HandingOver, self.next_round, 0, 0);
                let end = self.hand_over(machine, connector, paused_at, (prepared, times))?;
                Ok(Switched::End(end))
            }
            Pass::Missed => {
                self.take_back(machine, paused_at, &times)?;
                Ok(Switched::TakenBack)
            }
        }
    }

    /// Announces a switch-over and stops the guest; since when it stands still.
    pub(super) fn stop_guest(
        &mut self,
        machine: &mut dyn SourceMachine,
    ) -> Result<(Instant, SwitchOverReport), MigrationError> {
        self.switch_over += 1;
        let patience = Patience::Idle(self.options.idle_timeout);
        let number = Number {
            attempt: self.switch_over,
        };
        self.tell(Step::SwitchingOver, self.next_round, 0, self.pending.len());
        self.wire.send(&Message::SwitchOver(number), patience)?;
        self.phase = Phase::Switching;
        let paused_at = Instant::now();
        machine.pause()?;
        self.paused = true;
        let times = SwitchOverReport {
            stopped_ms: ms(paused_at.elapsed()),
            ..SwitchOverReport::default()
        };
        Ok((paused_at, times))
    }

    /// Everything between the pause and `Commit`, under the deadline.
    fn last_pass(
        &mut self,
        machine: &mut dyn SourceMachine,
        paused_at: Instant,
        deadline: Option<Instant>,
        times: &mut SwitchOverReport,
    ) -> Result<Pass, MigrationError> {
        let idle = Patience::Idle(self.options.idle_timeout);
        let patience = deadline.map_or(idle, Patience::Until);
        // Saving may still write guest memory, so the last pages are known only afterwards.
        let states = machine.save()?;
        self.harvest(machine)?;
        times.saved_ms = ms(paused_at.elapsed());
        let before = self.options.verification == Verification::BeforeHandOver;
        let body = Message::States(States {
            attempt: self.switch_over,
            states,
            hash_wanted: before,
        });
        times.state_bytes = body.encode().len() as u64;
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(Pass::Missed);
        }
        match self.final_round(deadline, patience) {
            Ok(Finished::Yes) => {}
            Ok(Finished::NotYet) => return Ok(Pass::Missed),
            failed if missed(&failed, deadline) => return Ok(Pass::Missed),
            Err(error) => return Err(error),
        }
        self.restoring = true;
        let sent = self.wire.send(&body, patience);
        if missed(&sent, deadline) {
            return Ok(Pass::Missed);
        }
        sent?;
        times.sent_ms = ms(paused_at.elapsed());
        // The limit does not count the time of hashing during the pause.
        let (patience, deadline) = if before {
            (idle, None)
        } else {
            (patience, deadline)
        };
        let hash = before.then(|| pages::hash_ram(&self.memory));
        let prepared = self.await_prepared(patience);
        if missed(&prepared, deadline) {
            return Ok(Pass::Missed);
        }
        let prepared = prepared?;
        self.close_final_round(&prepared);
        if let Some(source_hash) = hash {
            let destination_hash = prepared.hash.unwrap_or(!source_hash);
            self.report.ram_hash = Some(format!("{source_hash:016x}"));
            self.report.verified = Some(source_hash == destination_hash);
            if source_hash != destination_hash {
                return Err(MigrationError::Verification {
                    source_hash,
                    destination_hash,
                });
            }
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(Pass::Missed);
        }
        Ok(Pass::Prepared(prepared))
    }

    /// Sends what is pending while the guest is paused.
    fn final_round(
        &mut self,
        deadline: Option<Instant>,
        patience: Patience,
    ) -> Result<Finished, MigrationError> {
        let round = self.begin_round(deadline, patience)?;
        let followed = self.follow(&round, deadline);
        let mut report = self.round_report(&round, RoundKind::TakenBack);
        report.pages = round.work.pages.len();
        self.report.rounds.push(report);
        let finished = followed?;
        let counts = self.lanes.counts();
        if finished == Finished::NotYet || counts.total() < round.work.pages.len() {
            round.work.stop();
            self.cut_round = Some(round);
            return Ok(Finished::NotYet);
        }
        self.count(counts);
        let kept = self.round_report(&round, RoundKind::TakenBack);
        if let Some(last) = self.report.rounds.last_mut() {
            *last = kept;
        }
        self.end_round(&round, patience)?;
        Ok(Finished::Yes)
    }

    /// `Prepared` says that the last round is stored, too.
    fn close_final_round(&mut self, prepared: &Prepared) {
        let now = ms(self.started.elapsed());
        if let Some(round) = self.report.rounds.last_mut() {
            let restore = prepared.restore_us as f64 / 1e3;
            round.duration_ms = (now - round.start_ms - restore).max(round.duration_ms);
            round.goodput = round.bytes as f64 / (round.duration_ms / 1e3).max(1e-6);
        }
        self.policy.learn(Overheads {
            stop: Duration::ZERO,
            save: Duration::ZERO,
            restore: Duration::from_micros(prepared.restore_us.min(60_000_000)),
        });
    }

    pub(super) fn await_prepared(
        &mut self,
        patience: Patience,
    ) -> Result<Prepared, MigrationError> {
        loop {
            match self.wire.receive(patience)? {
                Message::Prepared(body) if body.attempt == self.switch_over => {
                    self.restoring = false;
                    // Counts if the switch-over is taken back after all.
                    self.send_again(&body);
                    return Ok(body);
                }
                other => self.hear(other)?,
            }
        }
    }

    /// The guest runs on here, and then the destination is told. Its answer to this switch-over
    /// may still come, and is passed over.
    pub(super) fn take_back(
        &mut self,
        machine: &mut dyn SourceMachine,
        paused_at: Instant,
        times: &SwitchOverReport,
    ) -> Result<(), MigrationError> {
        machine.resume()?;
        self.paused = false;
        self.phase = Phase::Copying;
        let pause = paused_at.elapsed();
        tracing::info!(
            pause_ms = ms(pause),
            "a switch-over would have missed its limit"
        );
        self.report.switch_overs_aborted += 1;
        self.report.aborted_pauses_ms.push(ms(pause));
        self.policy.learn(Overheads {
            stop: Duration::from_secs_f64(times.stopped_ms / 1e3),
            save: Duration::from_secs_f64((times.saved_ms - times.stopped_ms).max(0.0) / 1e3),
            restore: Duration::ZERO,
        });
        self.pending.union(&self.unconfirmed);
        self.unconfirmed.clear();
        self.tell(Step::Copying, self.next_round, 0, self.pending.len());
        let patience = Patience::Idle(self.options.idle_timeout);
        self.wire.flush(patience)?;
        if let Some(round) = self.cut_round.take() {
            // What the lanes have begun to send arrives all the same, and before anything newer.
            self.follow(&round, None)?;
            self.end_round(&round, patience)?;
        }
        let number = Number {
            attempt: self.switch_over,
        };
        self.wire.send(&Message::Back(number), patience)?;
        if let Some(open) = self.open_round {
            self.confirm(open)?;
        }
        // Lanes must not write under a machine that is being restored, be it in vain.
        while self.restoring {
            let message = self.wire.receive(patience)?;
            self.hear(message)?;
        }
        Ok(())
    }

    /// Gives the guest up, and finds out what became of it.
    fn hand_over(
        &mut self,
        machine: &mut dyn SourceMachine,
        connector: &mut dyn Connector,
        paused_at: Instant,
        (prepared, mut times): (Prepared, SwitchOverReport),
    ) -> Result<End, MigrationError> {
        if self.cancel.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        self.wire.set_stops(Vec::new());
        self.phase = Phase::Committed;
        let lost = match self.commit() {
            Ok(running) => {
                times.running_ms = ms(paused_at.elapsed());
                self.settle(paused_at, &prepared, times, running);
                return Ok(End::Moved);
            }
            Err(error) => error,
        };
        tracing::warn!(error = %lost.chain(), "the hand-over is open, asking who owns the guest");
        self.wire.shutdown();
        let until = Instant::now() + self.options.inquiry_timeout;
        match inquiry::resolve(connector, &self.doubt, until) {
            Verdict::RunsThere(running) => {
                times.running_ms = ms(paused_at.elapsed());
                self.settle(paused_at, &prepared, times, running);
                Ok(End::Moved)
            }
            Verdict::NeverThere => {
                machine.resume()?;
                self.paused = false;
                Err(lost)
            }
            Verdict::Unknown => Ok(End::InDoubt(self.doubt)),
        }
    }

    /// Writes `Commit` and waits for `Running`.
    pub(super) fn commit(&mut self) -> Result<Running, MigrationError> {
        let number = Number {
            attempt: self.switch_over,
        };
        let wait = RUNNING_WAIT.min(self.options.idle_timeout);
        let patience = Patience::Until(Instant::now() + wait);
        self.wire.send(&Message::Commit(number), patience)?;
        loop {
            match self.wire.receive(patience)? {
                Message::Running(running) => return Ok(running),
                other => self.hear(other)?,
            }
        }
    }

    /// The guest runs there.
    fn settle(
        &mut self,
        paused_at: Instant,
        prepared: &Prepared,
        times: SwitchOverReport,
        running: Running,
    ) {
        let patience = Patience::Until(Instant::now() + SETTLED_WAIT);
        if let Err(error) = self.wire.send(&Message::Settled, patience) {
            tracing::debug!(error = %error.chain(), "the destination was not told the end");
        }
        self.wire.shutdown();
        self.note_running(paused_at, prepared, times, &running);
        if let Some(round) = self.report.rounds.last_mut() {
            round.kind = RoundKind::Final;
        }
        if self.options.verification == Verification::AfterHandOver {
            let hash = pages::hash_ram(&self.memory);
            self.report.ram_hash = Some(format!("{hash:016x}"));
            self.report.verified = Some(running.hash == Some(hash));
            if running.hash != Some(hash) {
                tracing::error!(here = hash, there = ?running.hash, "memory differs after the move");
            }
        }
    }

    /// The destination has said that the guest runs.
    pub(super) fn note_running(
        &mut self,
        paused_at: Instant,
        prepared: &Prepared,
        times: SwitchOverReport,
        running: &Running,
    ) {
        self.report.blackout_ms = Some(ms(paused_at.elapsed()));
        self.report.switch_over = Some(times);
        self.report.destination = Some(DestinationReport {
            restore_ms: prepared.restore_us as f64 / 1e3,
            start_ms: running.start_us as f64 / 1e3,
            blackout_ms: running.blackout_us as f64 / 1e3,
            cpu_seconds: running.cpu_us as f64 / 1e6,
        });
    }
}

/// Did the deadline strike?
pub(super) fn missed<T>(result: &Result<T, MigrationError>, deadline: Option<Instant>) -> bool {
    deadline.is_some()
        && matches!(
            result,
            Err(MigrationError::Transport(TransportError::TimedOut { .. }))
        )
}
