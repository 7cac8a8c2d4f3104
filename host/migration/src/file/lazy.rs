//! Lets a saved guest run before its pages have been read.
//!
//! ```text
//!                     pages all there
//!  Restoring ──▶ Running ───────────▶ Done      nothing is watched any more
//!      │            │ a page cannot be read, or is not what was written
//!      │            └───────────────▶ Broken    who waits for it waits for ever
//!      └──▶ (refused: who waits gets zeros, and the guest never starts)
//! ```
//!
//! Two threads bring pages in: one those that somebody waits for, with their neighbours in the
//! extent, the other all of them in the order of the file, at low priority. Which of the two
//! comes first to a page does not matter: the kernel refuses to place one twice.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use dunlin_guest::PageIndex;

use super::error::SnapshotError;
use super::reader::{Buffer, Opened, Snapshot, hash_of};
use super::table::{EXTENT_PAGES, Extent, Found};
use super::{check_ram, restore_opened};
use crate::machine::{DestinationMachine, MachineError};
use crate::priority;
use crate::uffd::{FaultingMemory, Userfaultfd};

/// Longest wait for a fault without a look at whether all is there.
const SLICE: Duration = Duration::from_secs(1);

/// Told when all pages are there, or why they never will be. The guest must not run on then.
pub type OnEnd = Box<dyn FnOnce(Result<(), SnapshotError>) + Send>;

/// How pages come behind a running guest.
pub struct LazyRestore {
    /// Lets who touches a missing page wait.
    pub faults: Arc<Userfaultfd>,
    /// Called once, unless the restore itself fails.
    pub on_end: OnEnd,
}

/// A machine that has its guest's state.
pub struct Restored<M> {
    /// The machine, not started.
    pub machine: M,
    /// What brings in the pages that are not there; `None` when all are.
    pub rest: Option<Rest>,
}

/// Restores a saved guest as [`super::restore`] does, and lets its pages follow. A file of version
/// 1 is read as a whole.
///
/// # Errors
/// As [`super::restore`].
pub fn restore_lazily<M: DestinationMachine>(
    path: &Path,
    lazy: LazyRestore,
    build: impl FnOnce(&[u8]) -> Result<M, MachineError>,
) -> Result<Restored<M>, SnapshotError> {
    let opened = Opened::open(path)?;
    if opened.head.version == 1 {
        let machine = restore_opened(opened, build)?;
        return Ok(Restored {
            machine,
            rest: None,
        });
    }
    let (front, snapshot) = Snapshot::read(opened)?;
    let mut machine = build(&front.configuration.machine)?;
    check_ram(machine.memory(), &front.configuration)?;
    let memory = FaultingMemory::new(lazy.faults, machine.memory().clone());
    // What the machine's construction has written is not the guest's.
    memory.discard(PageIndex(0), machine.memory().pages())?;
    let rest = Rest::begin(snapshot, memory, lazy.on_end)?;
    let restored = machine.restore(front.states);
    // A page that could not be had is the cause of whatever the machine says.
    rest.inner.guest_may_run()?;
    restored?;
    Ok(Restored {
        machine,
        rest: Some(rest),
    })
}

/// Brings in the pages that are not there. When dropped, those that have not come are zero: the
/// guest must not run then.
#[derive(Debug)]
pub struct Rest {
    inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
enum State {
    Restoring,
    Refused(SnapshotError),
    Running,
    Done,
    Broken,
}

struct Inner {
    snapshot: Snapshot,
    memory: FaultingMemory,
    state: Mutex<(State, Option<OnEnd>)>,
    stop: AtomicBool,
    /// Pages that were brought in, in the order of the file.
    pages: AtomicU64,
    /// Wakes who waits for faults.
    bell: UnixStream,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").finish_non_exhaustive()
    }
}

impl Rest {
    fn begin(
        snapshot: Snapshot,
        memory: FaultingMemory,
        on_end: OnEnd,
    ) -> Result<Self, SnapshotError> {
        let host = SnapshotError::io("start the threads that read");
        let (bell, ear) = UnixStream::pair().map_err(&host)?;
        let inner = Arc::new(Inner {
            snapshot,
            memory,
            state: Mutex::new((State::Restoring, Some(on_end))),
            stop: AtomicBool::new(false),
            pages: AtomicU64::new(0),
            bell,
        });
        // From here on dropping it lets go of memory.
        let mut rest = Self {
            threads: Vec::new(),
            inner,
        };
        rest.inner.memory.register()?;
        let (faults, fill) = (Arc::clone(&rest.inner), Arc::clone(&rest.inner));
        let spawn = |name: &str| std::thread::Builder::new().name(name.into());
        let thread = spawn("faults").spawn(move || faults.serve(&ear));
        rest.threads.push(thread.map_err(&host)?);
        let thread = spawn("fill").spawn(move || fill.fill());
        rest.threads.push(thread.map_err(&host)?);
        Ok(rest)
    }

