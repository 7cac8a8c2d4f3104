//! The page lanes of a session: a thread behind each places pages in guest RAM and notes what has
//! come.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dunlin_lane::{LaneError, LaneEvent, PageReceiver};

use super::inventory::Inventory;
use super::preparing::Preparer;
use crate::error::MigrationError;
use crate::options::CancelToken;
use crate::pages;
use crate::protocol::lane::{self, Counts, LaneMessage, LaneMessageError};

/// How often a lane's thread looks whether it shall end.
const SLICE: Duration = Duration::from_millis(100);
/// How long a grant may take.
const GRANT: Duration = Duration::from_secs(10);

/// What the lanes have brought.
pub(super) struct Book {
    state: Mutex<State>,
    changed: Condvar,
    /// Pages with content since the session began.
    pages: AtomicU64,
    /// Messages of lanes: signs of life.
    messages: AtomicU64,
    cpu_us: AtomicU64,
}

struct State {
    /// The last mark of each lane.
    marks: Vec<Option<(u32, Counts)>>,
    failure: Option<MigrationError>,
}

impl Book {
    fn new(lanes: usize) -> Self {
        Self {
            state: Mutex::new(State {
                marks: vec![None; lanes],
                failure: None,
            }),
            changed: Condvar::new(),
            pages: AtomicU64::new(0),
            messages: AtomicU64::new(0),
            cpu_us: AtomicU64::new(0),
        }
    }

    /// The state is whole between any two statements.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lanes that there are.
    pub(super) fn lanes(&self) -> usize {
        self.state().marks.len()
    }

    /// Pages with content that have come since the session began.
    pub(super) fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Grows whenever something arrives.
    pub(super) fn signs_of_life(&self) -> u64 {
        self.messages.load(Ordering::Relaxed)
    }

    /// CPU time of the lanes' threads so far, in seconds.
    pub(super) fn cpu_seconds(&self) -> f64 {
        self.cpu_us.load(Ordering::Relaxed) as f64 / 1e6
    }

    /// What broke a lane.
    pub(super) fn failure(&self) -> Option<MigrationError> {
        self.state().failure.take()
    }

