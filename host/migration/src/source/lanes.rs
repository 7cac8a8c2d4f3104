//! The page lanes of a move, each with a thread that fills it.
//!
//! A round is a set of pages that the lanes share: whoever is free takes the next share, so a slow
//! lane holds up nobody. When nothing is left to take, each lane says so behind its last page (its
//! *mark*): the destination knows then that it has all of that lane's pages.
//!
//! ```text
//!            Job                   share taken          nothing left, or stopped
//!   idle ───────────▶ working ─────────────┐ ──────────────▶ marked ──▶ Done, idle
//!                        ▲                 │
//!                        └─────────────────┘
//! ```

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PageIndex, PageSet};
use dunlin_lane::{LaneError, PageSender, Ticket};

use super::packing::{Packer, Squeeze, posted};
use super::sent::Sent;
use super::squeeze::Advice;
use super::throttle::Throttle;
use crate::error::MigrationError;
use crate::options::{CancelToken, Compression};
use crate::pages::{self, Extents};
use crate::protocol::lane::{self, Counts};
use crate::protocol::runs;

/// Pages in a share: 4 MiB.
const SHARE: u64 = 1024;
/// How far the destination is told in the first round of what will come: 64 MiB. What prepares
/// memory there then always has work, while the lanes' threads wait for the network or each other.
const AHEAD: u64 = 16 * SHARE;
/// How long one call of a lane waits before its thread looks around.
const SLICE: Duration = Duration::from_millis(50);

/// What all lanes of a session share.
#[derive(Clone)]
pub(super) struct Surroundings {
    pub(super) memory: Memory,
    pub(super) cancel: CancelToken,
    pub(super) throttle: Arc<Mutex<Throttle>>,
    pub(super) compression: Compression,
    /// Silence after which a lane counts as lost.
    pub(super) idle: Duration,
    /// Pages in a batch.
    pub(super) batch_pages: usize,
}

/// One round's pages.
pub(super) struct Work {
    pub(super) round: u32,
    pub(super) pages: PageSet,
    /// Look for holes of the memory file: there may be pages that nobody ever touched.
    pub(super) holes: bool,
    pub(super) sent: Option<Arc<Sent>>,
    /// Stop when this comes, with what was sent until then.
    pub(super) deadline: Option<Instant>,
    next: AtomicU64,
    /// Up to here, the destination knows what will come.
    told: AtomicU64,
    stopped: AtomicBool,
    done: AtomicU64,
}

impl Work {
    pub(super) fn new(round: u32, pages: PageSet) -> Self {
        Self {
            round,
            pages,
            holes: false,
            sent: None,
            deadline: None,
            next: AtomicU64::new(0),
            told: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            done: AtomicU64::new(0),
        }
    }

    /// Nobody takes another page.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// Pages that lanes have taken care of so far.
    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
            || self.deadline.is_some_and(|end| Instant::now() >= end)
    }

    fn take(&self, total: u64) -> Option<Range<u64>> {
        let start = self.next.fetch_add(SHARE, Ordering::Relaxed);
        (start < total).then(|| start..start.saturating_add(SHARE).min(total))
    }

    /// The next share that the destination is to be told of, unless it knows enough.
    fn to_tell(&self, total: u64) -> Option<Range<u64>> {
        let horizon = self
            .next
            .load(Ordering::Relaxed)
            .saturating_add(AHEAD)
            .min(total);
        let further = |told: u64| (told < horizon).then(|| told + SHARE);
        let start = self
            .told
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, further)
            .ok()?;
        Some(start..start.saturating_add(SHARE).min(total))
    }
}

/// What a lane has to say of a round.
struct Done {
    counts: Counts,
    result: Result<(), MigrationError>,
}

/// How a wait for a round ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finished {
    Yes,
    NotYet,
}

/// The lanes. Their threads end with it: by their channels, or by their lanes.
pub(super) struct Lanes {
    workers: Vec<Worker>,
    done: Receiver<Done>,
    /// How many are of use.
    active: usize,
    /// How many have the present round's job, and have not said that they are done.
    started: usize,
    working: usize,
    counts: Counts,
    failure: Option<MigrationError>,
    bytes: Arc<[AtomicU64]>,
}

