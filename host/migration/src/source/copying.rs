//! Rounds of copying: what is pending goes over the lanes, and the destination confirms it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dunlin_guest::{PAGE_SIZE, PageSet};

use super::attempt::{Attempt, ms};
use super::lanes::{Finished, Work};
use super::policy::RoundMeasure;
use super::sent::Sent;
use super::tuning::Tuning;
use crate::error::MigrationError;
use crate::options::Step;
use crate::protocol::lane::Counts;
use crate::protocol::message::{RoundBegin, RoundEnd};
use crate::protocol::{Kind, Message, ProtocolError, Token};
use crate::report::{RoundKind, RoundReport};
use crate::wire::Patience;

/// How often a round looks at what the destination says.
const SLICE: Duration = Duration::from_millis(20);

/// A round that has begun.
pub(super) struct Round {
    pub(super) number: u32,
    pub(super) work: Arc<Work>,
    begun: Instant,
    bytes_before: u64,
}

impl Attempt<'_, '_> {
    /// One round while the guest runs: sends what is pending and waits until it is stored.
    pub(super) fn live_round(&mut self) -> Result<(), MigrationError> {
        let patience = Patience::Idle(self.options.idle_timeout);
        self.round_begun = Instant::now();
        let round = self.begin_round(None, patience)?;
        let set = round.work.pages.len();
        self.tell(Step::Copying, round.number, 0, set);
        self.follow(&round, None)?;
        let counts = self.end_round(&round, patience)?;
        self.confirm(round.number)?;
        self.unconfirmed.clear();
        let duration = round.begun.elapsed();
        let bytes = self.bytes_sent() - round.bytes_before;
        self.rounds += 1;
        let all = (counts.total() * PAGE_SIZE) as f64;
        self.goodput = all / duration.as_secs_f64().max(1e-6);
        self.policy.round(&RoundMeasure {
            number: round.number,
            pages: counts.pages,
            light_pages: counts.zero_pages + counts.same_pages,
            bytes,
            duration,
        });
        self.report.rounds.push(RoundReport {
            duration_ms: ms(duration),
            goodput: bytes as f64 / duration.as_secs_f64().max(1e-6),
            ..self.round_report(&round, RoundKind::Live)
        });
        self.count(counts);
        self.tell(Step::Copying, round.number, set, set);
        self.ping()
    }

    /// What is known of a round so far.
    pub(super) fn round_report(&self, round: &Round, kind: RoundKind) -> RoundReport {
        let counts = self.lanes.counts();
        RoundReport {
            round: round.number,
            kind,
            pages: counts.pages,
            zero_pages: counts.zero_pages,
            same_pages: counts.same_pages,
            bytes: self.bytes_sent() - round.bytes_before,
            start_ms: ms(round.begun - self.started),
            duration_ms: ms(round.begun.elapsed()),
            goodput: 0.0,
            dirtied_pages: 0,
            dirty_rate: 0.0,
        }
    }

    /// Adds a round's pages to the move's.
    pub(super) fn count(&mut self, counts: Counts) {
        self.report.pages += counts.pages;
        self.report.zero_pages += counts.zero_pages;
        self.report.same_pages += counts.same_pages;
    }

    /// Puts the lanes to work on what is pending. They stop at `deadline`.
    pub(super) fn begin_round(
        &mut self,
        deadline: Option<Instant>,
        patience: Patience,
    ) -> Result<Round, MigrationError> {
        let number = self.next_round;
        self.next_round += 1;
        let mut work = Work::new(number, self.take_pending());
        work.deadline = deadline;
        work.holes = number == 0;
        work.sent = self.known_content(number)?;
        let pages = work.pages.len();
        let round = Round {
            number,
            work: Arc::new(work),
            begun: Instant::now(),
            bytes_before: self.bytes_sent(),
        };
        self.open_round = Some(number);
        self.lanes.begin(&round.work);
        let begin = RoundBegin {
            round: number,
            pages,
        };
        self.wire.send(&Message::RoundBegin(begin), patience)?;
        Ok(round)
    }

    /// What the destination has of pages, from the second round on.
    fn known_content(&mut self, round: u32) -> Result<Option<Arc<Sent>>, MigrationError> {
        if round > 0 && self.sent.is_none() {
            let seed = Token::random().map_err(|source| MigrationError::Host {
                what: "random numbers",
                source,
            })?;
            let seed = u64::from_le_bytes(*seed.as_bytes().first_chunk().unwrap_or(&[0; 8]));
            self.sent = Some(Arc::new(Sent::new(self.memory.pages(), seed)));
        }
        Ok(self.sent.clone())
    }

    /// Waits until the lanes have sent the round, or `deadline`.
    pub(super) fn follow(
        &mut self,
        round: &Round,
        deadline: Option<Instant>,
    ) -> Result<Finished, MigrationError> {
        let mut tuning = (self.options.streams.is_none() && round.number == 0)
            .then(|| Tuning::begin(self.lanes.active(), self.lanes.len()));
        loop {
            let slice = Instant::now() + SLICE;
            let until = deadline.map_or(slice, |deadline| deadline.min(slice));
            if self.lanes.wait(until)? == Finished::Yes {
                break;
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(Finished::NotYet);
            }
            if self.cancel.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            self.hear_words()?;
            if let Some(tuning) = &mut tuning
                && tuning.one_more(self.confirmed.content_pages, self.confirmed.at)
            {
                self.lanes.join(&round.work);
            }
            let step = if self.paused {
                Step::SwitchingOver
            } else {
                Step::Copying
            };
            self.tell(
                step,
                round.number,
                round.work.done(),
                round.work.pages.len(),
            );
        }
        if let Some(tuning) = tuning {
            self.lanes.use_lanes(tuning.best());
            self.report.streams = self.lanes.active() as u16;
        }
        Ok(Finished::Yes)
    }

    /// Tells the destination what the lanes have sent in a round that they are done with.
    pub(super) fn end_round(
        &mut self,
        round: &Round,
        patience: Patience,
    ) -> Result<Counts, MigrationError> {
        let counts = self.lanes.counts();
        let end = RoundEnd {
            round: round.number,
            pages: counts.pages,
            zero_pages: counts.zero_pages,
            same_pages: counts.same_pages,
            lanes: self.lanes.taking_part() as u32,
        };
        self.wire.send(&Message::RoundEnd(end), patience)?;
        Ok(counts)
    }

    /// Waits until the destination has the round as it was sent.
    pub(super) fn confirm(&mut self, number: u32) -> Result<(), MigrationError> {
        let patience = Patience::Idle(self.options.idle_timeout);
        while self.open_round == Some(number) {
            let message = self.wire.receive(patience)?;
            self.hear(message)?;
        }
        Ok(())
    }

    /// The destination says that it has a round.
    pub(super) fn close_round(
        &mut self,
        number: u32,
        stored: Counts,
    ) -> Result<(), MigrationError> {
        if self.open_round != Some(number) {
            return Ok(());
        }
        if stored != self.lanes.counts() {
            let reason = "it confirms other numbers than were sent";
            return Err(ProtocolError::invalid(Kind::Stored, reason).into());
        }
        self.open_round = None;
        Ok(())
    }

    /// Takes the pending pages for sending; they are unconfirmed from now on.
    pub(super) fn take_pending(&mut self) -> PageSet {
        let empty = PageSet::new(self.memory.pages());
        let set = std::mem::replace(&mut self.pending, empty);
        self.unconfirmed.union(&set);
        set
    }
}