    /// Waits until the first `lanes` lanes have marked the end of `round`, or `until`. `None` when
    /// that came first.
    ///
    /// # Errors
    /// What broke a lane.
    pub(super) fn marks(
        &self,
        lanes: usize,
        round: u32,
        until: Instant,
    ) -> Result<Option<Counts>, MigrationError> {
        let mut state = self.state();
        loop {
            let marks = state.marks.iter().take(lanes).flatten();
            let marks = marks.filter(|(marked, _)| *marked == round);
            let (count, sum) = marks.fold((0, Counts::default()), |(count, mut sum), mark| {
                sum.add(mark.1);
                (count + 1, sum)
            });
            if count == lanes {
                return Ok(Some(sum));
            }
            if let Some(error) = state.failure.take() {
                return Err(error);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn mark(&self, index: usize, round: u32, counts: Counts) {
        if let Some(mark) = self.state().marks.get_mut(index) {
            *mark = Some((round, counts));
        }
        self.changed.notify_all();
    }

    fn fail(&self, error: MigrationError) {
        self.state().failure.get_or_insert(error);
        self.changed.notify_all();
    }
}

/// The threads of a session's lanes. Dropping it tells them to end; they hold guest RAM until they
/// have.
pub(super) struct Lanes {
    book: Arc<Book>,
    stop: CancelToken,
    preparer: Arc<Preparer>,
}

impl Lanes {
    /// Lets the lanes write guest RAM from now on.
    pub(super) fn start(
        receivers: Vec<Box<dyn PageReceiver>>,
        inventory: &Arc<Inventory>,
    ) -> Result<Self, MigrationError> {
        let book = Arc::new(Book::new(receivers.len()));
        let stop = CancelToken::new();
        let preparer = Preparer::start(inventory.memory().clone(), stop.clone())?;
        let preparer = Arc::new(preparer);
        let lanes = Self {
            book: Arc::clone(&book),
            stop,
            preparer: Arc::clone(&preparer),
        };
        for (index, mut lane) in receivers.into_iter().enumerate() {
            for window in pages::windows(inventory.memory()) {
                lane.grant(window, Instant::now() + GRANT)?;
            }
            let body = Body {
                index,
                lane,
                inventory: Arc::clone(inventory),
                book: Arc::clone(&book),
                stop: lanes.stop.clone(),
                preparer: Arc::clone(&preparer),
                scratch: Vec::new(),
                round: 0,
                counts: Counts::default(),
                cpu_told: 0,
            };
            std::thread::Builder::new()
                .name(format!("page-lane-{index}"))
                .spawn(move || body.run())
                .map_err(|source| MigrationError::Host {
                    what: "a thread",
                    source,
                })?;
        }
        Ok(lanes)
    }

    /// Absent pages have a meaning from now on: none is prepared any more.
    pub(super) fn prepare_no_more(&self) {
        self.preparer.end();
    }

    pub(super) fn book(&self) -> &Arc<Book> {
        &self.book
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

struct Body {
    index: usize,
    lane: Box<dyn PageReceiver>,
    inventory: Arc<Inventory>,
    book: Arc<Book>,
    stop: CancelToken,
    preparer: Arc<Preparer>,
    scratch: Vec<u8>,
    round: u32,
    counts: Counts,
    /// Microseconds of CPU time that the book knows of.
    cpu_told: u64,
}

impl Body {
    fn run(mut self) {
        let mut message = Vec::new();
        while !self.stop.is_cancelled() {
            let received = self.lane.receive(&mut message, Instant::now() + SLICE);
            let result = match received {
                Ok(LaneEvent::Message) => self.heed(&message),
                // All of RAM is granted from the start.
                Ok(LaneEvent::Announced(_)) | Err(LaneError::TimedOut { .. }) => Ok(()),
                Err(error) => Err(error.into()),
            };
            if let Err(error) = result {
                self.book.fail(error);
                break;
            }
        }
    }

    fn heed(&mut self, message: &[u8]) -> Result<(), MigrationError> {
        let pages = self.inventory.memory().pages();
        let brought = match LaneMessage::decode(message, pages)? {
            LaneMessage::Pages {
                round,
                stored,
                zero,
                same,
            } => {
                self.enter(round);
                self.inventory.stored(&stored);
                self.inventory.zero(&zero);
                Counts {
                    pages: lane::pages_in(&stored),
                    zero_pages: lane::pages_in(&zero),
                    same_pages: same.into(),
                }
            }
            LaneMessage::Compressed {
                round,
                stored,
                block,
            } => {
                self.enter(round);
                let count = lane::pages_in(&stored);
                lane::unpack(block, count as usize, &mut self.scratch)?;
                self.inventory.store(&stored, &self.scratch);
                Counts {
                    pages: count,
                    ..Counts::default()
                }
            }
            LaneMessage::Ahead { round, runs } => {
                self.enter(round);
                self.preparer.expect(runs);
                Counts::default()
            }
            LaneMessage::Mark { round, counts } => {
                self.enter(round);
                if counts != self.counts {
                    return Err(LaneMessageError::Mark { round }.into());
                }
                self.tell_cpu();
                self.book.mark(self.index, round, counts);
                Counts::default()
            }
        };
        self.counts.add(brought);
        self.book.pages.fetch_add(brought.pages, Ordering::Relaxed);
        self.book.messages.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn tell_cpu(&mut self) {
        let now = (pages::thread_cpu_seconds() * 1e6) as u64;
        let more = now.saturating_sub(self.cpu_told);
        self.book.cpu_us.fetch_add(more, Ordering::Relaxed);
        self.cpu_told = now;
    }

    /// A message of another round begins the count anew.
    fn enter(&mut self, round: u32) {
        if round != self.round {
            self.round = round;
            self.counts = Counts::default();
        }
    }
}
