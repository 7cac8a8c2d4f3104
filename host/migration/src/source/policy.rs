//! What a move does next. Pure: it is told what was measured, looks at no clock and touches no
//! machine, so that every decision can be tried in a test.
//!
//! The source asks once after each harvest of the dirty log, and does what the answer says.

mod estimate;

use std::time::Duration;

pub(super) use estimate::Overheads;

use self::estimate::Estimate;
use crate::machine::Slowdown;
use crate::options::{MigrationOptions, Mode, NoConvergence};

/// Rounds in which what remains may fail to shrink by a tenth before the guest is slowed down or
/// its memory follows it.
const STUCK_ROUNDS: u32 = 2;
/// Rounds of that kind before nothing more is tried.
const STALE_ROUNDS: u32 = 8;
/// Rounds for a shorter pause alone.
const POLISH_ROUNDS: u32 = 6;
/// Times that memory may be about to follow the guest, and the pause is taken back.
const MOST_FOLLOWS: u32 = 8;
/// Copying during the pause that is not worth another round.
const WORTH: Duration = Duration::from_micros(500);
/// Share of the limit that copying may take for a switch-over to be tried against the odds.
const TRY: f64 = 0.3;
/// The most that a guest is slowed down when its memory could follow it instead.
const BEARABLE: Slowdown = Slowdown::percent(20);
/// The most that it is slowed down when there is no other way.
const HARSH: Slowdown = Slowdown::percent(90);
/// Share of the goodput that a guest may dirty for each round to be clearly smaller than the last.
const SHRINK: f64 = 0.6;

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
///
/// ```text
///            fits, and another round would not shrink it much
///  Round ──────────────────────────────────────────────────────────▶ SwitchOver
///    │ what remains does not shrink any more
///    ├── a slowdown that the guest can bear makes it shrink ────────▶ Throttle
///    ├── else, when both sides can ─────────────────────────────────▶ PostCopy
///    ├── else ──▶ Throttle, more and more
///    └── nothing helped, or no time is left ────────────────────────▶ GiveUp, or a forced SwitchOver
/// ```
#[derive(Debug)]
pub(super) struct Policy {
    options: MigrationOptions,
    estimate: Estimate,
    /// The least that remained so far.
    best: u64,
    /// Rounds since then.
    stale: u32,
    /// What remained at the last decision.
    last: u64,
    /// Rounds that were made although what remained fitted.
    polish: u32,
    /// Times that memory was to follow the guest.
    follows: u32,
}

