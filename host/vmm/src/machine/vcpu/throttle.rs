//! Slows processors down: each sleeps for a share of its own time.
//!
//! A guest that computes does not exit by itself, so a [`Pacer`] kicks it when it has run for as
//! long as it may in one period; its thread then sleeps on its queue of commands, where every
//! command wakes it at once. What counts is the processor time that the thread has used: one that
//! halts has given its share already.
//!
//! ```text
//!            kicked, slice used                 time is up, or a command
//!   Running ────────────────────► Sleeping ────────────────────────────► Running
//!      ▲  └─ kicked early: the pacer is set for the rest                    │
//!      └────────────────────────── the pacer is set ────────────────────────┘
//! ```

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_hypervisor::VcpuHandle;

/// Time in which a processor runs once and sleeps once.
const PERIOD: Duration = Duration::from_millis(10);
/// The shortest run between two sleeps, so that a kick is worth its price.
const LEAST_RUN: Duration = Duration::from_micros(200);
/// The longest sleep, however long the run before it was: the guest must not notice a stop.
const LONGEST_SLEEP: Duration = Duration::from_millis(20);

/// A processor that writes less than this part of what the busiest writes is left alone.
const LITTLE: f64 = 0.05;

/// Percent of its time that a processor sleeps: 0 to 99.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct SleepShare(u8);

impl SleepShare {
    /// The largest share below a standstill.
    const MOST: u8 = 99;

    pub(crate) fn percent(percent: u8) -> Self {
        Self(percent.min(Self::MOST))
    }

    pub(crate) fn as_percent(self) -> u8 {
        self.0
    }

    /// How long a processor runs in a period.
    fn run(self) -> Duration {
        (PERIOD * (100 - u32::from(self.0)) / 100).max(LEAST_RUN)
    }

    /// How long it sleeps after it has run for `ran`.
    fn sleep(self, ran: Duration) -> Duration {
        (ran * u32::from(self.0) / (100 - u32::from(self.0))).min(LONGEST_SLEEP)
    }
}

/// Distributes a slowdown over processors: the one that would write most sleeps for all of
/// `percent`, the others in proportion, and one that hardly writes not at all. `pages` is what
/// each wrote while it slept for its share of `now`. When nobody is known to write, all sleep.
pub(crate) fn shares(percent: u8, pages: &[u64], now: &[u8]) -> Vec<u8> {
    let asleep = now.iter().copied().chain(std::iter::repeat(0));
    let demand = |(&pages, asleep): (&u64, u8)| {
        pages as f64 / (1.0 - f64::from(asleep.min(SleepShare::MOST)) / 100.0)
    };
    let demands: Vec<f64> = pages.iter().zip(asleep).map(demand).collect();
    let most = demands.iter().copied().fold(0.0, f64::max);
    let share = |&demand: &f64| match demand / most {
        part if part < LITTLE => 0,
        part => (f64::from(percent) * part).round() as u8,
    };
    if most == 0.0 {
        return vec![percent; pages.len()];
    }
    demands.iter().map(share).collect()
}

/// What a kicked processor does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// Nothing slows it.
    Free,
    /// It runs for so long.
    Run(Duration),
    /// It sleeps for so long.
    Sleep(Duration),
}

/// One processor's alternation of running and sleeping. Times are processor time that its thread
/// has used since it began.
#[derive(Debug, Default)]
pub(super) struct Rhythm {
    share: SleepShare,
    /// When it last began to run.
    since: Duration,
}

impl Rhythm {
    /// From now on, `share`.
    pub(super) fn set(&mut self, share: SleepShare, used: Duration) {
        self.share = share;
        self.since = used;
    }

    /// It has slept.
    pub(super) fn woke(&mut self, used: Duration) {
        self.since = used;
    }

    /// What to do when `used` was used.
    pub(super) fn pace(&self, used: Duration) -> Pace {
        if self.share == SleepShare::default() {
            return Pace::Free;
        }
        let (ran, may) = (used.saturating_sub(self.since), self.share.run());
        // A timer that comes a little early is not set again for the rest.
        if ran >= may - may / 8 {
            Pace::Sleep(self.share.sleep(ran))
        } else {
            Pace::Run((may - ran).max(LEAST_RUN))
        }
    }
}

