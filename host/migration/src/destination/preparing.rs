//! Host memory for pages that are on their way.
//!
//! The first touch of a page of guest RAM makes the kernel find, clear and map a page of the host,
//! which takes longer than receiving it. Sources say ahead which pages will come, and a thread
//! lets the kernel prepare them (`MADV_POPULATE_WRITE`) while the lanes receive those before. When it
//! falls behind, the lanes lend a hand. A page that this is too late for costs what it would have cost
//! anyway.
//!
//! Where all pages of a [huge page](dunlin_guest::HUGE_PAGE_SIZE) will come, the kernel is asked for
//! one (`MADV_COLLAPSE`, which does not depend on the host's setting for huge pages in shared
//! memory). It is prepared in a tenth of the time of 512 pages, and the guest runs faster on it. A
//! post-copy that follows splits it again where pages are missing.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dunlin_guest::{HUGE_PAGE_SIZE, Memory, PAGE_SIZE, PageIndex};

use crate::error::MigrationError;
use crate::options::CancelToken;
use crate::pages;
use crate::protocol::runs::Run;

/// Announcements that wait for the thread: half of what sources say ahead. A lane that brings more
/// does it itself, since lanes that come to unprepared memory would take longer still.
const WAITING: usize = 8;
/// How often the thread looks whether it shall end.
const SLICE: Duration = Duration::from_millis(100);
/// Pages that are prepared at once: 1 MiB.
const STEP: u64 = 256;
/// `MADV_POPULATE_WRITE` of Linux 5.14.
const POPULATE_WRITE: libc::c_int = 23;
/// `MADV_COLLAPSE` of Linux 6.1.
const COLLAPSE: libc::c_int = 25;
/// Pages of a huge page.
const HUGE: u64 = HUGE_PAGE_SIZE / PAGE_SIZE;
/// Huge pages that are asked for at once. The kernel has all processors give back what they put aside of
/// its lists of pages, once for each call, and waits for them: on a busy host that takes as long as a huge
/// page.
const GROUP: u64 = 8;
/// [`Work::slow_seconds`] of every session.
const SLOW_SECONDS: f64 = 0.010;
/// Huge pages that are not asked for after the host had none at hand.
const REST: u32 = 16;

/// What the lanes of a session share to have memory prepared.
pub(super) struct Preparer {
    work: Arc<Work>,
    thread: SyncSender<Vec<Run>>,
}

struct Work {
    memory: Memory,
    stop: CancelToken,
    /// Huge pages that are not asked for next.
    rest: AtomicU32,
    /// A huge page for which the processor took longer had to be made room for.
    slow_seconds: f64,
    /// The kernel does not populate, or has no memory: the lanes will find out. Or it shall not.
    vain: AtomicBool,
    /// Held while the kernel prepares.
    at_work: Mutex<()>,
}

impl Preparer {
    /// Starts the thread, which ends by `stop` or with the preparer.
    pub(super) fn start(memory: Memory, stop: CancelToken) -> Result<Self, MigrationError> {
        let work = Arc::new(Work {
            memory,
            stop,
            rest: AtomicU32::new(0),
            slow_seconds: SLOW_SECONDS,
            vain: AtomicBool::new(false),
            at_work: Mutex::new(()),
        });
        let (thread, inbox) = sync_channel(WAITING);
        let its = Arc::clone(&work);
        std::thread::Builder::new()
            .name("page-preparer".to_owned())
            .spawn(move || its.run(&inbox))
            .map_err(|source| MigrationError::Host {
                what: "a thread",
                source,
            })?;
        Ok(Self { work, thread })
    }

    /// Prepares nothing more, and waits until nothing is: absent pages have a meaning from now on.
    pub(super) fn end(&self) {
        self.work.vain.store(true, Relaxed);
        drop(self.work.at_work());
    }

