//! One attempt to move a guest: from the connection until the last round of copying.

use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PageIndex, PageSet};

use super::hand_over::Switched;
use super::policy::{Decision, GiveUp, Observation, Policy, RoundMeasure};
use super::round::Batch;
use super::throttle::Throttle;
use super::{End, Phase};
use crate::error::MigrationError;
use crate::machine::{Slowdown, SourceMachine};
use crate::options::{CancelToken, MigrationOptions, Progress, Step, Verification};
use crate::ownership::Doubt;
use crate::protocol::message::{Configuration, KeepAlive, Prepared, Region};
use crate::protocol::{Message, Preamble, ProtocolError, Purpose, Token};
use crate::report::{MigrationReport, RoundKind, RoundReport};
use crate::transport::Connector;
use crate::wire::{Patience, Wire};

/// Most pages in a batch without a bandwidth limit.
const BATCH_PAGES: usize = 128;
/// Time between two calls of the progress callback within a round.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);
/// Round trips measured before copying; each round measures one more.
const FIRST_PINGS: u64 = 3;

/// What the attempt needs besides the machine.
pub(super) struct Attempt<'o, 'p> {
    pub(super) options: &'o MigrationOptions,
    pub(super) cancel: CancelToken,
    progress: Option<Box<dyn FnMut(Progress) + 'p>>,
    last_progress: Option<Instant>,
    pub(super) wire: Wire,
    pub(super) doubt: Doubt,
    pub(super) memory: Memory,
    pub(super) batch: Batch,
    pub(super) throttle: Throttle,
    pub(super) policy: Policy,
    pub(super) phase: Phase,
    /// Is the guest stopped?
    pub(super) paused: bool,
    /// Pages that the destination lacks.
    pub(super) pending: PageSet,
    /// Pages that were sent, and are not confirmed.
    pub(super) unconfirmed: PageSet,
    pub(super) next_round: u32,
    /// Number of the last switch-over.
    pub(super) switch_over: u32,
    /// Live rounds that were confirmed, and bytes of pages a second in the last one.
    rounds: u32,
    goodput: f64,
    slowdown: Slowdown,
    pings: u64,
    /// The last live round: what is harvested since then was dirtied since then.
    round_begun: Instant,
    pub(super) started: Instant,
    pub(super) report: MigrationReport,
}

/// What an attempt starts from.
pub(super) struct Start<'o, 'p> {
    pub(super) options: &'o MigrationOptions,
    pub(super) cancel: CancelToken,
    pub(super) progress: Option<Box<dyn FnMut(Progress) + 'p>>,
    pub(super) started: Instant,
    pub(super) report: MigrationReport,
}

impl<'o, 'p> Attempt<'o, 'p> {
    /// Reaches the destination and lets it build the machine.
    pub(super) fn connect(
        start: Start<'o, 'p>,
        machine: &dyn SourceMachine,
        connector: &mut dyn Connector,
    ) -> Result<Self, (MigrationError, Box<MigrationReport>)> {
        let options = start.options;
        let cancel = start.cancel.clone();
        match greet(options, &cancel, machine, connector) {
            Ok((wire, doubt)) => {
                let memory = machine.memory().clone();
                let throttle = Throttle::new(options.bandwidth_limit);
                Ok(Self {
                    options,
                    cancel,
                    progress: start.progress,
                    last_progress: None,
                    wire,
                    doubt,
                    batch: Batch::new(throttle.batch_pages(BATCH_PAGES)),
                    throttle,
                    policy: Policy::new(options),
                    phase: Phase::Copying,
                    paused: false,
                    pending: PageSet::full(memory.pages()),
                    unconfirmed: PageSet::new(memory.pages()),
                    memory,
                    next_round: 0,
                    switch_over: 0,
                    rounds: 0,
                    goodput: 0.0,
                    slowdown: Slowdown::NONE,
                    pings: 0,
                    round_begun: Instant::now(),
                    started: start.started,
                    report: start.report,
                })
            }
            Err(error) => Err((error, Box::new(start.report))),
        }
    }

    /// Copies until the guest has moved, or cannot be.
    pub(super) fn run(
        &mut self,
        machine: &mut dyn SourceMachine,
        connector: &mut dyn Connector,
    ) -> Result<End, MigrationError> {
        for _ in 0..FIRST_PINGS {
            self.ping()?;
        }
        machine.start_dirty_tracking()?;
        loop {
            if self.cancel.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            self.harvest(machine)?;
            let now = self.observe();
            match self.policy.decide(&now) {
                Decision::Round => {}
                Decision::Throttle(slowdown) => self.throttle_guest(machine, slowdown),
                Decision::SwitchOver(pause) => match self.switch_over(machine, connector, pause)? {
                    Switched::End(end) => return Ok(end),
                    Switched::TakenBack => self.policy.taken_back(),
                },
                // Not reached: `observe` offers no post-copy.
                Decision::PostCopy => return Err(self.give_up(&now, GiveUp::DidNotConverge)),
                Decision::GiveUp(why) => return Err(self.give_up(&now, why)),
            }
            self.live_round()?;
        }
    }

