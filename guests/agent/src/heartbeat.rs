//! Notices moments in which the guest did not run.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The heart beats this often; a longer pause is a gap.
const PERIOD: Duration = Duration::from_micros(500);
/// Beats remembered for the distribution.
const REMEMBERED: usize = 1 << 16;

/// A thread that wakes every half millisecond and records how late it was.
pub(crate) struct Heartbeat {
    gaps: Arc<Mutex<Vec<u32>>>,
    longest: Arc<AtomicU64>,
    beats: Arc<AtomicU64>,
}

/// Distribution of the pauses between beats, in microseconds.
pub(crate) struct Gaps {
    pub(crate) beats: u64,
    pub(crate) median_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) max_us: u64,
}

impl Heartbeat {
    pub(crate) fn start() -> Self {
        let gaps = Arc::new(Mutex::new(Vec::with_capacity(REMEMBERED)));
        let longest = Arc::new(AtomicU64::new(0));
        let beats = Arc::new(AtomicU64::new(0));
        let heart = Self {
            gaps: Arc::clone(&gaps),
            longest: Arc::clone(&longest),
            beats: Arc::clone(&beats),
        };
        std::thread::spawn(move || {
            let mut last = Instant::now();
            loop {
                std::thread::sleep(PERIOD);
                let now = Instant::now();
                let gap = now.duration_since(last).as_micros() as u64;
                last = now;
                longest.fetch_max(gap, Ordering::Relaxed);
                let beat = beats.fetch_add(1, Ordering::Relaxed) as usize;
                let mut gaps = lock(&gaps);
                if gaps.len() < REMEMBERED {
                    gaps.push(gap as u32);
                } else {
                    gaps[beat % REMEMBERED] = gap as u32;
                }
            }
        });
        heart
    }

    /// Forgets what was seen so far.
    pub(crate) fn reset(&self) {
        lock(&self.gaps).clear();
        self.beats.store(0, Ordering::Relaxed);
        self.longest.store(0, Ordering::Relaxed);
    }

    pub(crate) fn gaps(&self) -> Gaps {
        let mut sorted = lock(&self.gaps).clone();
        sorted.sort_unstable();
        let at = |share: usize| {
            let index = (sorted.len() * share / 100).min(sorted.len().saturating_sub(1));
            sorted.get(index).copied().map_or(0, u64::from)
        };
        Gaps {
            beats: self.beats.load(Ordering::Relaxed),
            median_us: at(50),
            p99_us: at(99),
            max_us: self.longest.load(Ordering::Relaxed),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
