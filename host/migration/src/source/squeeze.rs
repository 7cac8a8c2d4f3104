//! Whether pages are compressed: only where it was measured to gain time.
//!
//! A batch that goes out as it is takes the time that the lane took it in, and the time that the
//! bandwidth limit made it wait. A compressed one takes the compressing, and a share of that time.
//! Now and then the way that is not in use is tried, so that both are known.

use std::time::Duration;

use super::packing::Flushed;
use crate::options::Compression;

/// Every so many batches the other way is tried.
const TRY_EVERY: u32 = 64;
/// Weight of a new measurement.
const WEIGHT: f64 = 0.25;
/// What compression has to gain.
const GAIN: f64 = 0.9;

/// What one lane knows.
#[derive(Debug)]
pub(super) struct Advice {
    mode: Compression,
    /// Seconds that a byte takes on the wire.
    wire: Option<f64>,
    /// Seconds that compressing takes a byte of pages, and what is left of that byte.
    squeeze: Option<(f64, f64)>,
    batches: u32,
    waited: Duration,
}

impl Advice {
    pub(super) fn new(mode: Compression) -> Self {
        Self {
            mode,
            wire: None,
            squeeze: None,
            batches: 0,
            waited: Duration::ZERO,
        }
    }

    /// Is the next batch to be compressed?
    pub(super) fn compress(&mut self) -> bool {
        match self.mode {
            Compression::Off => return false,
            Compression::Lz4 => return true,
            Compression::Auto => {}
        }
        self.batches += 1;
        let gains = self.gains();
        if self.batches % TRY_EVERY == TRY_EVERY / 2 {
            return !gains;
        }
        gains
    }

    fn gains(&self) -> bool {
        let (Some(wire), Some((time, left))) = (self.wire, self.squeeze) else {
            return false;
        };
        time + left * wire < wire * GAIN
    }

    /// The bandwidth limit made the next batch wait.
    pub(super) fn waited(&mut self, time: Duration) {
        self.waited += time;
    }

    /// A batch went out.
    pub(super) fn flushed(&mut self, flushed: &Flushed, took: Duration) {
        let waited = std::mem::take(&mut self.waited);
        let bytes = (flushed.pages * crate::pages::PAGE) as f64;
        if bytes < 65_536.0 {
            return;
        }
        match flushed.compressing {
            Some(compressing) => {
                let left = flushed.bytes as f64 / bytes;
                let now = (compressing.as_secs_f64() / bytes, left);
                let old = self.squeeze.unwrap_or(now);
                self.squeeze = Some((blend(old.0, now.0), blend(old.1, now.1)));
                // Less went out: the lane says what that took.
                if left > 0.05 {
                    let wire = took.saturating_sub(compressing) + waited;
                    self.learn_wire(wire.as_secs_f64() / (bytes * left));
                }
            }
            None => self.learn_wire((took + waited).as_secs_f64() / bytes),
        }
    }

    fn learn_wire(&mut self, seconds: f64) {
        let old = self.wire.unwrap_or(seconds);
        self.wire = Some(blend(old, seconds));
    }
}

fn blend(old: f64, new: f64) -> f64 {
    old + (new - old) * WEIGHT
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: usize = 128;

    /// Batches over a wire of so many MB/s, of pages that shrink to `left` at 1 GB/s.
    fn run(mode: Compression, megabytes: f64, left: f64) -> usize {
        let mut advice = Advice::new(mode);
        let bytes = (BATCH * 4096) as f64;
        (0..640)
            .filter(|_| {
                let squeezed = advice.compress();
                let compressing = squeezed.then(|| Duration::from_secs_f64(bytes / 1e9));
                let bytes = if squeezed { bytes * left } else { bytes };
                let wire = Duration::from_secs_f64(bytes / megabytes / 1e6);
                let flushed = Flushed {
                    pages: BATCH,
                    bytes: bytes as usize,
                    compressing,
                };
                advice.flushed(&flushed, wire + compressing.unwrap_or_default());
                squeezed
            })
            .count()
    }

    #[test]
    fn a_slow_wire_is_worth_compressing_for_and_a_fast_one_is_not() {
        assert!(run(Compression::Auto, 100.0, 0.3) > 500);
        assert!(run(Compression::Auto, 4000.0, 0.3) < 20);
    }

    #[test]
    fn random_pages_are_not_compressed_for_long() {
        assert!(run(Compression::Auto, 100.0, 1.0) < 20);
    }

    #[test]
    fn a_word_is_kept() {
        assert_eq!(run(Compression::Off, 1.0, 0.1), 0);
        assert_eq!(run(Compression::Lz4, 1e6, 1.0), 640);
    }
}
