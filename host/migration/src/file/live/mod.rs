//! Saves a guest that runs on: the file holds it as it was at one moment.
//!
//! ```text
//!  caller's thread                       capture thread                       guest
//!  forbids all writes                    allows what somebody wants to write  runs
//!  pause, states                                                              paused
//!  forbids again what was allowed ─────▶ (from now on copies)
//!  resume ──────────────────────────────────────────────────────────────────▶ runs
//!  writes content to the file ◀── content ── a group that somebody wants
//!                                            to write: copy, allow            ◀─ waits for the copy
//!                             ◀── content ── the next group in order: copy, allow
//!  page table, fsync, rename             (ends when nothing is left)
//! ```
//!
//! [`capture`] says how pages are copied before they change.

mod capture;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dunlin_guest::{PageIndex, SavedState};

use self::capture::{Capture, CaptureThread, Captured};
use super::SaveReport;
use super::error::SnapshotError;
use super::writer::{Front, PageWriter, Writer};
use crate::machine::SourceMachine;
use crate::options::CancelToken;
use crate::uffd::{FaultingMemory, UffdError, Userfaultfd};

/// Time between two words about progress.
const TELL: Duration = Duration::from_millis(50);

/// How a running guest is saved.
pub struct LiveSave<'a> {
    /// Lets writers of guest memory wait.
    pub faults: Arc<Userfaultfd>,
    /// Ends the save; the guest runs on.
    pub cancel: CancelToken,
    /// Told now and then.
    pub progress: Box<dyn FnMut(LiveProgress) + 'a>,
}

/// How far a save has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveProgress {
    /// Pages that are safe from the guest.
    pub pages_done: u64,
    /// Pages of RAM.
    pub pages_total: u64,
    /// Bytes written to the file.
    pub bytes: u64,
}

/// Where the guest is after a save that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterFailure {
    /// It runs.
    Runs,
    /// It was paused for the save, and did not go on.
    Paused,
}

/// A running guest was not saved.
#[derive(Debug, thiserror::Error)]
#[error("the running guest was not saved")]
pub struct LiveFailure {
    /// Why.
    #[source]
    pub error: SnapshotError,
    /// Where the guest is.
    pub guest: AfterFailure,
}

fn runs(error: impl Into<SnapshotError>) -> LiveFailure {
    LiveFailure {
        error: error.into(),
        guest: AfterFailure::Runs,
    }
}

/// Saves a guest that runs, and runs on: the file holds it as it was during a short pause.
///
/// # Errors
/// [`LiveFailure`]; nothing is left at `path` then, or what was there before, and the guest's
/// memory can be written as before.
pub fn save_live(
    machine: &mut dyn SourceMachine,
    path: &Path,
    mut live: LiveSave<'_>,
) -> Result<SaveReport, LiveFailure> {
    let begun = Instant::now();
    let file = Writer::create(path).map_err(runs)?;
    let memory = machine.memory().clone();
    let watched = FaultingMemory::new(Arc::clone(&live.faults), memory.clone());
    let watched = Watched::register(watched).map_err(runs)?;
    let (capture, captured) = Capture::new(watched.memory.clone()).map_err(runs)?;
    let thread = capture.start().map_err(runs)?;
    // While the guest runs: there are many pages, and it stops for none of them.
    let pages = memory.pages();
    let all = watched.memory.forbid_writes(PageIndex(0), pages);
    all.map_err(runs)?;
    let Moment { states, pause } = Moment::take(machine, &watched, &thread)?;
    let front = Front {
        memory: &memory,
        machine: machine.configuration(),
        states,
    };
    let written = write(file, front, &captured, &mut live);
    // In this order: who waits for a copy is freed, and nobody else reads faults from here on.
    let copied = thread.end(written.is_err());
    drop(watched);
    let file = written.map_err(runs)?;
    let held = copied.map_err(runs)?;
    let written = file.finish().map_err(runs)?;
    Ok(SaveReport {
        file_bytes: written.file_bytes,
        ram_bytes: memory.size(),
        pages: written.pages,
        zero_pages: memory.pages() - written.pages,
        total_ms: begun.elapsed().as_secs_f64() * 1e3,
        ram_hash: format!("{:016x}", written.hash),
        pause_ms: Some(pause.as_secs_f64() * 1e3),
        writers_held: Some(held),
    })
}

/// What the file is to hold besides memory.
struct Moment {
    states: Vec<SavedState>,
    /// How long the guest was stopped for it.
    pause: Duration,
}

impl Moment {
    fn take(
        machine: &mut dyn SourceMachine,
        watched: &Watched,
        capture: &CaptureThread,
    ) -> Result<Self, LiveFailure> {
        let begun = Instant::now();
        machine.pause().map_err(runs)?;
        let frozen = freeze(machine, capture);
        if frozen.is_err() {
            watched.release();
        }
        let resumed = machine.resume();
        let pause = begun.elapsed();
        match (frozen, resumed) {
            (Ok(states), Ok(())) => Ok(Self { states, pause }),
            (Err(error), Ok(())) => Err(runs(error)),
            (frozen, Err(error)) => {
                let guest = AfterFailure::Paused;
                let error = error.into();
                let error = frozen.err().unwrap_or(error);
                Err(LiveFailure { error, guest })
            }
        }
    }
}

/// The states of a paused guest, whose memory is copied before it is written from now on.
fn freeze(
    machine: &mut dyn SourceMachine,
    capture: &CaptureThread,
) -> Result<Vec<SavedState>, SnapshotError> {
    let states = machine.save()?;
    capture.freeze()?;
    Ok(states)
}

/// Guest memory whose writers are watched, until released or dropped.
struct Watched {
    memory: FaultingMemory,
    released: AtomicBool,
}

impl Watched {
    fn register(memory: FaultingMemory) -> Result<Self, UffdError> {
        let watched = Self {
            memory,
            released: AtomicBool::new(false),
        };
        // Dropped on failure: of two regions the first may be watched.
        watched.memory.register_writes()?;
        Ok(watched)
    }

    /// Everybody may write again.
    fn release(&self) {
        if self.released.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Err(error) = self.memory.unregister() {
            tracing::error!(%error, "guest memory stays watched");
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.release();
    }
}

/// Writes what is captured until there is nothing more to capture.
fn write(
    file: Writer,
    front: Front<'_>,
    captured: &Captured,
    live: &mut LiveSave<'_>,
) -> Result<PageWriter, SnapshotError> {
    let pages_total = front.memory.pages();
    let mut file = file.begin(front)?;
    let mut tell = |file: &PageWriter| {
        (live.progress)(LiveProgress {
            pages_done: captured.pages_done(),
            pages_total,
            bytes: file.bytes(),
        });
    };
    let mut told = Instant::now();
    while let Some((first, content)) = captured.next() {
        if live.cancel.is_cancelled() {
            return Err(SnapshotError::Cancelled);
        }
        file.add(first, &content)?;
        captured.written(content);
        if told.elapsed() >= TELL {
            told = Instant::now();
            tell(&file);
        }
    }
    tell(&file);
    Ok(file)
}
