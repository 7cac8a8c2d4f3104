//! The thread behind a device.
//!
//! The device sits in a slot. The worker takes it out for a round and puts it back; whoever pauses,
//! resets or saves the device waits until it is back and takes it out in turn; no lock is held while
//! either works on it. An idle worker sits in poll(2) with the device in the slot, so pausing it
//! needs no switch of threads.
//!
//! ```text
//!            run()
//!  Parked ◄────────► Running ── round: slot ─► worker ─► slot ── poll(doorbells, back end) ─┐
//!    │      park()      ▲                                                                  │
//!    ▼ drop             └──────────────────────────────────────────────────────────────────┘
//!  Ended
//! ```

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::device::{Queues, VirtioDevice, Wait};
use super::interrupt::Interrupt;
use super::log_limit::LogLimit;
use crate::lock;

/// How long a back end is left alone whose descriptor reports nothing but an error, or is readable
/// and then has nothing. Doorbells are heard meanwhile.
const BACK_OFF: Duration = Duration::from_millis(100);
/// How often in a row a back end may be readable for nothing.
const MAX_FALSE_ALARMS: u32 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Parked,
    Running,
    Ended,
}

/// A device and, while a driver runs it, its queues.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) queues: Option<Queues>,
}

#[derive(Debug)]
struct Slot {
    mode: Mode,
    /// Out while a round runs.
    work: Option<Work>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    slot: Mutex<Slot>,
    changed: Condvar,
    /// Wakes the worker from poll.
    control: EventFd,
    doorbells: Vec<Arc<EventFd>>,
    /// How many threads want the device: a round ends early then, and the next waits.
    waiting: Arc<AtomicUsize>,
    interrupt: Arc<Interrupt>,
    log_limit: LogLimit,
}

/// Owns the thread; ends it when dropped.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a parked worker.
    ///
    /// # Errors
    /// What the host says when it gives no thread or descriptor.
    pub(super) fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        doorbells: Vec<Arc<EventFd>>,
        interrupt: Arc<Interrupt>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            slot: Mutex::new(Slot {
                mode: Mode::Parked,
                work: Some(Work {
                    device,
                    queues: None,
                }),
            }),
            changed: Condvar::new(),
            control: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            doorbells,
            waiting: Arc::new(AtomicUsize::new(0)),
            interrupt,
            log_limit: LogLimit::default(),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || shared.run())?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Counts the threads that wait for the device; queues carry it.
    pub(super) fn waiting(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.shared.waiting)
    }

    /// Works on the device between two rounds.
    pub(super) fn with<R>(&self, action: impl FnOnce(&mut Work) -> R) -> R {
        self.shared.with(None, action)
    }

    /// Ends the current round, works on the device and leaves it parked.
    pub(super) fn park<R>(&self, action: impl FnOnce(&mut Work) -> R) -> R {
        self.shared.with(Some(Mode::Parked), action)
    }

    /// Works on the device and lets it run: the first round begins without a doorbell.
    pub(super) fn run<R>(&self, action: impl FnOnce(&mut Work) -> R) -> R {
        let result = self.shared.with(Some(Mode::Running), action);
        self.shared.wake();
        result
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.with(Some(Mode::Ended), |_| ());
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // A worker that panicked has said so; there is nothing left to do for it.
            let _ = thread.join();
        }
    }
}

/// A device out of its slot; dropping puts it back, also when the round panics.
struct Round<'a> {
    shared: &'a Shared,
    work: Option<Work>,
    /// The mode afterwards, if it changes.
    next: Option<Mode>,
    /// Counted in `Shared::waiting`.
    waited: bool,
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        let mut slot = lock(&self.shared.slot);
        slot.work = self.work.take();
        if std::thread::panicking() {
            self.next = Some(Mode::Ended);
            self.shared.interrupt.fail();
        }
        // An ended worker does not come back.
        if let (Some(next), Mode::Parked | Mode::Running) = (self.next, slot.mode) {
            slot.mode = next;
        }
        if self.waited {
            // Under the lock: the worker must not miss that the last one is through.
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        }
        drop(slot);
        self.shared.changed.notify_all();
    }
}

impl Shared {
    /// Takes the device out of its slot as a round does, so that no lock is held meanwhile.
    fn with<R>(&self, mode: Option<Mode>, action: impl FnOnce(&mut Work) -> R) -> R {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let mut slot = lock(&self.slot);
        let work = loop {
            match slot.work.take() {
                Some(work) => break work,
                None => slot = self.wait(slot),
            }
        };
        drop(slot);
        let mut round = Round {
            shared: self,
            work: Some(work),
            next: mode,
            waited: true,
        };
        match &mut round.work {
            Some(work) => action(work),
            None => unreachable!("a round holds its device until it is dropped"),
        }
    }

