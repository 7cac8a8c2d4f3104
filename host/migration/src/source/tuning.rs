//! How many lanes a move uses when nobody says: one more, as long as that brings a gain.
//!
//! More connections are not always faster, and each takes processor time that the guest may need.
//! So the first round begins with one lane, and another joins whenever the last one that did has
//! raised what the destination confirms by a sixth at least.

use std::time::{Duration, Instant};

use dunlin_guest::PAGE_SIZE;

/// How long a number of lanes is looked at.
const WINDOW: Duration = Duration::from_millis(250);
/// What one more lane has to bring.
const GAIN: f64 = 1.16;

/// The search of one round.
#[derive(Debug)]
pub(super) struct Tuning {
    lanes: usize,
    most: usize,
    /// Lanes and rate of the best number so far.
    best: (usize, f64),
    /// Pages that were confirmed when the present number began, and when that was.
    from: Option<(u64, Instant)>,
    settled: bool,
}

impl Tuning {
    pub(super) fn begin(lanes: usize, most: usize) -> Self {
        Self {
            lanes,
            most,
            best: (lanes, 0.0),
            from: None,
            settled: lanes >= most,
        }
    }

    /// The number of lanes that was worth it.
    pub(super) fn best(&self) -> usize {
        self.best.0
    }

    /// Shall one more lane join, now that `pages` pages with content were confirmed at `at`?
    pub(super) fn one_more(&mut self, pages: u64, at: Instant) -> bool {
        if self.settled || pages == 0 {
            return false;
        }
        let Some((before, begun)) = self.from else {
            self.from = Some((pages, at));
            return false;
        };
        let time = at.saturating_duration_since(begun);
        if time < WINDOW {
            return false;
        }
        let rate = ((pages - before) * PAGE_SIZE) as f64 / time.as_secs_f64();
        if rate < self.best.1 * GAIN {
            self.settled = true;
            return false;
        }
        self.best = (self.lanes, rate);
        self.settled = self.lanes >= self.most;
        if self.settled {
            return false;
        }
        self.lanes += 1;
        self.from = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of lanes found when `lanes` of them confirm `rate(lanes)` pages a second.
    fn found(most: usize, rate: impl Fn(usize) -> u64) -> usize {
        let begun = Instant::now();
        let mut tuning = Tuning::begin(1, most);
        let (mut lanes, mut pages) = (1, 0);
        for tick in 1..100 {
            pages += rate(lanes) / 10;
            let at = begun + Duration::from_millis(100) * tick;
            lanes += usize::from(tuning.one_more(pages, at));
        }
        assert!(lanes <= most);
        tuning.best()
    }

    #[test]
    fn lanes_are_added_as_long_as_they_gain() {
        assert_eq!(found(8, |lanes| 100_000 * lanes.min(3) as u64), 3);
        assert_eq!(found(2, |lanes| 100_000 * lanes as u64), 2);
        assert_eq!(found(8, |_| 100_000), 1);
        assert_eq!(found(8, |lanes| 100_000 / lanes as u64), 1);
        assert_eq!(found(1, |lanes| 100_000 * lanes as u64), 1);
    }
}