    fn observe(&self) -> Observation {
        Observation {
            rounds: self.rounds,
            elapsed: self.started.elapsed(),
            remaining_pages: self.pending.len(),
            dirty_rate: self.report.rounds.last().map_or(0.0, |r| r.dirty_rate),
            goodput: self.goodput,
            switch_overs_aborted: self.report.switch_overs_aborted,
            slowdown: self.slowdown,
            post_copy: false,
        }
    }

    /// A machine that cannot be slowed down is moved as it is.
    fn throttle_guest(&mut self, machine: &mut dyn SourceMachine, slowdown: Slowdown) {
        match machine.throttle(slowdown) {
            Ok(()) => self.slowdown = slowdown,
            Err(error) => {
                let error = MigrationError::from(error);
                tracing::warn!(error = %error.chain(), "the guest is not slowed down");
            }
        }
    }

    /// The guest runs on here: at full speed.
    pub(super) fn unthrottle(&mut self, machine: &mut dyn SourceMachine) {
        if self.slowdown > Slowdown::NONE {
            self.throttle_guest(machine, Slowdown::NONE);
        }
    }

    fn give_up(&self, now: &Observation, why: GiveUp) -> MigrationError {
        match why {
            GiveUp::TimedOut => MigrationError::OutOfTime {
                elapsed_ms: ms(now.elapsed),
            },
            GiveUp::DidNotConverge => MigrationError::DidNotConverge {
                rounds: self.next_round,
                remaining_pages: now.remaining_pages,
                predicted_ms: ms(self.policy.predicted_pause(now.remaining_pages)),
                limit_ms: ms(self.options.downtime_limit),
            },
        }
    }

    /// Adds the pages that the guest wrote since the last time to those that the destination
    /// lacks.
    pub(super) fn harvest(
        &mut self,
        machine: &mut dyn SourceMachine,
    ) -> Result<(), MigrationError> {
        machine.collect_dirty()?;
        let mut dirtied = PageSet::new(self.memory.pages());
        self.memory.dirty_log().harvest(&mut dirtied);
        let seconds = self.round_begun.elapsed().as_secs_f64().max(1e-6);
        if let Some(round) = self.report.rounds.last_mut() {
            round.dirtied_pages += dirtied.len();
            round.dirty_rate = (round.dirtied_pages * dunlin_guest::PAGE_SIZE) as f64 / seconds;
        }
        self.pending.union(&dirtied);
        Ok(())
    }

    /// One round while the guest runs: sends what is pending and waits until it is stored.
    fn live_round(&mut self) -> Result<(), MigrationError> {
        let patience = Patience::Idle(self.options.idle_timeout);
        let number = self.next_round;
        let set = self.take_pending();
        self.next_round += 1;
        self.tell(Step::Copying, number, 0, set.len());
        let begun = Instant::now();
        self.round_begun = begun;
        let bytes_before = self.wire.bytes_sent();
        let counts = self.send_pages(number, &set, patience)?;
        loop {
            match self.wire.receive(patience)? {
                Message::Stored(stored) if stored.complete && stored.round == number => {
                    if stored.pages == counts.pages && stored.zero_pages == counts.zero_pages {
                        break;
                    }
                    return Err(ProtocolError::invalid(
                        crate::protocol::Kind::Stored,
                        "it confirms other numbers than were sent",
                    )
                    .into());
                }
                message => self.hear(message)?,
            }
        }
        self.unconfirmed.clear();
        let duration = begun.elapsed();
        let bytes = self.wire.bytes_sent() - bytes_before;
        self.rounds += 1;
        let all = ((counts.pages + counts.zero_pages) * dunlin_guest::PAGE_SIZE) as f64;
        self.goodput = all / duration.as_secs_f64().max(1e-6);
        self.policy.round(&RoundMeasure {
            number,
            pages: counts.pages,
            light_pages: counts.zero_pages,
            bytes,
            duration,
        });
        self.report.rounds.push(RoundReport {
            round: number,
            kind: RoundKind::Live,
            pages: counts.pages,
            zero_pages: counts.zero_pages,
            bytes,
            start_ms: ms(begun - self.started),
            duration_ms: ms(duration),
            goodput: bytes as f64 / duration.as_secs_f64().max(1e-6),
            dirtied_pages: 0,
            dirty_rate: 0.0,
        });
        self.report.pages += counts.pages;
        self.report.zero_pages += counts.zero_pages;
        self.tell(Step::Copying, number, set.len(), set.len());
        self.ping()
    }

    /// Takes the pending pages for sending; they are unconfirmed from now on.
    pub(super) fn take_pending(&mut self) -> PageSet {
        let empty = PageSet::new(self.memory.pages());
        let set = std::mem::replace(&mut self.pending, empty);
        self.unconfirmed.union(&set);
        set
    }