struct Worker {
    jobs: Sender<Arc<Work>>,
    cpu: Arc<AtomicU64>,
}

impl Lanes {
    /// Puts a thread behind each lane.
    pub(super) fn start(
        lanes: Vec<Box<dyn PageSender>>,
        surroundings: &Surroundings,
    ) -> Result<Self, MigrationError> {
        let (sender, done) = channel();
        let bytes: Arc<[AtomicU64]> = lanes.iter().map(|_| AtomicU64::new(0)).collect();
        let mut workers = Vec::new();
        for (index, mut lane) in lanes.into_iter().enumerate() {
            let (jobs, inbox) = channel();
            let cpu = Arc::new(AtomicU64::new(0));
            let body = Body {
                packer: Packer::new(surroundings.memory.clone(), surroundings.batch_pages),
                advice: Advice::new(surroundings.compression),
                squeeze: None,
                lends: lend(&mut *lane, &surroundings.memory)?,
                lane,
                index,
                surroundings: surroundings.clone(),
                bytes: Arc::clone(&bytes),
                moved: Instant::now(),
            };
            let report = sender.clone();
            let clock = Arc::clone(&cpu);
            std::thread::Builder::new()
                .name(format!("page-lane-{index}"))
                .spawn(move || body.run(&inbox, &report, &clock))
                .map_err(|source| MigrationError::Host {
                    what: "a thread",
                    source,
                })?;
            workers.push(Worker { jobs, cpu });
        }
        Ok(Self {
            active: workers.len(),
            workers,
            done,
            started: 0,
            working: 0,
            counts: Counts::default(),
            failure: None,
            bytes,
        })
    }

    /// Lanes that there are.
    pub(super) fn len(&self) -> usize {
        self.workers.len()
    }

    /// Lanes that rounds use.
    pub(super) fn active(&self) -> usize {
        self.active
    }

    /// Uses so many lanes from the next round on, at least one.
    pub(super) fn use_lanes(&mut self, active: usize) {
        self.active = active.clamp(1, self.workers.len().max(1));
    }

    /// Begins a round on the active lanes.
    pub(super) fn begin(&mut self, work: &Arc<Work>) {
        self.started = 0;
        self.working = 0;
        self.counts = Counts::default();
        while self.started < self.active.min(self.workers.len()) {
            self.join(work);
        }
    }

    /// One more lane takes part in the present round.
    pub(super) fn join(&mut self, work: &Arc<Work>) {
        let Some(worker) = self.workers.get(self.started) else {
            return;
        };
        self.started += 1;
        match worker.jobs.send(Arc::clone(work)) {
            Ok(()) => self.working += 1,
            Err(_gone) => self.fail(lane_thread_lost()),
        }
    }

    /// Lanes that take part in the present round.
    pub(super) fn taking_part(&self) -> usize {
        self.started
    }

    fn fail(&mut self, error: MigrationError) {
        self.failure.get_or_insert(error);
    }

    /// Waits until all lanes are done with the round, or `until`.
    ///
    /// # Errors
    /// What made a lane fail.
    pub(super) fn wait(&mut self, until: Instant) -> Result<Finished, MigrationError> {
        while self.working > 0 && self.failure.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            match self.done.recv_timeout(left) {
                Ok(Done { counts, result }) => {
                    self.working -= 1;
                    self.counts.add(counts);
                    if let Err(error) = result {
                        self.fail(error);
                    }
                }
                Err(RecvTimeoutError::Timeout) => return Ok(Finished::NotYet),
                Err(RecvTimeoutError::Disconnected) => self.fail(lane_thread_lost()),
            }
        }
        match self.failure.take() {
            Some(error) => Err(error),
            None => Ok(Finished::Yes),
        }
    }

    /// What the lanes sent in the round that is finished.
    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// Bytes posted on all lanes.
    pub(super) fn bytes_sent(&self) -> u64 {
        let counters = self.bytes.iter();
        counters.map(|bytes| bytes.load(Ordering::Relaxed)).sum()
    }

    /// CPU time of the lanes' threads, in seconds, up to their last round.
    pub(super) fn cpu_seconds(&self) -> f64 {
        let threads = self.workers.iter();
        threads
            .map(|worker| worker.cpu.load(Ordering::Relaxed) as f64 / 1e6)
            .sum()
    }
}