impl Policy {
    pub(super) fn new(options: &MigrationOptions) -> Self {
        Self {
            options: options.clone(),
            estimate: Estimate::new(),
            best: u64::MAX,
            stale: 0,
            last: u64::MAX,
            polish: 0,
            follows: 0,
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
        self.polish = 0;
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
        let decision = self.weigh(now);
        self.follows += u32::from(decision == Decision::PostCopy);
        decision
    }

    fn weigh(&mut self, now: &Observation) -> Decision {
        let given_up = now.rounds >= self.options.max_rounds
            || self.stale >= STALE_ROUNDS
            || now.switch_overs_aborted >= self.options.max_switch_overs;
        if self.options.timeout.is_some_and(|most| now.elapsed > most) {
            return Decision::GiveUp(GiveUp::TimedOut);
        }
        // Its pause has the same limit, and may be taken back.
        let may_follow =
            now.post_copy && self.options.mode != Mode::Pre && self.follows < MOST_FOLLOWS;
        if now.rounds > 0 && self.options.mode == Mode::Post && may_follow {
            return Decision::PostCopy;
        }
        if given_up {
            return self.give_up(may_follow);
        }
        let before = std::mem::replace(&mut self.last, now.remaining_pages);
        if now.remaining_pages < self.best - self.best / 10 {
            self.best = now.remaining_pages;
            self.stale = 0;
        } else {
            self.stale += 1;
        }
        let limit = self.options.downtime_limit;
        if now.rounds > 0 && self.estimate.fits(now.remaining_pages, limit) {
            if self.is_worth_a_round(now, before) {
                self.polish += 1;
                return Decision::Round;
            }
            return Decision::SwitchOver(Pause::Limited);
        }
        if now.rounds > 0 && self.stale > 0 && self.is_worth_a_try(now.remaining_pages) {
            return Decision::SwitchOver(Pause::Limited);
        }
        if self.stale >= STUCK_ROUNDS {
            return self.unstick(now, may_follow);
        }
        Decision::Round
    }

    /// What remains fits. The pause would be shorter still at the local minimum: another round is
    /// made as long as each shrinks what remains by a fifth, and what remains counts at all.
    fn is_worth_a_round(&self, now: &Observation, before: u64) -> bool {
        let shrinks = now.rounds == 1 || now.remaining_pages < before - before / 5;
        let counts = self.estimate.copying(now.remaining_pages) > WORTH;
        self.polish < POLISH_ROUNDS && shrinks && counts
    }

    /// What remains takes a small part of the limit, and the rest of the prediction is overheads
    /// that more rounds do not change. The limit is kept even when the try fails, and a try teaches
    /// what the overheads are.
    fn is_worth_a_try(&self, pages: u64) -> bool {
        self.estimate.copying(pages) < self.options.downtime_limit.mul_f64(TRY)
    }

    fn give_up(&self, may_follow: bool) -> Decision {
        if may_follow {
            Decision::PostCopy
        } else if self.options.on_no_convergence == NoConvergence::Force {
            Decision::SwitchOver(Pause::Unlimited)
        } else {
            Decision::GiveUp(GiveUp::DidNotConverge)
        }
    }

    /// Rounds alone do not help any more.
    fn unstick(&mut self, now: &Observation, may_follow: bool) -> Decision {
        let bearable = self.helpful_slowdown(now).filter(|&slowdown| {
            slowdown <= if may_follow { BEARABLE } else { HARSH } && slowdown > now.slowdown
        });
        if let Some(slowdown) = bearable {
            self.stale = 0;
            return Decision::Throttle(slowdown);
        }
        if may_follow {
            return Decision::PostCopy;
        }
        let more =
            Slowdown::percent(now.slowdown.as_percent().max(10).saturating_mul(2)).min(HARSH);
        if more > now.slowdown {
            return Decision::Throttle(more);
        }
        Decision::Round
    }

    /// The slowdown at which a guest would dirty, during the time that one round of what remains
    /// takes, no more than fits. `None` when nothing was measured.
    fn helpful_slowdown(&self, now: &Observation) -> Option<Slowdown> {
        if now.dirty_rate <= 0.0 || now.goodput <= 0.0 {
            return None;
        }
        let unthrottled = now.dirty_rate / (1.0 - f64::from(now.slowdown.as_percent()) / 100.0);
        let bearable = now.goodput * SHRINK;
        let share = (1.0 - bearable / unthrottled).clamp(0.0, 0.99);
        Some(Slowdown::percent((share * 100.0).ceil() as u8))
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
        assert_eq!(policy.decide(&after(2, 40)), pause);
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
            let mut slowdown = Slowdown::NONE;
            loop {
                let now = Observation {
                    slowdown,
                    ..after(rounds, 90_000)
                };
                match policy.decide(&now) {
                    Decision::Throttle(more) => {
                        assert!(more > slowdown);
                        slowdown = more;
                    }
                    Decision::Round => {}
                    decision => break assert_eq!(decision, end),
                }
                rounds += 1;
                assert!(rounds < 100);
            }
            assert_eq!(slowdown, HARSH, "all else was tried before");
        }
    }

