//! The thread that has vCPUs sampled: there is one only while a profile is taken.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_hypervisor::Sampled;

/// A sampling thread. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct Sampler {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    ended: Mutex<bool>,
    changed: Condvar,
    /// Samples that could not be asked for, by vCPU.
    missed: Vec<AtomicU64>,
}

impl Sampler {
    /// Has `threads` sampled `rate` times a second.
    ///
    /// # Errors
    /// The host gave no thread.
    pub(crate) fn start(threads: Vec<Arc<dyn Sampled>>, rate: u32) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            ended: Mutex::new(false),
            changed: Condvar::new(),
            missed: threads.iter().map(|_| AtomicU64::new(0)).collect(),
        });
        let own = Arc::clone(&shared);
        let period = Duration::from_secs(1) / rate.max(1);
        let thread = std::thread::Builder::new()
            .name("sampler".into())
            .spawn(move || own.run(&threads, period))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Ends the thread; how many samples could not be asked for, by vCPU.
    pub(crate) fn end(mut self) -> Vec<u64> {
        self.join();
        let missed = self.shared.missed.iter();
        missed
            .map(|missed| missed.load(Ordering::Relaxed))
            .collect()
    }

    fn join(&mut self) {
        *self
            .shared
            .ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _panicked = thread.join();
        }
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.join();
    }
}

impl Shared {
    fn run(&self, threads: &[Arc<dyn Sampled>], period: Duration) {
        let mut next = Instant::now() + period;
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        while !*ended {
            let now = Instant::now();
            if now < next {
                let waited = self.changed.wait_timeout(ended, next - now);
                ended = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            for (thread, missed) in threads.iter().zip(&self.missed) {
                if !thread.sample() {
                    missed.fetch_add(1, Ordering::Relaxed);
                }
            }
            // A moment that this thread did not get is not made up for: samples are to be apart.
            next = (next + period).max(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Counted {
        calls: AtomicU64,
        deaf: bool,
    }

    impl Sampled for Counted {
        fn sample(&self) -> bool {
            self.calls.fetch_add(1, Ordering::Relaxed);
            !self.deaf
        }
    }

    #[test]
    fn every_thread_is_sampled_until_the_sampler_ends() {
        let threads = [false, true].map(|deaf| {
            Arc::new(Counted {
                deaf,
                ..Counted::default()
            })
        });
        let sampled = threads.iter().map(|thread| Arc::clone(thread) as _);
        let sampler = Sampler::start(sampled.collect(), 10_000).unwrap();
        while threads[1].calls.load(Ordering::Relaxed) < 5 {
            std::thread::yield_now();
        }
        let missed = sampler.end();
        let calls = threads.map(|thread| thread.calls.load(Ordering::Relaxed));
        assert_eq!(missed, [0, calls[1]]);
        assert_eq!(calls[0], calls[1]);
    }
}
