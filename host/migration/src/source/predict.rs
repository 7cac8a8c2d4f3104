//! What a move would take, told beforehand. Pure: it looks at no clock and touches no machine.
//!
//! The move is played through with the `Policy` that would decide it: a round takes as long as
//! its bytes take at the goodput, and leaves what the guest dirties in that time. How much that
//! is, a [`DirtyCurve`] says: a guest that writes the same pages again dirties few in a long
//! time, and one that goes on to others many.

mod census;

use std::time::Duration;

pub use census::{Census, census};

use super::policy::{Decision, Observation, Policy, RoundMeasure};
use crate::machine::Slowdown;
use crate::options::MigrationOptions;
use crate::pages::PAGE;

/// Decisions after which a move counts as endless; the policy's own limits come far earlier.
const MOST_DECISIONS: u32 = 10_000;
/// Bytes a second that are looked at for zeros, at least.
const LOOKING: f64 = 2e9;
/// The curve goes on as a straight line when its second half is at least so steep as its first.
const STRAIGHT: f64 = 0.95;

/// One harvest of the dirty log while the guest ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// Since the harvest before.
    pub duration: Duration,
    /// Pages that were dirtied in that time.
    pub dirtied: u64,
    /// Those of them that no earlier slice has.
    pub fresh: u64,
}

/// How many different pages a guest dirties in a time.
///
/// ```text
///  pages                             ........ falls off: a working set
///    │                   ....·····'''
///    │            ..··''      measured │ continued
///    │       .·''
///    │    .'
///    └──────────────────────────────────────── time
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DirtyCurve {
    /// Seconds, and pages dirtied until then; both grow. Zero at zero is left out.
    points: Vec<(f64, f64)>,
    /// Pages a second, where a page counts in each slice anew.
    rate: f64,
}

impl DirtyCurve {
    /// The curve of slices that followed each other.
    pub fn from_slices(slices: &[Slice]) -> Self {
        let (mut time, mut pages, mut dirtied) = (0.0, 0.0, 0.0);
        let mut points = Vec::with_capacity(slices.len());
        for slice in slices.iter().filter(|slice| !slice.duration.is_zero()) {
            time += slice.duration.as_secs_f64();
            pages += slice.fresh as f64;
            dirtied += slice.dirtied.max(slice.fresh) as f64;
            points.push((time, pages));
        }
        let rate = if time > 0.0 { dirtied / time } else { 0.0 };
        Self { points, rate }
    }

    /// How long was measured.
    pub fn measured(&self) -> Duration {
        let seconds = self.points.last().map_or(0.0, |&(time, _)| time);
        Duration::try_from_secs_f64(seconds).unwrap_or_default()
    }

    /// Pages that were dirtied meanwhile.
    pub fn pages(&self) -> u64 {
        self.points.last().map_or(0, |&(_, pages)| pages as u64)
    }

    /// Pages that are dirtied in a second, where one that is written again and again counts as
    /// often as the dirty log was harvested.
    pub fn pages_a_second(&self) -> f64 {
        self.rate
    }

    /// Different pages that are dirtied in `time`.
    pub fn pages_in(&self, time: Duration) -> f64 {
        let time = time.as_secs_f64();
        let mut before = (0.0, 0.0);
        for &point in &self.points {
            if time <= point.0 {
                let share = (time - before.0) / (point.0 - before.0);
                return before.1 + share * (point.1 - before.1);
            }
            before = point;
        }
        before.1 + self.beyond(time - before.0)
    }

    /// Pages that are dirtied for the first time in `more` seconds behind the measurement: the
    /// slope goes on to fall as it fell from the second quarter to the second half.
    fn beyond(&self, more: f64) -> f64 {
        let Some(&(end, pages)) = self.points.last() else {
            return 0.0;
        };
        let at = |time: f64| self.pages_in(Duration::try_from_secs_f64(time).unwrap_or_default());
        let earlier = (at(end / 2.0) - at(end / 4.0)) / (end / 4.0);
        let later = (pages - at(end / 2.0)) / (end / 2.0);
        if later <= 0.0 {
            return 0.0;
        }
        if earlier <= 0.0 || later >= earlier * STRAIGHT {
            return later * more;
        }
        // The middles of both parts lie three eighths of the measurement apart, and the later one
        // a quarter before its end.
        let fall = (end * 3.0 / 8.0) / (earlier / later).ln();
        let slope = later * (-(end / 4.0) / fall).exp();
        slope * fall * (1.0 - (-more / fall).exp())
    }
}

/// The guest that would move.
#[derive(Debug, Clone, PartialEq)]
pub struct Guest {
    /// Pages of RAM.
    pub pages: u64,
    /// Those of them that were ever touched: each is looked at.
    pub touched_pages: u64,
    /// Those of them that are not zero.
    pub content_pages: u64,
    /// What it dirties.
    pub dirty: DirtyCurve,
}

/// The way to the destination.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Path {
    /// Bytes a second that arrive.
    pub goodput: f64,
    /// There and back.
    pub round_trip: Duration,
    /// Both sides can do post-copy.
    pub post_copy: bool,
}

/// What a move is expected to take.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Prediction {
    /// From the start to the end.
    pub total: Duration,
    /// Bytes of pages on the wire.
    pub bytes: u64,
    /// The guest's pause at the hand-over; of a move that would be given up, the pause that it
    /// would have taken.
    pub blackout: Duration,
    /// Share of its speed that the guest loses meanwhile, from 0 to 1.
    pub slowdown: f64,
    /// Rounds of copying while the guest runs.
    pub rounds: u32,
    /// What remains comes to fit the downtime limit.
    pub converges: bool,
    /// The guest goes ahead of the rest of its memory.
    pub post_copy: bool,
}