    /// A guest that dirties `rate` over a wire of `goodput` bytes a second.
    fn stuck(mode: Mode, post_copy: bool, rate: f64, goodput: f64) -> Decision {
        let mut policy = policy(MigrationOptions {
            mode,
            ..MigrationOptions::default()
        });
        for rounds in 1..20 {
            let now = Observation {
                dirty_rate: rate,
                goodput,
                post_copy,
                ..after(rounds, 90_000)
            };
            match policy.decide(&now) {
                Decision::Round => {}
                decision => return decision,
            }
        }
        panic!("no decision");
    }

    #[test]
    fn a_guest_that_cannot_be_caught_up_with_goes_first_and_its_memory_follows() {
        assert_eq!(stuck(Mode::Auto, true, 2e9, 1e9), Decision::PostCopy);
        assert!(matches!(
            stuck(Mode::Auto, false, 2e9, 1e9),
            Decision::Throttle(s) if s.as_percent() == 70
        ));
        assert!(matches!(
            stuck(Mode::Pre, true, 2e9, 1e9),
            Decision::Throttle(_)
        ));
    }

    #[test]
    fn a_guest_that_is_a_little_too_fast_is_slowed_down_a_little() {
        assert!(matches!(
            stuck(Mode::Auto, true, 0.7e9, 1e9),
            Decision::Throttle(s) if s.as_percent() == 15
        ));
    }

    #[test]
    fn a_pause_that_only_overheads_may_make_too_long_is_tried() {
        let mut policy = policy(MigrationOptions {
            downtime_limit: Duration::from_millis(10),
            ..MigrationOptions::default()
        });
        policy.round_trip(Duration::from_millis(20));
        let pause = Decision::SwitchOver(Pause::Limited);
        assert_eq!(policy.decide(&after(1, 0)), Decision::Round);
        assert_eq!(policy.decide(&after(2, 0)), pause);
    }

    #[test]
    fn a_guest_whose_every_pause_is_taken_back_stays_in_the_end() {
        for mode in [Mode::Auto, Mode::Post] {
            let mut policy = policy(MigrationOptions {
                mode,
                ..MigrationOptions::default()
            });
            let mut switch_overs_aborted = 0;
            let end = (1..200).find_map(|rounds| {
                let now = Observation {
                    dirty_rate: 2e9,
                    goodput: 1e9,
                    post_copy: true,
                    switch_overs_aborted,
                    slowdown: HARSH,
                    ..after(rounds.min(30), 90_000)
                };
                match policy.decide(&now) {
                    Decision::PostCopy | Decision::SwitchOver(_) => {
                        switch_overs_aborted += 1;
                        policy.taken_back();
                        None
                    }
                    Decision::GiveUp(why) => Some(why),
                    _ => None,
                }
            });
            assert_eq!(end, Some(GiveUp::DidNotConverge), "{mode:?}");
            assert!(switch_overs_aborted >= MOST_FOLLOWS);
        }
    }

    #[test]
    fn asked_for_post_copy_follows_the_first_round() {
        let mut policy = policy(MigrationOptions {
            mode: Mode::Post,
            ..MigrationOptions::default()
        });
        let with = |rounds| Observation {
            post_copy: true,
            ..after(rounds, 100)
        };
        assert_eq!(policy.decide(&with(0)), Decision::Round);
        assert_eq!(policy.decide(&with(1)), Decision::PostCopy);
        let pause = Decision::SwitchOver(Pause::Limited);
        assert_eq!(policy.decide(&after(1, 40)), pause, "the peer cannot");
    }

    #[test]
    fn a_pause_that_keeps_the_limit_is_made_shorter_while_rounds_shrink() {
        let mut policy = policy(MigrationOptions {
            downtime_limit: Duration::from_millis(300),
            ..MigrationOptions::default()
        });
        let pause = Decision::SwitchOver(Pause::Limited);
        let mut seen = Vec::new();
        for (round, remaining) in [(1, 20_000), (2, 6000), (3, 2000), (4, 1900)] {
            seen.push(policy.decide(&after(round, remaining)));
        }
        assert_eq!(
            seen,
            [Decision::Round, Decision::Round, Decision::Round, pause]
        );
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