    /// Hears what the destination has said so far, without waiting.
    pub(super) fn hear_words(&mut self) -> Result<(), MigrationError> {
        while let Some(message) = self.wire.try_receive()? {
            self.hear(message)?;
        }
        Ok(())
    }

    /// A message that nobody waits for.
    pub(super) fn hear(&mut self, message: Message) -> Result<(), MigrationError> {
        match message {
            Message::KeepAlive(body) => {
                let patience = Patience::Idle(self.options.idle_timeout);
                self.wire.echo(&body, patience)
            }
            Message::Stored(stored) if stored.round < self.next_round => Ok(()),
            // The answer to a switch-over that was taken back meanwhile.
            Message::Prepared(body) if body.attempt <= self.switch_over => {
                self.send_again(&body);
                Ok(())
            }
            Message::Abort(body) => Err(MigrationError::Peer {
                reason: body.reason,
            }),
            other => Err(ProtocolError::Unexpected {
                kind: other.kind(),
                state: self.phase.name(),
            }
            .into()),
        }
    }

    /// The destination changed these pages while it restored a state that is not used.
    pub(super) fn send_again(&mut self, prepared: &Prepared) {
        for &page in &prepared.changed_pages {
            if page < self.memory.pages() {
                self.pending.insert(PageIndex(page));
            }
        }
    }

    /// Sends a sign of life there and back.
    fn ping(&mut self) -> Result<(), MigrationError> {
        let patience = Patience::Idle(self.options.idle_timeout);
        let number = self.pings;
        self.pings += 1;
        let begun = Instant::now();
        let ping = KeepAlive { echo: 1, number };
        self.wire.send(&Message::KeepAlive(ping), patience)?;
        loop {
            match self.wire.receive(patience)? {
                Message::KeepAlive(body) if body.echo == 0 && body.number == number => break,
                other => self.hear(other)?,
            }
        }
        self.policy.round_trip(begun.elapsed());
        Ok(())
    }

    pub(super) fn tell(&mut self, step: Step, round: u32, pages_done: u64, pages_total: u64) {
        let Some(callback) = &mut self.progress else {
            return;
        };
        let now = Instant::now();
        let whole = pages_done == 0 || pages_done == pages_total;
        let recent = self
            .last_progress
            .is_some_and(|last| now - last < PROGRESS_INTERVAL);
        if recent && !whole {
            return;
        }
        self.last_progress = Some(now);
        callback(Progress {
            step,
            round,
            pages_done,
            pages_total,
            bytes_sent: self.wire.bytes_sent(),
        });
    }

    /// Puts everything that was harvested and not confirmed back into the dirty log.
    pub(super) fn put_back(&mut self) {
        self.memory.dirty_log().mark_all(&self.pending);
        self.memory.dirty_log().mark_all(&self.unconfirmed);
    }
}

fn greet(
    options: &MigrationOptions,
    cancel: &CancelToken,
    machine: &dyn SourceMachine,
    connector: &mut dyn Connector,
) -> Result<(Wire, Doubt), MigrationError> {
    let token = Token::random().map_err(|source| MigrationError::Host {
        what: "random numbers",
        source,
    })?;
    let deadline = Instant::now() + options.connect_timeout;
    let mut wire = Wire::new(connector.connect(deadline)?);
    wire.set_stops(vec![cancel.clone()]);
    let patience = Patience::Until(deadline);
    let preamble = Preamble {
        purpose: Purpose::Move,
        token,
        body_length: 0,
    };
    wire.send_preamble(&preamble, patience)?;
    let answer = wire.receive_preamble(patience)?;
    if answer != preamble {
        let reason = "it does not belong to this session";
        return Err(ProtocolError::Preamble { reason }.into());
    }
    let memory = machine.memory();
    let configuration = Configuration {
        machine: machine.configuration(),
        ram_bytes: memory.size(),
        regions: regions_of(memory),
        verification: match options.verification {
            Verification::Off => 0,
            Verification::AfterHandOver => 1,
            Verification::BeforeHandOver => 2,
        },
    };
    wire.send(&Message::Configuration(configuration), patience)?;
    match wire.receive(patience)? {
        Message::Ready(ready) => {
            let incarnation = <[u8; 16]>::try_from(ready.incarnation.as_slice());
            let incarnation = incarnation.map_err(|_wrong_length| {
                ProtocolError::invalid(crate::protocol::Kind::Ready, "incarnation is not 16 bytes")
            })?;
            let doubt = Doubt {
                token,
                incarnation: Token::from_bytes(incarnation),
            };
            Ok((wire, doubt))
        }
        Message::Abort(body) => Err(MigrationError::Peer {
            reason: body.reason,
        }),
        other => Err(ProtocolError::Unexpected {
            kind: other.kind(),
            state: Phase::Connecting.name(),
        }
        .into()),
    }
}

/// Where RAM lies, as it travels.
pub(crate) fn regions_of(memory: &Memory) -> Vec<Region> {
    memory
        .regions()
        .map(|region| Region {
            start: region.start,
            size: region.size,
            offset: region.offset,
        })
        .collect()
}

pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
