//! What a move does next. Pure: it is told what was measured, looks at no clock and touches no
//! machine, so that every decision can be tried in a test.
//!
//! The source asks once after each harvest of the dirty log, and does what the answer says.

mod estimate;

use std::time::Duration;

pub(super) use estimate::Overheads;

use self::estimate::Estimate;
use crate::machine::Slowdown;
use crate::options::{MigrationOptions, NoConvergence};

/// Rounds in which what remains may fail to shrink by a tenth.
const STALE_ROUNDS: u32 = 8;

/// What is known when a decision is due.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Observation {
    /// Live rounds that the destination has confirmed.
    pub(super) rounds: u32,
    /// Since the move began.
    pub(super) elapsed: Duration,
    /// Pages that the destination lacks.
    pub(super) remaining_pages: u64,
    /// Bytes a second that the guest dirtied while the last round ran, in whole pages.
    pub(super) dirty_rate: f64,
    /// Bytes of pages a second that the destination confirmed in the last round; a page of zeros
    /// or a reference counts as a page. Zero before the first round.
    pub(super) goodput: f64,
    /// Switch-overs that were taken back.
    pub(super) switch_overs_aborted: u32,
    /// What is withheld from vCPUs now.
    pub(super) slowdown: Slowdown,
    /// Can both sides do post-copy?
    pub(super) post_copy: bool,
}

/// One confirmed round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RoundMeasure {
    /// Its number, from 0.
    pub(super) number: u32,
    /// Pages that took their content along, compressed or not.
    pub(super) pages: u64,
    /// Pages sent as zero or as references.
    pub(super) light_pages: u64,
    /// Bytes on the wire.
    pub(super) bytes: u64,
    /// Until the destination's confirmation.
    pub(super) duration: Duration,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// Send what remains while the guest runs, and look again.
    Round,
    /// Slow the guest down to this, then [`Decision::Round`].
    Throttle(Slowdown),
    /// Pause, send the rest, hand over.
    SwitchOver(Pause),
    /// Pause, hand over without the rest, and send that while the guest runs there.
    PostCopy,
    /// Leave the guest where it is.
    GiveUp(GiveUp),
}

/// Does the pause have an end?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pause {
    /// It is taken back when it would exceed the downtime limit.
    Limited,
    /// However long it takes.
    Unlimited,
}

/// Why the guest stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GiveUp {
    /// What remains never fits the downtime limit.
    DidNotConverge,
    /// The time for the whole move is over.
    TimedOut,
}

/// The decisions of one move, and what they rest on.
#[derive(Debug)]
pub(super) struct Policy {
    options: MigrationOptions,
    estimate: Estimate,
    /// The least that remained so far.
    best: u64,
    /// Rounds since then.
    stale: u32,
}

impl Policy {
    pub(super) fn new(options: &MigrationOptions) -> Self {
        Self {
            options: options.clone(),
            estimate: Estimate::new(),
            best: u64::MAX,
            stale: 0,
        }
    }

    /// A small message went there and back.
    pub(super) fn round_trip(&mut self, measured: Duration) {
        self.estimate.round_trip(measured);
    }

    /// A live round was confirmed.
    pub(super) fn round(&mut self, measure: &RoundMeasure) {
        self.estimate
            .round(measure.number, measure.pages, measure.duration);
    }

    /// What a switch-over has taught. The parts that it did not reach are zero.
    pub(super) fn learn(&mut self, measured: Overheads) {
        self.estimate.learn(measured);
    }

    /// A switch-over was taken back, which says nothing about convergence.
    pub(super) fn taken_back(&mut self) {
        self.stale = self.stale.saturating_sub(1);
    }

    /// Time that has to be left when `Commit` is written, so that the guest runs in time.
    pub(super) fn reserve(&self) -> Duration {
        self.estimate.reserve(self.options.downtime_limit)
    }

    /// How long a pause would be if it began now.
    pub(super) fn predicted_pause(&self, pages: u64) -> Duration {
        self.estimate.pause(pages)
    }

    /// What to do next.
    pub(super) fn decide(&mut self, now: &Observation) -> Decision {
        let limit = self.options.downtime_limit;
        let given_up = now.rounds >= self.options.max_rounds
            || self.stale >= STALE_ROUNDS
            || now.switch_overs_aborted >= self.options.max_switch_overs;
        let fits = now.rounds > 0 && self.estimate.fits(now.remaining_pages, limit);
        if self.options.timeout.is_some_and(|most| now.elapsed > most) {
            return Decision::GiveUp(GiveUp::TimedOut);
        }
        if given_up && self.options.on_no_convergence == NoConvergence::Force {
            return Decision::SwitchOver(Pause::Unlimited);
        }
        if given_up {
            return Decision::GiveUp(GiveUp::DidNotConverge);
        }
        if now.remaining_pages < self.best - self.best / 10 {
            self.best = now.remaining_pages;
            self.stale = 0;
        } else {
            self.stale += 1;
        }
        if fits {
            return Decision::SwitchOver(Pause::Limited);
        }
        Decision::Round
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(rounds: u32, remaining_pages: u64) -> Observation {
        Observation {
            rounds,
            elapsed: Duration::from_secs(1),
            remaining_pages,
            dirty_rate: 0.0,
            goodput: 0.0,
            switch_overs_aborted: 0,
            slowdown: Slowdown::NONE,
            post_copy: false,
        }
    }

    fn policy(options: MigrationOptions) -> Policy {
        let mut policy = Policy::new(&options);
        policy.round(&RoundMeasure {
            number: 0,
            pages: 100_000,
            light_pages: 0,
            bytes: 100_000 * 4096,
            duration: Duration::from_secs(1),
        });
        policy
    }

    #[test]
    fn nothing_is_handed_over_before_the_first_round() {
        let mut policy = Policy::new(&MigrationOptions::default());
        assert_eq!(policy.decide(&after(0, 0)), Decision::Round);
    }

    #[test]
    fn what_fits_the_limit_is_handed_over() {
        let mut policy = policy(MigrationOptions::default());
        assert_eq!(policy.decide(&after(1, 90_000)), Decision::Round);
        let pause = Decision::SwitchOver(Pause::Limited);
        assert_eq!(policy.decide(&after(2, 100)), pause);
    }

    #[test]
    fn what_never_shrinks_stays_or_is_forced() {
        let forced = MigrationOptions {
            on_no_convergence: NoConvergence::Force,
            ..MigrationOptions::default()
        };
        let stays = Decision::GiveUp(GiveUp::DidNotConverge);
        let moves = Decision::SwitchOver(Pause::Unlimited);
        for (options, end) in [(MigrationOptions::default(), stays), (forced, moves)] {
            let mut policy = policy(options);
            let mut rounds = 1;
            while policy.decide(&after(rounds, 90_000)) == Decision::Round {
                rounds += 1;
                assert!(rounds < 100);
            }
            assert_eq!(policy.decide(&after(rounds, 90_000)), end);
        }
    }

    #[test]
    fn the_time_for_the_whole_move_is_kept() {
        let mut policy = policy(MigrationOptions {
            timeout: Some(Duration::from_millis(900)),
            ..MigrationOptions::default()
        });
        let end = Decision::GiveUp(GiveUp::TimedOut);
        assert_eq!(policy.decide(&after(1, 90_000)), end);
    }
}
