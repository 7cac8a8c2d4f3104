//! How long a switch-over would pause the guest.
//!
//! Rates come from what the destination has *confirmed*: a round's time runs until its `Stored`
//! arrived. What the socket took says only how much the kernel has buffered. The model is on the
//! pessimistic side: the slowest of the recent rounds, plus the largest overheads seen so far.

use std::collections::VecDeque;
use std::time::Duration;

/// Rounds, and round trips, that count as recent.
const RECENT: usize = 3;
/// A round with fewer pages says more about latency than about rate.
const SMALL_ROUND: u64 = 256;
/// Share of the downtime limit that a predicted pause may take.
const MARGIN: f64 = 0.8;

/// What is assumed before anything was measured.
const FIRST_GUESS: Overheads = Overheads {
    stop: Duration::from_millis(1),
    save: Duration::from_millis(1),
    restore: Duration::from_millis(1),
};

/// Starting at the destination. Nothing teaches more: who has seen a start has moved.
const START: Duration = Duration::from_millis(1);

/// The parts of a pause that do not grow with the pages that remain.
#[derive(Debug, Clone, Copy)]
pub(in crate::source) struct Overheads {
    /// Stopping vCPUs and devices.
    pub(in crate::source) stop: Duration,
    /// Saving states and finding the last pages.
    pub(in crate::source) save: Duration,
    /// Restoring at the destination.
    pub(in crate::source) restore: Duration,
}

impl Overheads {
    fn sum(&self) -> Duration {
        self.stop + self.save + self.restore
    }
}

#[derive(Debug)]
struct Sample {
    pages: u64,
    duration: Duration,
    first: bool,
}

/// The model of one migration.
#[derive(Debug)]
pub(super) struct Estimate {
    overheads: Overheads,
    round_trips: VecDeque<Duration>,
    samples: VecDeque<Sample>,
    latency: Duration,
}

impl Estimate {
    pub(super) fn new() -> Self {
        Self {
            overheads: FIRST_GUESS,
            round_trips: VecDeque::new(),
            samples: VecDeque::new(),
            latency: Duration::ZERO,
        }
    }

    /// A small message went there and back.
    pub(super) fn round_trip(&mut self, measured: Duration) {
        self.round_trips.push_back(measured);
        if self.round_trips.len() > RECENT {
            self.round_trips.pop_front();
        }
    }

    /// The slowest of the recent round trips: it has in it how long the threads of both sides
    /// wait for a processor.
    fn slowest_round_trip(&self) -> Duration {
        self.round_trips.iter().copied().max().unwrap_or_default()
    }

    /// A round was confirmed.
    pub(super) fn round(&mut self, number: u32, pages: u64, duration: Duration) {
        if pages < SMALL_ROUND {
            self.latency = duration;
            return;
        }
        if number > 0 {
            // The first round also looks for zero pages in all of RAM.
            self.samples.retain(|sample| !sample.first);
        }
        self.samples.push_back(Sample {
            pages,
            duration,
            first: number == 0,
        });
        if self.samples.len() > RECENT {
            self.samples.pop_front();
        }
    }

    /// What a switch-over that was taken back has taught. The parts that it did not reach are
    /// zero.
    pub(super) fn learn(&mut self, measured: Overheads) {
        let known = &mut self.overheads;
        known.stop = known.stop.max(measured.stop);
        known.save = known.save.max(measured.save);
        known.restore = known.restore.max(measured.restore);
    }

    /// Seconds that a page takes, at the slowest of the recent rounds.
    fn seconds_a_page(&self) -> f64 {
        self.samples
            .iter()
            .map(|sample| sample.duration.as_secs_f64() / sample.pages as f64)
            .fold(0.0, f64::max)
    }

    /// Time that has to be left when `Commit` is written, so that the guest runs in time.
    pub(super) fn reserve(&self, limit: Duration) -> Duration {
        (self.slowest_round_trip() + START).min(limit / 2)
    }

    /// The part of a pause that `pages` pages take.
    pub(super) fn copying(&self, pages: u64) -> Duration {
        let seconds = self.seconds_a_page() * pages as f64;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4)
    }

    /// The pause when `pages` pages and the states of the machine remain.
    pub(super) fn pause(&self, pages: u64) -> Duration {
        let fixed = self.overheads.sum() + START + self.slowest_round_trip() * 2 + self.latency;
        fixed + self.copying(pages)
    }

    /// Would the pause keep the limit, with some room?
    pub(super) fn fits(&self, pages: u64, limit: Duration) -> bool {
        self.pause(pages) <= limit.mul_f64(MARGIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);
    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_slowest_recent_round_counts() {
        let mut estimate = Estimate::new();
        estimate.round(1, 10_000, ms(10));
        estimate.round(2, 10_000, ms(100));
        estimate.round(3, 10_000, ms(10));
        assert!(!estimate.fits(5_000, LIMIT));
        estimate.round(4, 10_000, ms(10));
        estimate.round(5, 10_000, ms(10));
        assert!(estimate.fits(5_000, LIMIT));
    }

    #[test]
    fn one_small_slow_round_does_not_spoil_the_rate() {
        let mut estimate = Estimate::new();
        estimate.round(1, 10_000, ms(10));
        estimate.round(2, 1, ms(10));
        assert!(estimate.fits(5_000, LIMIT));
    }

    #[test]
    fn the_reserve_follows_the_slowest_recent_round_trip() {
        let mut estimate = Estimate::new();
        estimate.round_trip(ms(1));
        estimate.round_trip(ms(12));
        assert_eq!(estimate.reserve(LIMIT), ms(13));
        (0..RECENT).for_each(|_| estimate.round_trip(ms(1)));
        assert_eq!(estimate.reserve(LIMIT), ms(2));
        estimate.round_trip(ms(500));
        assert_eq!(estimate.reserve(LIMIT), LIMIT / 2);
    }

    #[test]
    fn what_a_failed_switch_over_took_is_believed() {
        let mut estimate = Estimate::new();
        estimate.round(1, 10_000, ms(10));
        assert!(estimate.fits(100, LIMIT));
        estimate.learn(Overheads {
            stop: Duration::ZERO,
            save: Duration::ZERO,
            restore: ms(60),
        });
        assert!(!estimate.fits(100, LIMIT));
    }
}
