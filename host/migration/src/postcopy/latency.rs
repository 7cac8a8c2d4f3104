//! How long faults waited.

use std::time::Duration;

/// Parts that each doubling of time is divided into: a quantile is off by a sixteenth at most.
const PARTS: u32 = 16;
const SHIFT: u32 = PARTS.trailing_zeros();
/// Microseconds up to 2^32 fall into a bucket of their own size.
const BUCKETS: usize = ((32 - SHIFT + 1) * PARTS) as usize;

/// Durations in microseconds, counted in buckets that grow with them.
#[derive(Debug, Clone)]
pub(crate) struct Latency {
    buckets: Vec<u64>,
    count: u64,
    max: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            buckets: vec![0; BUCKETS],
            count: 0,
            max: 0,
        }
    }
}

fn bucket(us: u64) -> usize {
    let us = us.min(u64::from(u32::MAX)) as u32;
    if us < PARTS {
        return us as usize;
    }
    let octave = us.ilog2() - SHIFT;
    (octave * PARTS + (us >> octave)) as usize
}

/// The longest duration of a bucket.
fn upper_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let parts = u64::from(PARTS);
    if bucket < 2 * parts {
        return bucket;
    }
    let octave = bucket / parts - 1;
    ((bucket % parts + parts + 1) << octave) - 1
}

impl Latency {
    pub(crate) fn record(&mut self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        if let Some(count) = self.buckets.get_mut(bucket(us)) {
            *count += 1;
        }
        self.count += 1;
        self.max = self.max.max(us);
    }

    pub(crate) fn max(&self) -> u64 {
        self.max
    }

    /// So many microseconds at most took `percent` of what was recorded.
    pub(crate) fn percentile(&self, percent: u64) -> u64 {
        let rank = (self.count * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return upper_end(bucket).min(self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_off_by_a_sixteenth_at_most() {
        let mut latency = Latency::default();
        for us in 1..=10_000 {
            latency.record(Duration::from_micros(us));
        }
        for (percent, exact) in [(50, 5000.0), (99, 9900.0)] {
            let found = latency.percentile(percent) as f64;
            assert!(
                found >= exact && found <= exact * 1.07,
                "{percent}: {found}"
            );
        }
        assert_eq!(latency.max(), 10_000);
        assert_eq!(latency.percentile(100), 10_000);
    }

    #[test]
    fn every_duration_has_a_bucket_that_holds_it() {
        for power in 0..64 {
            for us in [(1u64 << power) - 1, 1 << power, (1 << power) + 1] {
                let at = bucket(us);
                assert!(at < BUCKETS, "{us}");
                if us < 1 << 32 {
                    assert!(us <= upper_end(at), "{us}");
                    assert!(at == 0 || us > upper_end(at - 1), "{us}");
                }
            }
        }
        assert_eq!(Latency::default().percentile(99), 0);
    }
}
