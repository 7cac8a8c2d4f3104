//! One attempt to move a guest: from the connection until the last round of copying.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PageIndex, PageSet};

use super::copying::Round;
use super::hand_over::Switched;
use super::lanes::{Lanes, Surroundings};
use super::packing::BATCH_PAGES;
use super::policy::{Decision, GiveUp, Observation, Policy};
use super::sent::Sent;
use super::throttle::Throttle;
use super::{End, Phase, opening};
use crate::error::MigrationError;
use crate::machine::{Slowdown, SourceMachine};
use crate::options::{CancelToken, MigrationOptions, Progress, Step};
use crate::ownership::Doubt;
use crate::protocol::lane::Counts;
use crate::protocol::message::{KeepAlive, Prepared};
use crate::protocol::{Message, ProtocolError};
use crate::report::MigrationReport;
use crate::transport::Connector;
use crate::wire::{Patience, Wire};

/// Time between two calls of the progress callback within a round.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);
/// Round trips measured before copying; each round measures one more.
const FIRST_PINGS: u64 = 3;

/// What the attempt needs besides the machine.
pub(super) struct Attempt<'o, 'p> {
    pub(super) options: &'o MigrationOptions,
    pub(super) cancel: CancelToken,
    pub(super) progress: Option<Box<dyn FnMut(Progress) + 'p>>,
    last_progress: Option<Instant>,
    pub(super) wire: Wire,
    pub(super) doubt: Doubt,
    pub(super) memory: Memory,
    pub(super) lanes: Lanes,
    /// What the destination has of pages that were sent again.
    pub(super) sent: Option<Arc<Sent>>,
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
    pub(super) rounds: u32,
    pub(super) goodput: f64,
    slowdown: Slowdown,
    pings: u64,
    /// The last live round: what is harvested since then was dirtied since then.
    pub(super) round_begun: Instant,
    /// The round that was begun and not confirmed.
    pub(super) open_round: Option<u32>,
    /// A round of a switch-over that its deadline cut: the destination was not told its end.
    pub(super) cut_round: Option<Round>,
    /// The destination was sent states, and has not said yet that it has restored them.
    pub(super) restoring: bool,
    /// The destination's last word on how many pages it has.
    pub(super) confirmed: Confirmed,
    /// The last set of connections that a post-copy opened.
    pub(super) generation: u32,
    /// Bytes of pages that were sent after the guest.
    pub(super) bytes_after: u64,
    pub(super) started: Instant,
    pub(super) report: MigrationReport,
}

/// What the destination has said about the pages that came.
#[derive(Debug, Clone, Copy)]
pub(super) struct Confirmed {
    /// Pages with content, since the session began.
    pub(super) content_pages: u64,
    /// When it said so.
    pub(super) at: Instant,
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
        let throttle = Throttle::new(options.bandwidth_limit);
        let memory = machine.memory().clone();
        let surroundings = Surroundings {
            memory: memory.clone(),
            cancel: cancel.clone(),
            batch_pages: throttle.batch_pages(BATCH_PAGES),
            throttle: Arc::new(Mutex::new(throttle)),
            compression: options.compression,
            idle: options.idle_timeout,
        };
        let opened = opening::open(options, &cancel, machine, connector).and_then(|opened| {
            let lanes = Lanes::start(opened.lanes, &surroundings)?;
            Ok((opened.wire, opened.doubt, lanes, opened.no_post_copy))
        });
        match opened {
            Ok((wire, doubt, mut lanes, no_post_copy)) => {
                if options.streams.is_none() {
                    lanes.use_lanes(1);
                }
                let mut report = start.report;
                report.streams = lanes.active() as u16;
                report.no_post_copy = no_post_copy;
                Ok(Self {
                    options,
                    cancel,
                    progress: start.progress,
                    last_progress: None,
                    wire,
                    doubt,
                    lanes,
                    sent: None,
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
                    open_round: None,
                    cut_round: None,
                    restoring: false,
                    confirmed: Confirmed {
                        content_pages: 0,
                        at: Instant::now(),
                    },
                    generation: 0,
                    bytes_after: 0,
                    started: start.started,
                    report,
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
                Decision::PostCopy => match self.post_copy(machine, connector)? {
                    Switched::End(end) => return Ok(end),
                    Switched::TakenBack => self.policy.taken_back(),
                },
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
            post_copy: self.no_post_copy().is_none(),
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
            Message::Stored(stored) if stored.round < self.next_round => {
                self.confirmed = Confirmed {
                    content_pages: stored.all_content_pages,
                    at: Instant::now(),
                };
                if !stored.complete {
                    return Ok(());
                }
                let counts = Counts {
                    pages: stored.pages,
                    zero_pages: stored.zero_pages,
                    same_pages: stored.same_pages,
                };
                self.close_round(stored.round, counts)
            }
            // The answer to a switch-over that was taken back meanwhile.
            Message::Prepared(body) if body.attempt <= self.switch_over => {
                self.restoring = false;
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
                if let Some(sent) = &self.sent {
                    sent.forget(PageIndex(page));
                }
            }
        }
    }

    /// Sends a sign of life there and back, which tells how long a word takes.
    pub(super) fn ping(&mut self) -> Result<(), MigrationError> {
        let took = self.echo()?;
        self.policy.round_trip(took);
        Ok(())
    }

    /// Waits until the destination has heard everything that was said, and answered.
    pub(super) fn echo(&mut self) -> Result<Duration, MigrationError> {
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
        Ok(begun.elapsed())
    }

    pub(super) fn tell(&mut self, step: Step, round: u32, pages_done: u64, pages_total: u64) {
        let bytes_sent = self.bytes_sent();
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
            bytes_sent,
        });
    }

    /// Bytes on all connections.
    pub(super) fn bytes_sent(&self) -> u64 {
        self.wire.bytes_sent() + self.lanes.bytes_sent() + self.bytes_after
    }

    /// Puts everything that was harvested and not confirmed back into the dirty log.
    pub(super) fn put_back(&mut self) {
        self.memory.dirty_log().mark_all(&self.pending);
        self.memory.dirty_log().mark_all(&self.unconfirmed);
    }
}

pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