/// Processor time that the calling thread has used.
pub(super) fn used() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Kicks processors at the times that they ask for. Its thread begins with the first request.
#[derive(Debug, Default)]
pub(crate) struct Pacer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    due: Vec<(Instant, Arc<dyn VcpuHandle>)>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is valid after each statement that changes it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            let due: Vec<_> = state.due.extract_if(.., |entry| entry.0 <= now).collect();
            if !due.is_empty() {
                drop(state);
                due.iter().for_each(|(_, handle)| handle.kick());
                state = self.lock();
                continue;
            }
            state = match state.due.iter().map(|entry| entry.0).min() {
                Some(next) => {
                    let waited = self.changed.wait_timeout(state, next - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => (self.changed.wait(state)).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Pacer {
    /// Kicks `handle` after `delay`, once.
    pub(super) fn kick_after(&self, delay: Duration, handle: &Arc<dyn VcpuHandle>) {
        self.ensure_thread();
        let at = Instant::now() + delay;
        let mut state = self.shared.lock();
        state.due.retain(|entry| !Arc::ptr_eq(&entry.1, handle));
        state.due.push((at, Arc::clone(handle)));
        drop(state);
        self.shared.changed.notify_one();
    }

    fn ensure_thread(&self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_some() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let spawned = std::thread::Builder::new()
            .name("pacer".into())
            .spawn(move || shared.run());
        match spawned {
            Ok(handle) => *thread = Some(handle),
            // The guest then runs at full speed until its next exit.
            Err(error) => tracing::warn!(%error, "no thread to slow the guest down"),
        }
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_one();
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            // It does nothing that could panic.
            let _panicked = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn over_time_a_processor_sleeps_for_its_share() {
        for percent in [1, 20, 50, 80, 99] {
            let mut rhythm = Rhythm::default();
            rhythm.set(SleepShare::percent(percent), ms(7));
            let (mut used, mut slept) = (ms(7), Duration::ZERO);
            for _ in 0..1000 {
                match rhythm.pace(used) {
                    Pace::Free => panic!("it is slowed"),
                    Pace::Run(time) => used += time,
                    Pace::Sleep(time) => {
                        slept += time;
                        rhythm.woke(used);
                    }
                }
            }
            let share = slept.as_secs_f64() / (slept + used - ms(7)).as_secs_f64();
            let wanted = f64::from(percent) / 100.0;
            assert!((share - wanted).abs() < 0.011, "{share} for {wanted}");
        }
    }

    #[test]
    fn a_processor_that_halted_most_of_the_time_does_not_sleep() {
        let mut rhythm = Rhythm::default();
        rhythm.set(SleepShare::percent(50), ms(100));
        assert_eq!(rhythm.pace(ms(101)), Pace::Run(ms(4)));
        assert_eq!(rhythm.pace(ms(105)), Pace::Sleep(ms(5)));
    }

    #[test]
    fn a_run_that_was_too_long_is_not_followed_by_a_stop() {
        let mut rhythm = Rhythm::default();
        rhythm.set(SleepShare::percent(99), ms(0));
        assert_eq!(rhythm.pace(ms(1000)), Pace::Sleep(LONGEST_SLEEP));
    }

    #[test]
    fn who_does_not_write_is_not_slowed_and_a_slowed_writer_is_not_let_go() {
        assert_eq!(shares(40, &[1000, 0, 500, 10], &[]), [40, 0, 20, 0]);
        // The first wrote half as much because it slept half of the time.
        assert_eq!(shares(60, &[500, 500], &[50, 0]), [60, 30]);
        assert_eq!(shares(60, &[0, 0], &[50, 0]), [60, 60]);
        assert_eq!(shares(0, &[7, 0], &[50]), [0, 0]);
        assert_eq!(shares(99, &[1], &[255]), [99]);
    }

    #[test]
    fn no_share_is_no_pace_and_a_standstill_is_none() {
        let mut rhythm = Rhythm::default();
        assert_eq!(rhythm.pace(ms(1000)), Pace::Free);
        rhythm.set(SleepShare::percent(100), ms(0));
        assert_ne!(rhythm.pace(ms(0)), Pace::Free);
        assert_eq!(SleepShare::percent(255).as_percent(), 99);
    }
}