/// Lends guest memory to a lane, if it takes it: then pages need not be copied for it.
fn lend(lane: &mut dyn PageSender, memory: &Memory) -> Result<bool, MigrationError> {
    let mut lends = true;
    for window in pages::windows(memory) {
        lends &= lane.lend(window, Instant::now() + SLICE)?;
    }
    Ok(lends)
}

fn lane_thread_lost() -> MigrationError {
    MigrationError::Host {
        what: "a thread of a page lane, which ended",
        source: std::io::ErrorKind::Other.into(),
    }
}

/// What the thread of a lane has.
struct Body {
    packer: Packer,
    advice: Advice,
    /// Is the present batch to be compressed? Decided at its first page.
    squeeze: Option<Squeeze>,
    lane: Box<dyn PageSender>,
    /// The lane reads guest memory by itself.
    lends: bool,
    index: usize,
    surroundings: Surroundings,
    bytes: Arc<[AtomicU64]>,
    /// When the lane last took something.
    moved: Instant,
}

impl Body {
    fn run(mut self, inbox: &Receiver<Arc<Work>>, report: &Sender<Done>, cpu: &AtomicU64) {
        while let Ok(work) = inbox.recv() {
            self.moved = Instant::now();
            let mut counts = Counts::default();
            let result = self.round(&work, &mut counts);
            let failed = result.is_err();
            cpu.store(
                (pages::thread_cpu_seconds() * 1e6) as u64,
                Ordering::Relaxed,
            );
            let gone = report.send(Done { counts, result }).is_err();
            if failed || gone {
                break;
            }
        }
    }

    fn round(&mut self, work: &Work, counts: &mut Counts) -> Result<(), MigrationError> {
        let memory = self.surroundings.memory.clone();
        let mut holes = work.holes.then(|| Extents::new(&memory));
        let mut ahead = work.holes.then(|| Extents::new(&memory));
        while !work.is_stopped()
            && let Some(share) = work.take(memory.pages())
        {
            if let Some(ahead) = &mut ahead {
                self.tell_ahead(work, ahead)?;
            }
            for page in work.pages.within(share) {
                if self.packer.is_full() && !self.flush(work, counts)? {
                    return self.mark(work, *counts);
                }
                if holes
                    .as_mut()
                    .is_some_and(|holes| holes.hole_at(page).is_some())
                {
                    self.packer.add_hole(page);
                } else {
                    self.add(page, work)?;
                }
            }
        }
        if !self.packer.is_empty() {
            self.flush(work, counts)?;
        }
        self.mark(work, *counts)
    }

    /// Tells the destination in the first round which pages will come.
    fn tell_ahead(&mut self, work: &Work, extents: &mut Extents<'_>) -> Result<(), MigrationError> {
        let memory = &self.surroundings.memory;
        while let Some(pages) = work.to_tell(memory.pages()) {
            let mut runs = Vec::new();
            for page in work.pages.within(pages) {
                if extents.hole_at(page).is_none() && !memory.looks_zero(page) {
                    runs::push(&mut runs, page);
                }
            }
            runs.truncate(lane::MAX_AHEAD_RUNS);
            if !runs.is_empty() {
                let mut message = Vec::new();
                lane::encode_ahead(work.round, &runs, &mut message);
                posted(self.lane.send(&message, Instant::now() + SLICE))?;
            }
        }
        Ok(())
    }

    fn add(&mut self, page: PageIndex, work: &Work) -> Result<(), MigrationError> {
        if self.squeeze.is_none() {
            let squeeze = if self.advice.compress() {
                Squeeze::Yes
            } else {
                Squeeze::No
            };
            self.squeeze = Some(squeeze);
            let lent = self.lends && squeeze == Squeeze::No && work.sent.is_none();
            let room = self.lane.traits().buffer_bytes;
            self.packer.begin(lent.then_some(room));
        }
        if self.packer.needs_buffer() {
            let buffer = self.patiently(|lane, deadline| lane.buffer(deadline))?;
            self.packer.fill_into(buffer);
        }
        self.packer.add(page, work.sent.as_deref());
        Ok(())
    }

