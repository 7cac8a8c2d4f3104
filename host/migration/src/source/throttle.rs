//! Keeps to a bandwidth limit.

use std::time::{Duration, Instant};

/// How much may go out at once after a pause.
const BURST: Duration = Duration::from_millis(20);

/// A token bucket: credit grows with time up to a burst, sending takes from it, and who has
/// overdrawn waits.
#[derive(Debug)]
pub(crate) struct Throttle {
    bytes_per_second: Option<f64>,
    credit: f64,
    updated: Instant,
}

impl Throttle {
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second: bytes_per_second.map(|rate| rate.max(1) as f64),
            credit: 0.0,
            updated: Instant::now(),
        }
    }

    /// Pages in a batch, so that one batch is not much longer than a burst.
    pub(crate) fn batch_pages(&self, most: usize) -> usize {
        self.bytes_per_second.map_or(most, |rate| {
            ((rate * BURST.as_secs_f64()) as usize / crate::pages::PAGE).clamp(1, most)
        })
    }

    /// Takes `bytes` from the bucket at `now`; how long to wait before sending them.
    pub(crate) fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.bytes_per_second else {
            return Duration::ZERO;
        };
        let elapsed = now.saturating_duration_since(self.updated).as_secs_f64();
        self.updated = now;
        self.credit = (self.credit + elapsed * rate).min(rate * BURST.as_secs_f64());
        self.credit -= bytes as f64;
        Duration::try_from_secs_f64((-self.credit).max(0.0) / rate).unwrap_or(Duration::MAX)
    }

    /// Bytes that were taken and not sent.
    pub(super) fn give_back(&mut self, bytes: u64) {
        if self.bytes_per_second.is_some() {
            self.credit += bytes as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_time_no_more_than_the_limit_goes_out() {
        let mut throttle = Throttle::new(Some(1_000_000));
        let begin = Instant::now();
        let mut now = begin;
        for _ in 0..100 {
            now += throttle.take(10_000, now);
        }
        let took = (now - begin).as_secs_f64();
        assert!((0.97..1.03).contains(&took), "{took}");
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let mut throttle = Throttle::new(None);
        assert_eq!(throttle.take(u64::MAX, Instant::now()), Duration::ZERO);
        assert_eq!(throttle.batch_pages(128), 128);
    }
}