    /// Pages with content that are there, and that there are in all.
    pub fn progress(&self) -> (u64, u64) {
        let pages = self.inner.pages.load(Ordering::Relaxed);
        (pages, self.inner.snapshot.table().pages())
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        self.inner.end();
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
        let (state, _) = &*self.inner.lock();
        match state {
            // Nothing is watched any more.
            State::Done | State::Refused(_) => {}
            // Zeros instead of what was damaged would be worse than waiting.
            State::Broken => {}
            State::Restoring | State::Running => self.inner.let_go(),
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, (State, Option<OnEnd>)> {
        // The state is whole between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Both threads end.
    fn end(&self) {
        self.stop.store(true, Ordering::Release);
        let mut bell = &self.bell;
        let _nobody_listens = bell.write(&[0]);
    }

    fn ended(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn let_go(&self) {
        if let Err(error) = self.memory.unregister() {
            tracing::error!(%error, "guest memory stays watched");
        }
    }

    /// The machine has its state. From now on a page that cannot be had is the guest's end.
    fn guest_may_run(&self) -> Result<(), SnapshotError> {
        let mut state = self.lock();
        match std::mem::replace(&mut state.0, State::Running) {
            State::Restoring => Ok(()),
            State::Refused(error) => {
                state.0 = State::Broken;
                Err(error)
            }
            // All was there before the machine had its state.
            other => {
                state.0 = other;
                Ok(())
            }
        }
    }

    /// Serves those who wait, until all is there.
    fn serve(&self, ear: &UnixStream) {
        let mut buffer = Buffer::new();
        let mut faults = Vec::new();
        while !self.ended() {
            let served = self.memory.uffd().wait(ear.as_raw_fd(), SLICE);
            let served = served.and_then(|_| self.memory.uffd().read(&mut faults));
            let served = served.map_err(SnapshotError::from).and_then(|()| {
                let addresses = faults.drain(..);
                let pages = addresses.filter_map(|address| self.memory.page_at(address));
                let mut pages = pages;
                pages.try_for_each(|page| self.bring(page, &mut buffer))
            });
            if let Err(error) = served {
                return self.fail(error);
            }
        }
    }

    /// Brings in a page, and what lies beside it.
    fn bring(&self, page: PageIndex, buffer: &mut Buffer) -> Result<(), SnapshotError> {
        match self.snapshot.table().find(page) {
            Found::Extent(extent) => self.place(extent, buffer).map(drop),
            Found::Zeros(zeros) => {
                let count = (zeros.end - page.0).min(EXTENT_PAGES as u64);
                self.memory.place_zeros(page, count)?;
                Ok(())
            }
        }
    }

    /// Brings in an extent; what it adds to the hash of RAM.
    fn place(&self, extent: &Extent, buffer: &mut Buffer) -> Result<u64, SnapshotError> {
        let content = self.snapshot.content(extent, buffer)?;
        self.memory.place(extent.first, content.as_flattened())?;
        Ok(hash_of(extent, content))
    }

    /// Brings in everything, unless it is told to end before.
    fn fill(&self) {
        priority::step_back();
        match self.place_all() {
            Ok(true) => self.done(),
            Ok(false) => {}
            Err(error) => self.fail(error),
        }
    }

    fn place_all(&self) -> Result<bool, SnapshotError> {
        let mut buffer = Buffer::new();
        let mut hash = 0u64;
        for extent in &self.snapshot.in_order() {
            if self.ended() {
                return Ok(false);
            }
            hash = hash.wrapping_add(self.place(extent, &mut buffer)?);
            let count = u64::from(extent.count);
            self.pages.fetch_add(count, Ordering::Relaxed);
        }
        self.snapshot.check_hash(hash)?;
        Ok(true)
    }

    fn done(&self) {
        let mut state = self.lock();
        if !matches!(state.0, State::Restoring | State::Running) {
            return;
        }
        state.0 = State::Done;
        // Holes that are left are zero.
        self.let_go();
        let on_end = state.1.take();
        drop(state);
        self.end();
        if let Some(on_end) = on_end {
            on_end(Ok(()));
        }
    }

    fn fail(&self, error: SnapshotError) {
        let mut state = self.lock();
        match state.0 {
            State::Restoring => {
                state.0 = State::Refused(error);
                // The machine is not waiting for what never comes.
                self.let_go();
                self.end();
            }
            State::Running if !self.ended() => {
                state.0 = State::Broken;
                let on_end = state.1.take();
                drop(state);
                self.end();
                if let Some(on_end) = on_end {
                    on_end(Err(error));
                }
            }
            // Letting go fails what is under way.
            State::Running | State::Refused(_) | State::Done | State::Broken => {}
        }
    }
}
