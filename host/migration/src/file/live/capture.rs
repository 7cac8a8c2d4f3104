//! Copies pages of a running guest before they change.
//!
//! Until the moment that is to be saved, a group of pages that somebody waits to write is opened to
//! writers, and noted; at that moment it is closed again ([`CaptureThread::freeze`]), so that the
//! guest stops for the few groups that it has just written, not for all of its memory.
//!
//! From then on one thread decides about all pages, so that none is copied twice, or after it was
//! written: a group that somebody waits to write is copied at once, then the next in order. A copy is not yet on the disk: in order, copies stay within [`AHEAD`] bytes before it;
//! for writers, within [`LIMIT`], and only beyond that does the disk slow the guest down.

use std::collections::{BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use dunlin_guest::PageIndex;

use crate::file::copy_group;
use crate::file::error::SnapshotError;
use crate::file::table::EXTENT_PAGES;
use crate::pages::Extents;
use crate::uffd::{self, FaultingMemory};

/// Bytes that copies in order may be ahead of the disk.
const AHEAD: usize = 8 << 20;
/// Bytes that copies for waiting writers may be ahead of the disk.
const LIMIT: usize = 64 << 20;
/// Longest wait without a look at whether it is to end.
const SLICE: Duration = Duration::from_millis(50);
/// Most pages of a hole that are let go of at once.
const HOLE_PAGES: u64 = 16 << 10;
const GROUP: u64 = EXTENT_PAGES as u64;

/// What both sides see.
#[derive(Debug)]
struct Shared {
    phase: Mutex<Phase>,
    /// Bytes that were copied and are not written to the file.
    backlog: AtomicUsize,
    /// Pages that were copied.
    pages: AtomicU64,
    stop: AtomicBool,
}

#[derive(Debug)]
enum Phase {
    /// Writers go ahead. These groups were opened to them.
    Before(BTreeSet<u64>),
    /// What is written is copied first.
    Since,
}

impl Shared {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        // The phase is whole between any two statements.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The copies, for whoever writes them to the disk.
pub(super) struct Captured {
    content: Receiver<(PageIndex, Vec<u8>)>,
    /// Buffers to be filled again.
    empty: Sender<Vec<u8>>,
    bell: Arc<UnixStream>,
    shared: Arc<Shared>,
}

impl Captured {
    /// The next copy; `None` when there are no more.
    pub(super) fn next(&self) -> Option<(PageIndex, Vec<u8>)> {
        self.content.recv().ok()
    }

    /// A copy was written.
    pub(super) fn written(&self, buffer: Vec<u8>) {
        let before = self
            .shared
            .backlog
            .fetch_sub(buffer.len(), Ordering::AcqRel);
        let _has_ended = self.empty.send(buffer);
        if before >= AHEAD {
            ring(&self.bell);
        }
    }

    /// Pages that can change again.
    pub(super) fn pages_done(&self) -> u64 {
        self.shared.pages.load(Ordering::Relaxed)
    }
}

/// Wakes the capture. A bell that was not heard yet need not ring again.
fn ring(bell: &UnixStream) {
    let mut bell = bell;
    let _full = bell.write(&[0]);
}

/// A capture that runs.
pub(super) struct CaptureThread {
    watched: FaultingMemory,
    thread: Option<JoinHandle<Result<u64, SnapshotError>>>,
    bell: Arc<UnixStream>,
    shared: Arc<Shared>,
}

impl CaptureThread {
    /// This is the moment that is to be saved: nobody writes now, and what is written from now on
    /// is copied first.
    pub(super) fn freeze(&self) -> Result<(), SnapshotError> {
        let mut phase = self.shared.phase();
        if let Phase::Before(open) = &*phase {
            for &group in open {
                let (first, pages) = pages_of(&self.watched, group);
                self.watched.forbid_writes(first, pages)?;
            }
        }
        *phase = Phase::Since;
        drop(phase);
        ring(&self.bell);
        Ok(())
    }

    /// Waits for its end, or makes it end at once. Returns how often a writer had to wait.
    pub(super) fn end(mut self, at_once: bool) -> Result<u64, SnapshotError> {
        if at_once {
            self.stop();
        }
        let thread = self.thread.take();
        let result = thread.map(JoinHandle::join);
        result.unwrap_or(Ok(Ok(0))).unwrap_or_else(|_panic| {
            Err(SnapshotError::Lost {
                what: "copies the guest's memory",
            })
        })
    }

    fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        ring(&self.bell);
    }
}

impl Drop for CaptureThread {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// The pages of a group: the first, and how many.
fn pages_of(watched: &FaultingMemory, group: u64) -> (PageIndex, u64) {
    let first = group * GROUP;
    let left = watched.memory().pages().saturating_sub(first);
    (PageIndex(first), left.min(GROUP))
}

/// The capture itself.
pub(super) struct Capture {
    watched: FaultingMemory,
    content: Sender<(PageIndex, Vec<u8>)>,
    empty: Receiver<Vec<u8>>,
    /// Rings when there is room again.
    bell: UnixStream,
    ringer: Arc<UnixStream>,
    shared: Arc<Shared>,
    /// Which groups are still to be copied.
    todo: Vec<bool>,
    /// All groups before this one were copied.
    next: usize,
    /// Where writers wait.
    waiting: VecDeque<usize>,
    held: u64,
}

impl Capture {
    pub(super) fn new(watched: FaultingMemory) -> Result<(Self, Captured), SnapshotError> {
        let pair = UnixStream::pair().and_then(|(bell, ringer)| {
            bell.set_nonblocking(true)?;
            ringer.set_nonblocking(true)?;
            Ok((bell, Arc::new(ringer)))
        });
        let (bell, ringer) = pair.map_err(SnapshotError::io("get ready to write"))?;
        let (content, copies) = mpsc::channel();
        let (buffers, empty) = mpsc::channel();
        let shared = Arc::new(Shared {
            phase: Mutex::new(Phase::Before(BTreeSet::new())),
            backlog: AtomicUsize::new(0),
            pages: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let captured = Captured {
            content: copies,
            empty: buffers,
            bell: Arc::clone(&ringer),
            shared: Arc::clone(&shared),
        };
        let groups = watched.memory().pages().div_ceil(GROUP);
        let capture = Self {
            content,
            empty,
            bell,
            ringer,
            shared,
            todo: vec![true; groups as usize],
            next: 0,
            waiting: VecDeque::new(),
            held: 0,
            watched,
        };
        Ok((capture, captured))
    }

    /// Begins, before writes are forbidden.
    pub(super) fn start(self) -> Result<CaptureThread, SnapshotError> {
        let (bell, shared) = (Arc::clone(&self.ringer), Arc::clone(&self.shared));
        let watched = self.watched.clone();
        let thread = std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || self.run())
            .map_err(SnapshotError::io("start a thread that fills"))?;
        Ok(CaptureThread {
            watched,
            thread: Some(thread),
            bell,
            shared,
        })
    }

    fn run(mut self) -> Result<u64, SnapshotError> {
        let memory = self.watched.memory().clone();
        while self.open_to_writers()? {
            self.wait(true)?;
        }
        // Asked only from here on: a hole that was found before could have been filled.
        let mut holes = Extents::new(&memory);
        loop {
            if self.shared.stop.load(Ordering::Acquire) {
                return Err(SnapshotError::Cancelled);
            }
            self.hear_faults()?;
            let backlog = self.shared.backlog.load(Ordering::Acquire);
            if let Some(&address) = self.waiting.front() {
                if backlog >= LIMIT {
                    self.wait(false)?;
                    continue;
                }
                self.waiting.pop_front();
                self.serve(address, &mut holes)?;
            } else if backlog >= AHEAD {
                self.wait(true)?;
            } else if let Some(group) = self.next_group() {
                self.copy_in_order(group, &mut holes)?;
            } else {
                return Ok(self.held);
            }
        }
    }

    /// Lets those who wait write, before the moment that is to be saved; false when that has come.
    fn open_to_writers(&mut self) -> Result<bool, SnapshotError> {
        if self.shared.stop.load(Ordering::Acquire) {
            return Err(SnapshotError::Cancelled);
        }
        self.hear_faults()?;
        let mut phase = self.shared.phase();
        let Phase::Before(open) = &mut *phase else {
            return Ok(false);
        };
        for address in self.waiting.drain(..) {
            let Some(page) = self.watched.page_at(address) else {
                continue;
            };
            let group = page.0 / GROUP;
            let (first, pages) = pages_of(&self.watched, group);
            self.watched.allow_writes(first, pages)?;
            open.insert(group);
        }
        Ok(true)
    }

    /// Waits for the bell, or for a fault, too.
    fn wait(&self, for_faults: bool) -> Result<(), SnapshotError> {
        let bell = self.bell.as_raw_fd();
        if for_faults {
            self.watched.uffd().wait(bell, SLICE)?;
        } else {
            uffd::wait_readable(bell, SLICE)?;
        }
        let mut bell = &self.bell;
        let _silent = bell.read(&mut [0; 64]);
        Ok(())
    }

    fn hear_faults(&mut self) -> Result<(), SnapshotError> {
        if self.waiting.is_empty() {
            let mut faults = Vec::new();
            self.watched.uffd().read(&mut faults)?;
            self.waiting.extend(faults);
        }
        Ok(())
    }

    /// Copies what somebody waits to write. Who began to wait while the group was opened was
    /// perhaps not woken with the others: a page without an entry in the page table looks to the
    /// kernel like one that has to be waited for.
    fn serve(&mut self, address: usize, holes: &mut Extents<'_>) -> Result<(), SnapshotError> {
        let Some(page) = self.watched.page_at(address) else {
            tracing::warn!("a fault lies outside of guest memory");
            return Ok(());
        };
        let group = (page.0 / GROUP) as usize;
        if self.todo.get(group) != Some(&true) {
            let (first, pages) = pages_of(&self.watched, group as u64);
            self.watched.allow_writes(first, pages)?;
            return Ok(());
        }
        self.held += 1;
        self.copy(group, holes)
    }

    /// The first group that is still to be copied.
    fn next_group(&mut self) -> Option<usize> {
        let ahead = self.todo.get(self.next..)?;
        let step = ahead.iter().position(|&todo| todo);
        self.next = step.map_or(self.todo.len(), |step| self.next + step);
        step.map(|_| self.next)
    }

    fn copy_in_order(
        &mut self,
        group: usize,
        holes: &mut Extents<'_>,
    ) -> Result<(), SnapshotError> {
        let first = group as u64 * GROUP;
        match holes.hole_at(PageIndex(first)) {
            Some(end) if end >= first + GROUP => {
                // What is to be copied in this hole is zero: it could not be written yet.
                let groups = ((end - first).min(HOLE_PAGES) / GROUP) as usize;
                self.let_go(group, groups)
            }
            _ => self.copy(group, holes),
        }
    }

    fn copy(&mut self, group: usize, holes: &mut Extents<'_>) -> Result<(), SnapshotError> {
        let first = PageIndex(group as u64 * GROUP);
        let memory = self.watched.memory();
        let end = (first.0 + GROUP).min(memory.pages());
        let hole = holes.hole_at(first);
        if hole.is_none_or(|behind| behind < end) {
            let mut content = self.empty.try_recv().unwrap_or_default();
            copy_group(memory, first, &mut content);
            self.shared
                .backlog
                .fetch_add(content.len(), Ordering::AcqRel);
            let sent = self.content.send((first, content));
            sent.map_err(|mpsc::SendError(_copy)| SnapshotError::Cancelled)?;
        }
        self.let_go(group, 1)
    }

    /// These groups are safe, and can be written.
    fn let_go(&mut self, group: usize, count: usize) -> Result<(), SnapshotError> {
        let end = (group + count).min(self.todo.len());
        self.todo[group..end].fill(false);
        let first = PageIndex(group as u64 * GROUP);
        let pages = (count as u64 * GROUP).min(self.watched.memory().pages() - first.0);
        self.watched.allow_writes(first, pages)?;
        self.shared.pages.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }
}
