//! A limit for log lines that a guest can cause.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Milliseconds between two lines.
const INTERVAL: u64 = 1000;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Allows one line a second.
#[derive(Debug, Default)]
pub(super) struct LogLimit {
    /// When the next line is allowed, in milliseconds since `START`.
    next: AtomicU64,
}

impl LogLimit {
    /// May a line be logged now?
    pub(super) fn allows(&self) -> bool {
        self.allows_at(START.elapsed().as_millis() as u64)
    }

    fn allows_at(&self, now: u64) -> bool {
        let next = self.next.load(Ordering::Relaxed);
        now >= next
            && self
                .next
                .compare_exchange(next, now + INTERVAL, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_is_allowed() {
        let limit = LogLimit::default();
        let allowed = [0, 1, 999, 1000, 1500, 2500].map(|now| limit.allows_at(now));
        assert_eq!(allowed, [true, false, false, true, false, true]);
    }
}