/// Plays the move through.
pub fn predict(guest: &Guest, path: &Path, options: &MigrationOptions) -> Prediction {
    let mut play = Play::new(guest, path, options);
    for _ in 0..MOST_DECISIONS {
        match play.decide() {
            Decision::Round => play.round(),
            Decision::Throttle(slowdown) => {
                play.slowdown = slowdown;
                play.round();
            }
            Decision::SwitchOver(_) => return play.switch_over(),
            Decision::PostCopy => return play.post_copy(),
            Decision::GiveUp(_) => break,
        }
    }
    play.give_up()
}

/// A move that is played through.
struct Play<'a> {
    guest: &'a Guest,
    path: &'a Path,
    policy: Policy,
    limit: Duration,
    /// Pages that the destination lacks; in the first round, those of zeros too.
    remaining: u64,
    /// Those of them with content.
    content: u64,
    slowdown: Slowdown,
    /// Seconds of guest time that were withheld.
    lost: f64,
    elapsed: Duration,
    dirty_rate: f64,
    goodput: f64,
    done: Prediction,
}

impl<'a> Play<'a> {
    fn new(guest: &'a Guest, path: &'a Path, options: &MigrationOptions) -> Self {
        let mut policy = Policy::new(options);
        policy.round_trip(path.round_trip);
        Self {
            guest,
            path,
            policy,
            limit: options.downtime_limit,
            remaining: guest.pages,
            content: guest.content_pages.min(guest.pages),
            slowdown: Slowdown::NONE,
            lost: 0.0,
            elapsed: path.round_trip,
            dirty_rate: 0.0,
            goodput: 0.0,
            done: Prediction::default(),
        }
    }

    fn decide(&mut self) -> Decision {
        self.policy.decide(&Observation {
            rounds: self.done.rounds,
            elapsed: self.elapsed,
            remaining_pages: self.remaining,
            dirty_rate: self.dirty_rate,
            goodput: self.goodput,
            switch_overs_aborted: 0,
            slowdown: self.slowdown,
            post_copy: self.path.post_copy,
        })
    }

    /// How long so many pages are on their way.
    fn sending(&self, pages: u64) -> Duration {
        let seconds = bytes(pages) as f64 / self.path.goodput.max(1.0);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4)
    }

    fn withheld(&self) -> f64 {
        f64::from(self.slowdown.as_percent()) / 100.0
    }

    /// Sends what remains while the guest runs.
    fn round(&mut self) {
        let mut sending = self.sending(self.content);
        if self.done.rounds == 0 {
            let looking = bytes(self.guest.touched_pages.min(self.guest.pages)) as f64 / LOOKING;
            sending = sending.max(Duration::from_secs_f64(looking));
        }
        let duration = self.path.round_trip.saturating_add(sending);
        self.policy.round(&RoundMeasure {
            number: self.done.rounds,
            pages: self.content,
            light_pages: self.remaining - self.content,
            bytes: bytes(self.content),
            duration,
        });
        let seconds = duration.as_secs_f64().max(1e-9);
        let guest_time = duration.mul_f64(1.0 - self.withheld());
        let dirtied = self.guest.dirty.pages_in(guest_time).round() as u64;
        let dirtied = dirtied.min(self.guest.pages);
        self.goodput = bytes(self.remaining) as f64 / seconds;
        self.dirty_rate = bytes(dirtied) as f64 / seconds;
        self.lost += seconds * self.withheld();
        self.elapsed = self.elapsed.saturating_add(duration);
        self.done.bytes = self.done.bytes.saturating_add(bytes(self.content));
        self.done.rounds += 1;
        (self.remaining, self.content) = (dirtied, dirtied);
    }

    fn finish(mut self) -> Prediction {
        self.done.total = self.elapsed;
        self.done.slowdown = (self.lost / self.elapsed.as_secs_f64().max(1e-9)).clamp(0.0, 1.0);
        self.done
    }

    fn pause(&mut self, pages: u64) {
        self.done.blackout = self.policy.predicted_pause(pages);
        self.lost += self.done.blackout.as_secs_f64();
        self.elapsed = self.elapsed.saturating_add(self.done.blackout);
    }

    fn switch_over(mut self) -> Prediction {
        self.pause(self.remaining);
        self.done.bytes = self.done.bytes.saturating_add(bytes(self.content));
        self.done.converges = self.done.blackout <= self.limit;
        self.finish()
    }

    /// The guest waits for each missing page that it touches, while the rest follows.
    fn post_copy(mut self) -> Prediction {
        let (missing, content) = (self.remaining, self.content);
        self.pause(0);
        let following = self.sending(content);
        let touched = self.guest.dirty.pages_in(following).min(missing as f64);
        let fault = self.path.round_trip.saturating_add(self.sending(1));
        let waiting = fault.as_secs_f64() * touched;
        self.lost += waiting.min(following.as_secs_f64());
        self.elapsed = self.elapsed.saturating_add(following);
        self.done.bytes = self.done.bytes.saturating_add(bytes(content));
        self.done.post_copy = true;
        self.finish()
    }

    fn give_up(mut self) -> Prediction {
        self.done.blackout = self.policy.predicted_pause(self.remaining);
        self.finish()
    }
}

fn bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE as u64)
}

#[cfg(test)]
mod tests;