    /// Has pages prepared that are on their way: by the thread, or here when it has enough to do.
    pub(super) fn expect(&self, runs: Vec<Run>) {
        match self.thread.try_send(runs) {
            Ok(()) => {}
            Err(TrySendError::Full(runs) | TrySendError::Disconnected(runs)) => {
                self.work.prepare(&runs);
            }
        }
    }
}

impl Work {
    fn at_work(&self) -> MutexGuard<'_, ()> {
        self.at_work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, inbox: &Receiver<Vec<Run>>) {
        while !self.stop.is_cancelled() {
            match inbox.recv_timeout(SLICE) {
                Ok(mut runs) => {
                    // All that is known, so that it can be done at once.
                    for more in inbox.try_iter().take(WAITING) {
                        for run in more {
                            append(&mut runs, run);
                        }
                    }
                    self.prepare(&runs);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn prepare(&self, runs: &[Run]) {
        for run in runs {
            let end = run.first.0 + u64::from(run.count);
            let mut at = run.first.0;
            while at < end {
                let _at_work = self.at_work();
                if self.stop.is_cancelled() || self.vain.load(Relaxed) {
                    return;
                }
                let whole = if at.is_multiple_of(HUGE) {
                    (end - at) / HUGE
                } else {
                    0
                };
                let huge = self.prepare_huge(at, whole.min(GROUP));
                if huge == 0 {
                    let border = (at + 1).next_multiple_of(HUGE);
                    let count = STEP.min(end.min(border) - at);
                    let able = populate(&self.memory, at, count);
                    self.vain.fetch_or(!able, Relaxed);
                    at += count;
                }
                at += huge * HUGE;
            }
        }
    }

    /// Prepares huge pages, `most` at most, if it may be tried; how many are there afterwards.
    fn prepare_huge(&self, first: u64, most: u64) -> u64 {
        let rested = |rest: u32| rest.checked_sub(1);
        if most == 0 || self.rest.fetch_update(Relaxed, Relaxed, rested).is_ok() {
            return 0;
        }
        let start = self.memory.host_page(PageIndex(first));
        // Where lanes are at work already, what they brought would have to be copied. And RAM above the
        // hole in the address space lies elsewhere.
        let wanted = |huge: &u64| {
            let page = PageIndex(first + huge * HUGE);
            let place = self.memory.host_page(page).map(|place| place.addr().get());
            let follows = start.map(|start| start.addr().get() + (huge * HUGE_PAGE_SIZE) as usize);
            place == follows && matches!(self.memory.resident_run(page, 1), Ok(0))
        };
        let count = (0..most).take_while(wanted).count() as u64;
        if count == 0 {
            return 0;
        }
        let begun = pages::thread_cpu_seconds();
        let made = make_huge(&self.memory, first, count);
        if !made || pages::thread_cpu_seconds() - begun > self.slow_seconds * count as f64 {
            self.rest.store(REST, Relaxed);
        }
        if made { count } else { 0 }
    }
}

/// Adds a run to others, the last of which it may go on.
fn append(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut()
        && last.first.0 + u64::from(last.count) == run.first.0
        && let Some(count) = last.count.checked_add(run.count)
    {
        last.count = count;
        return;
    }
    runs.push(run);
}

/// Prepares huge pages that follow each other; false when the kernel does not give all of them.
fn make_huge(memory: &Memory, first: u64, count: u64) -> bool {
    let aligned = memory
        .host_page(PageIndex(first))
        .is_some_and(|start| start.addr().get().is_multiple_of(HUGE_PAGE_SIZE as usize));
    // The kernel has nothing to collapse where no page is at all.
    let mut begun = (0..count).map(|huge| populate(memory, first + huge * HUGE, 1));
    aligned && begun.all(|able| able) && advise(memory, first, count * HUGE, COLLAPSE)
}

/// Prepares pages; false when the kernel does not.
fn populate(memory: &Memory, first: u64, count: u64) -> bool {
    advise(memory, first, count, POPULATE_WRITE)
}

/// Gives one of the two advices about pages; false when the kernel does not follow it.
fn advise(memory: &Memory, first: u64, count: u64, advice: libc::c_int) -> bool {
    let last = memory.host_page(PageIndex(first + count - 1));
    let (Some(start), Some(last)) = (memory.host_page(PageIndex(first)), last) else {
        return false;
    };
    let length = (count * PAGE_SIZE) as usize;
    if last.as_ptr() as usize - start.as_ptr() as usize != length - PAGE_SIZE as usize {
        // The run crosses from one mapping to the next: not worth two calls.
        return true;
    }
    // SAFETY: the range is whole pages of one mapping that `memory` holds; neither advice changes
    // content.
    #[expect(unsafe_code, reason = "madvise has no safe wrapper in std")]
    let result = unsafe { libc::madvise(start.as_ptr().cast(), length, advice) };
    result == 0
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::uffd::{FaultingMemory, Userfaultfd};

    fn work(memory: &Memory) -> Work {
        Work {
            memory: memory.clone(),
            stop: CancelToken::new(),
            rest: AtomicU32::new(0),
            // However busy the machine is.
            slow_seconds: f64::INFINITY,
            vain: AtomicBool::new(false),
            at_work: Mutex::new(()),
        }
    }

    #[test]
    fn what_is_too_much_for_the_thread_is_done_at_once() {
        let memory = Memory::new(16 << 20).unwrap();
        let (thread, inbox) = sync_channel(1);
        let work = Arc::new(work(&memory));
        let preparer = Preparer { work, thread };
        let run = |first| Run {
            first: PageIndex(first),
            count: 3,
        };
        preparer.expect(vec![run(5)]);
        preparer.expect(vec![run(10)]);
        let resident = |page| memory.resident_run(PageIndex(page), 9).unwrap();
        if preparer.work.vain.load(Relaxed) {
            println!("SKIP: this kernel does not populate memory on demand");
            return;
        }
        assert_eq!([resident(5), resident(10)], [0, 3]);
        drop(preparer.thread);
        preparer.work.run(&inbox);
        assert_eq!(resident(5), 3);
    }

    #[test]
    fn announcements_that_go_on_become_one() {
        let run = |first, count| Run {
            first: PageIndex(first),
            count,
        };
        let mut runs = vec![run(0, 1024)];
        for more in [
            run(1024, 1024),
            run(2048, 5),
            run(2054, 1),
            run(2055, u32::MAX),
        ] {
            append(&mut runs, more);
        }
        let runs: Vec<_> = runs.iter().map(|run| (run.first.0, run.count)).collect();
        assert_eq!(runs, [(0, 2053), (2054, 1), (2055, u32::MAX)]);
    }

    #[test]
    fn huge_pages_are_not_asked_for_right_after_the_host_had_none() {
        let memory = Memory::new(80 << 20).unwrap();
        if !make_huge(&memory, 0, 1) {
            println!("SKIP: this kernel makes no huge pages on demand");
            return;
        }
        let work = work(&memory);
        work.rest.store(2, Relaxed);
        let made = (1..=4).map(|huge| work.prepare_huge(huge * HUGE, 1));
        assert_eq!(made.collect::<Vec<_>>(), [0, 0, 1, 1]);
        assert_eq!(work.prepare_huge(4 * HUGE, 1), 0, "pages are there already");
        // Those before the first that is there.
        assert!(populate(&memory, 12 * HUGE + 3, 1) && populate(&memory, 13 * HUGE, 1));
        assert_eq!(work.prepare_huge(9 * HUGE, 8), 4);
    }

    #[test]
    fn huge_pages_are_not_asked_for_across_the_hole_in_the_address_space() {
        let below = dunlin_guest::layout::LOW_RAM_END / PAGE_SIZE;
        let memory = Memory::new(dunlin_guest::layout::LOW_RAM_END + (32 << 20)).unwrap();
        if !make_huge(&memory, 0, 1) {
            println!("SKIP: this kernel makes no huge pages on demand");
            return;
        }
        assert_eq!(work(&memory).prepare_huge(below - 2 * HUGE, 8), 2);
        let first = PageIndex(below - 2 * HUGE);
        assert_eq!(memory.resident_run(first, 8 * HUGE).unwrap(), 2 * HUGE);
        let run = Run {
            first,
            count: 8 * HUGE as u32,
        };
        work(&memory).prepare(&[run]);
        let above = memory.resident_run(PageIndex(below), 8 * HUGE).unwrap();
        assert_eq!(above, 6 * HUGE);
    }

    #[test]
    fn pages_have_memory_afterwards_and_no_others_do() {
        use std::os::unix::fs::MetadataExt;
        let memory = Memory::new(16 << 20).unwrap();
        let first = PageIndex(100);
        assert!(first.0 + 300 < memory.pages());
        work(&memory).prepare(&[Run { first, count: 300 }]);
        let bytes = memory.file().metadata().unwrap().blocks() * 512;
        if bytes == 0 {
            println!("SKIP: this kernel does not populate memory on demand");
            return;
        }
        assert_eq!(bytes, 300 * PAGE_SIZE);
    }

    #[test]
    fn where_all_pages_of_a_huge_page_come_there_is_one() {
        let memory = Memory::new(16 << 20).unwrap();
        if !make_huge(&memory, 7 * HUGE, 1) {
            println!("SKIP: this kernel makes no huge pages on demand");
            return;
        }
        let first = PageIndex(HUGE - 2);
        let count = (2 * HUGE + 5) as u32;
        work(&memory).prepare(&[Run { first, count }]);
        assert_eq!(huge_bytes(&memory), 3 * HUGE_PAGE_SIZE);
        assert_eq!(
            memory.resident_run(first, HUGE * 3).unwrap(),
            u64::from(count)
        );
    }

    /// Bytes of huge pages that this process has mapped of the memory's first region.
    fn huge_bytes(memory: &Memory) -> u64 {
        let start = memory.host_page(PageIndex(0)).unwrap().addr().get();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut fields = maps
            .lines()
            .skip_while(|line| !line.starts_with(&format!("{start:x}-")))
            .filter_map(|line| line.strip_prefix("ShmemPmdMapped:"));
        let kibibytes = fields.next().unwrap().trim().trim_end_matches(" kB");
        kibibytes.parse::<u64>().unwrap() << 10
    }

    #[test]
    fn pages_of_a_huge_page_become_holes_one_by_one() {
        let memory = Memory::new(16 << 20).unwrap();
        if !make_huge(&memory, HUGE, 1) {
            println!("SKIP: this kernel makes no huge pages on demand");
            return;
        }
        assert!(memory.write_page(PageIndex(HUGE + 8), &[7; PAGE_SIZE as usize]));
        let Ok(uffd) = Userfaultfd::open() else {
            println!("SKIP: this host has no userfaultfd for us");
            return;
        };
        let ram = FaultingMemory::new(Arc::new(uffd), memory.clone());
        ram.discard(PageIndex(HUGE + 7), 1).unwrap();
        ram.discard(PageIndex(HUGE + 9), 1).unwrap();
        let run = |page| memory.resident_run(PageIndex(page), HUGE).unwrap();
        assert_eq!(
            [run(HUGE), run(HUGE + 7), run(HUGE + 8), run(HUGE + 9)],
            [7, 0, 1, 0]
        );
        let mut page = [0; PAGE_SIZE as usize];
        assert!(memory.read_page(PageIndex(HUGE + 8), &mut page));
        assert_eq!(page, [7; PAGE_SIZE as usize]);
    }

    #[test]
    fn a_run_across_the_hole_in_the_address_space_is_left_to_the_lanes() {
        let memory = Memory::new((3 << 30) + (1 << 20)).unwrap();
        let border = (3 << 30) / PAGE_SIZE;
        assert!(populate(&memory, border - 1, 2));
        assert!(!populate(&memory, memory.pages(), 1));
    }
}
