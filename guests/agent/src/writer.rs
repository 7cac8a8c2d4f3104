//! Dirties memory at a set rate and checks that nothing it wrote was lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGE_WORDS: usize = 512;
const PAGES_PER_MIB: u64 = 256;
const TICK: Duration = Duration::from_millis(1);

/// A thread that walks over a working set and rewrites every page in turn.
#[derive(Default)]
pub(crate) struct Writer {
    working_set_mib: AtomicU64,
    rate_mib: AtomicU64,
    pages_written: AtomicU64,
    errors: AtomicU64,
}

impl Writer {
    pub(crate) fn start(working_set_mib: u64, rate_mib: u64) -> Arc<Self> {
        let writer = Arc::new(Self::default());
        writer.set(working_set_mib, rate_mib);
        let thread = Arc::clone(&writer);
        std::thread::spawn(move || thread.run());
        writer
    }

    /// Sets working set (MiB) and rate (MiB/s); zero stops the writer.
    pub(crate) fn set(&self, working_set_mib: u64, rate_mib: u64) {
        self.rate_mib.store(rate_mib, Ordering::Relaxed);
        self.working_set_mib
            .store(working_set_mib, Ordering::Relaxed);
    }

    pub(crate) fn pages_written(&self) -> u64 {
        self.pages_written.load(Ordering::Relaxed)
    }

    /// Pages whose content was not what had been written last.
    pub(crate) fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    fn run(&self) {
        let mut set = WorkingSet::default();
        let mut owed = 0.0;
        let mut last = Instant::now();
        loop {
            std::thread::sleep(TICK);
            let pages = self.working_set_mib.load(Ordering::Relaxed) * PAGES_PER_MIB;
            if pages as usize != set.pages() {
                set = WorkingSet::new(pages as usize);
                owed = 0.0;
            }
            let now = Instant::now();
            let rate = self.rate_mib.load(Ordering::Relaxed) * PAGES_PER_MIB;
            owed += now.duration_since(last).as_secs_f64() * rate as f64;
            last = now;
            // After a pause the writer does not try to catch up more than a tenth of a second.
            owed = f64::min(owed, rate as f64 / 10.0);
            while owed >= 1.0 && set.pages() > 0 {
                owed -= 1.0;
                if !set.rewrite_next() {
                    self.errors.fetch_add(1, Ordering::Relaxed);
                }
                self.pages_written.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[derive(Default)]
struct WorkingSet {
    words: Vec<u64>,
    next: usize,
    /// How often each page before `next` was written; the others once less.
    pass: u64,
}

impl WorkingSet {
    fn new(pages: usize) -> Self {
        Self {
            words: vec![0; pages * PAGE_WORDS],
            next: 0,
            pass: 1,
        }
    }

    fn pages(&self) -> usize {
        self.words.len() / PAGE_WORDS
    }

    /// Checks the next page's stamps and writes new ones; false when they were wrong.
    fn rewrite_next(&mut self) -> bool {
        let page = self.next;
        let words = &mut self.words[page * PAGE_WORDS..(page + 1) * PAGE_WORDS];
        let expected = if self.pass == 1 {
            0
        } else {
            stamp(page, self.pass - 1)
        };
        let intact = [0, PAGE_WORDS / 2, PAGE_WORDS - 1]
            .iter()
            .all(|&word| words[word] == expected);
        let fresh = stamp(page, self.pass);
        for word in [0, PAGE_WORDS / 2, PAGE_WORDS - 1] {
            words[word] = fresh;
        }
        self.next += 1;
        if self.next == self.pages() {
            self.next = 0;
            self.pass += 1;
        }
        intact
    }
}

/// A value that no other page and no other pass has.
fn stamp(page: usize, pass: u64) -> u64 {
    (pass << 32 | page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_intact_working_set_is_accepted_over_several_passes() {
        let mut set = WorkingSet::new(3);
        assert!((0..10).all(|_| set.rewrite_next()));
    }

    #[test]
    fn a_page_that_went_back_in_time_is_noticed() {
        let mut set = WorkingSet::new(2);
        let old = set.words.clone();
        for _ in 0..2 {
            assert!(set.rewrite_next());
        }
        set.words = old;
        assert!(!set.rewrite_next());
    }
}