    fn wait<'a>(&self, slot: MutexGuard<'a, Slot>) -> MutexGuard<'a, Slot> {
        self.changed
            .wait(slot)
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wake(&self) {
        // A full counter cannot be: it would mean that the worker is awake already.
        let _ = self.control.write(1);
    }

    fn run(&self) {
        let mut woken = Woken::Other;
        let mut false_alarms = 0;
        while let Some(round) = self.take() {
            let (wait, back_end) = self.round(round);
            let found_nothing = wait.readable && wait.retry_after.is_none();
            false_alarms = match woken {
                Woken::BackEnd if found_nothing => false_alarms + 1,
                _ => 0,
            };
            let leave = woken == Woken::BackEndError || false_alarms >= MAX_FALSE_ALARMS;
            woken = self.poll(wait, back_end, leave);
        }
    }

    /// The device, as soon as it may run; `None` when the worker ends.
    fn take(&self) -> Option<Round<'_>> {
        let mut slot = lock(&self.slot);
        loop {
            match slot.mode {
                Mode::Ended => return None,
                Mode::Running if self.waiting.load(Ordering::Acquire) == 0 => {
                    if let Some(work) = slot.work.take() {
                        return Some(Round {
                            shared: self,
                            work: Some(work),
                            next: None,
                            waited: false,
                        });
                    }
                }
                Mode::Running | Mode::Parked => {}
            }
            slot = self.wait(slot);
        }
    }

    fn round(&self, mut round: Round<'_>) -> (Wait, Option<RawFd>) {
        let idle = (Wait::default(), None);
        let Some(Work { device, queues }) = &mut round.work else {
            return idle;
        };
        let Some(queues) = queues.as_mut() else {
            return idle;
        };
        if self.interrupt.needs_reset() {
            return idle;
        }
        match device.process(queues) {
            Ok(wait) => {
                let descriptor = device.back_end().map(|fd| fd.as_raw_fd());
                (wait, descriptor)
            }
            Err(error) => {
                if self.log_limit.allows() {
                    tracing::warn!(device = self.name, %error, "driver broke the rules, device stopped");
                }
                self.interrupt.fail();
                idle
            }
        }
    }

    /// Sleeps until something happens, and takes back the doorbells that rang.
    fn poll(&self, wait: Wait, back_end: Option<RawFd>, leave_back_end: bool) -> Woken {
        let watch = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = Vec::with_capacity(self.doorbells.len() + 2);
        fds.push(watch(self.control.as_raw_fd()));
        fds.extend(self.doorbells.iter().map(|event| watch(event.as_raw_fd())));
        let mut timeout = wait.retry_after;
        let mut watched = false;
        if wait.readable && leave_back_end {
            timeout = Some(timeout.map_or(BACK_OFF, |t| t.min(BACK_OFF)));
        } else if let (true, Some(fd)) = (wait.readable, back_end) {
            fds.push(watch(fd));
            watched = true;
        }
        let timeout = timeout.map_or(-1, |time| {
            time.as_micros().div_ceil(1000).min(60_000) as i32
        });
        // SAFETY: `fds` is an array of valid structures of the given length. A descriptor that was
        // closed meanwhile is reported as such.
        #[expect(unsafe_code, reason = "poll has no safe wrapper in std")]
        let count = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if count <= 0 {
            return Woken::Other;
        }
        let events = std::iter::once(&self.control).chain(self.doorbells.iter().map(Arc::as_ref));
        for (event, fd) in events.zip(&fds) {
            if fd.revents != 0 {
                // Only the fact that it rang matters, and a racing reader may have taken it.
                let _ = event.read();
            }
        }
        match fds.last() {
            Some(fd) if watched && count == 1 && fd.revents != 0 => {
                if fd.revents & libc::POLLIN != 0 {
                    Woken::BackEnd
                } else {
                    Woken::BackEndError
                }
            }
            _ => Woken::Other,
        }
    }
}

/// What ended a sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    /// Nothing but the back end, which is readable.
    BackEnd,
    /// Nothing but the back end, which has an error and nothing to read.
    BackEndError,
    /// A doorbell, the control event or the time.
    Other,
}

#[cfg(test)]
mod tests;