    /// Sends a batch. False: the round was stopped, and the batch was not sent.
    fn flush(&mut self, work: &Work, counts: &mut Counts) -> Result<bool, MigrationError> {
        let sent = work.sent.as_deref();
        if work.is_stopped() || !self.wait_for_turn(work)? {
            work.stop();
            self.packer.discard(&mut *self.lane, sent);
            self.squeeze = None;
            return Ok(false);
        }
        let batch = self.packer.counts();
        let begun = Instant::now();
        let squeeze = self.squeeze.take().unwrap_or(Squeeze::No);
        let deadline = begun + SLICE;
        let flushed = self
            .packer
            .flush(&mut *self.lane, work.round, squeeze, deadline)?;
        self.note_bytes();
        let spared = (flushed.pages * pages::PAGE).saturating_sub(flushed.bytes);
        self.throttle().give_back(spared as u64);
        self.advice.flushed(&flushed, begun.elapsed());
        self.moved = Instant::now();
        counts.add(batch);
        work.done.fetch_add(batch.total(), Ordering::Relaxed);
        Ok(true)
    }

    /// Waits until the bandwidth limit allows the batch. False: the deadline comes before that.
    fn wait_for_turn(&mut self, work: &Work) -> Result<bool, MigrationError> {
        let bytes = self.packer.bytes();
        let mut throttle = self.throttle();
        let now = Instant::now();
        let turn = now + throttle.take(bytes, now);
        if work.deadline.is_some_and(|deadline| turn > deadline) {
            throttle.give_back(bytes);
            return Ok(false);
        }
        drop(throttle);
        let waited = turn > now;
        while Instant::now() < turn {
            self.look_around()?;
            std::thread::sleep(SLICE.min(turn.saturating_duration_since(Instant::now())));
        }
        if waited {
            self.advice.waited(turn - now);
            self.moved = Instant::now();
        }
        Ok(true)
    }

    /// Says that this lane has no more pages in the round, and waits until all has left.
    fn mark(&mut self, work: &Work, counts: Counts) -> Result<(), MigrationError> {
        let mut message = Vec::new();
        lane::encode_mark(work.round, counts, &mut message);
        let ticket = match self.lane.send(&message, Instant::now() + SLICE) {
            Ok(ticket) => ticket,
            // Posted all the same, as the last operation there is.
            Err(LaneError::TimedOut { .. }) => Ticket::ALL,
            Err(error) => return Err(error.into()),
        };
        self.patiently(|lane, deadline| lane.complete(ticket, deadline))?;
        self.note_bytes();
        Ok(())
    }

    /// Repeats a call that has not come to its end within a slice, unless the lane is lost.
    fn patiently<T>(
        &mut self,
        mut call: impl FnMut(&mut dyn PageSender, Instant) -> Result<T, LaneError>,
    ) -> Result<T, MigrationError> {
        loop {
            let before = self.lane.bytes_sent();
            match call(&mut *self.lane, Instant::now() + SLICE) {
                Ok(value) => {
                    self.moved = Instant::now();
                    return Ok(value);
                }
                Err(error @ LaneError::TimedOut { .. }) => {
                    if self.lane.bytes_sent() != before {
                        self.moved = Instant::now();
                    }
                    if self.moved.elapsed() > self.surroundings.idle {
                        return Err(error.into());
                    }
                    self.look_around()?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn look_around(&self) -> Result<(), MigrationError> {
        if self.surroundings.cancel.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        Ok(())
    }

    /// Valid after each statement that changes it.
    fn throttle(&self) -> MutexGuard<'_, Throttle> {
        let shared = &self.surroundings.throttle;
        shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_bytes(&self) {
        if let Some(bytes) = self.bytes.get(self.index) {
            bytes.store(self.lane.bytes_sent(), Ordering::Relaxed);
        }
    }
}
