//! Guests that run on while they are saved, and run before they have been read.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use dunlin_guest::{Memory, PageIndex, SavedState};
use dunlin_migration::file::{
    self, AfterFailure, LazyRestore, LiveSave, Restored, SaveReport, SnapshotError,
};
use dunlin_migration::{
    CancelToken, DestinationMachine, MachineError, Slowdown, SourceMachine, Userfaultfd,
};
use support::{Conduct, DestinationSide, Load, SourceSide, page_content};

const PAGE: usize = 4096;
/// More than the capture copies ahead of the disk, so that the last pages are still to be copied
/// when the guest goes on.
const RAM: u64 = 32 << 20;

fn faults() -> Option<Arc<Userfaultfd>> {
    match Userfaultfd::open() {
        Ok(faults) if faults.serves_writes() => Some(Arc::new(faults)),
        Ok(_) => {
            eprintln!("SKIP: this kernel's userfaultfd does not serve writes to shared memory");
            None
        }
        Err(error) => {
            eprintln!("SKIP: {error}");
            None
        }
    }
}

fn live(faults: &Arc<Userfaultfd>) -> LiveSave<'static> {
    LiveSave {
        faults: Arc::clone(faults),
        cancel: CancelToken::new(),
        progress: Box::new(|_| {}),
    }
}

fn refused(what: &'static str) -> MachineError {
    MachineError {
        action: what,
        source: "told to".into(),
    }
}

type OnResume = Box<dyn FnMut(&Memory) -> Result<(), MachineError> + Send>;

/// A machine whose every page has content, and that writes when it goes on.
struct Writer {
    memory: Memory,
    on_resume: OnResume,
}

impl Writer {
    fn new(on_resume: impl FnMut(&Memory) -> Result<(), MachineError> + Send + 'static) -> Self {
        let memory = Memory::new(RAM).unwrap();
        // The last group has a hole, too.
        for page in 0..memory.pages() - 1 {
            memory.write_page(PageIndex(page), &page_content(page, 1));
        }
        Self {
            memory,
            on_resume: Box::new(on_resume),
        }
    }

    /// Nobody holds writers of its memory up.
    fn assert_writable(&self) {
        for page in 0..self.memory.pages() {
            self.memory.write_page(PageIndex(page), &[3; PAGE]);
        }
    }
}

impl SourceMachine for Writer {
    fn memory(&self) -> &Memory {
        &self.memory
    }
    fn configuration(&self) -> Vec<u8> {
        Vec::new()
    }
    fn start_dirty_tracking(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
    fn collect_dirty(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
    fn stop_dirty_tracking(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
    fn throttle(&mut self, _slowdown: Slowdown) -> Result<(), MachineError> {
        Ok(())
    }
    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        (self.on_resume)(&self.memory)
    }
    fn save(&mut self) -> Result<Vec<SavedState>, MachineError> {
        Ok(Vec::new())
    }
}

/// A machine that looks at RAM while it is restored.
struct Reader {
    memory: Memory,
    looks_at: Vec<u64>,
    seen: Vec<[u8; PAGE]>,
}

impl Reader {
    fn build(looks_at: &[u64]) -> Self {
        Self {
            memory: Memory::new(RAM).unwrap(),
            looks_at: looks_at.to_vec(),
            seen: Vec::new(),
        }
    }

    fn page(&self, page: u64) -> [u8; PAGE] {
        let mut content = [0; PAGE];
        assert!(self.memory.read_page(PageIndex(page), &mut content));
        content
    }

    fn assert_as_written_first(&self) {
        for page in 0..self.memory.pages() - 1 {
            assert!(self.page(page) == page_content(page, 1), "page {page}");
        }
        assert_eq!(self.page(self.memory.pages() - 1), [0; PAGE]);
    }
}

impl DestinationMachine for Reader {
    fn memory(&self) -> &Memory {
        &self.memory
    }
    fn restore(&mut self, _states: Vec<SavedState>) -> Result<(), MachineError> {
        self.seen = self.looks_at.iter().map(|&page| self.page(page)).collect();
        Ok(())
    }
    fn start(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}

type Ends = Receiver<Result<(), SnapshotError>>;

fn lazily(faults: &Arc<Userfaultfd>) -> (LazyRestore, Ends) {
    let (sender, ends) = channel();
    let lazy = LazyRestore {
        faults: Arc::clone(faults),
        on_end: Box::new(move |end| sender.send(end).unwrap()),
    };
    (lazy, ends)
}

fn save_paused(path: &Path) -> SaveReport {
    file::save(&mut Writer::new(|_| Ok(())), path).unwrap()
}

#[test]
fn the_file_holds_the_moment_of_the_pause_whatever_is_written_afterwards() {
    let Some(faults) = faults() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (paused, running) = (folder.path().join("paused"), folder.path().join("running"));
    let last = RAM / PAGE as u64 - 1;
    let writers = Arc::new(Mutex::new(Vec::new()));
    let threads = Arc::clone(&writers);
    let mut machine = Writer::new(move |memory| {
        // As going on does: from the thread that called, before anybody writes the file.
        for page in [last, last - 100, last - 16] {
            memory.write_page(PageIndex(page), &[9; PAGE]);
        }
        // As a device does: the kernel writes.
        let at = memory.host_page(PageIndex(last - 200)).unwrap();
        // SAFETY: a whole page of a mapping that `memory` keeps; nobody else touches it.
        #[expect(unsafe_code, reason = "a device's view of guest memory")]
        let page = unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), PAGE) };
        std::fs::File::open("/dev/zero")
            .unwrap()
            .read_exact(page)
            .unwrap();
        // As processors do: everything, while the file is written.
        let memory = memory.clone();
        threads.lock().unwrap().push(std::thread::spawn(move || {
            for page in (0..memory.pages()).rev() {
                memory.write_page(PageIndex(page), &[8; PAGE]);
            }
        }));
        Ok(())
    });
    let report = file::save_live(&mut machine, &running, live(&faults)).unwrap();
    assert!(report.writers_held.unwrap() >= 4, "{report:?}");
    assert_eq!(report.ram_hash, save_paused(&paused).ram_hash);
    for writer in writers.lock().unwrap().drain(..) {
        writer.join().unwrap();
    }
    machine.assert_writable();
    let back = file::restore(&running, |_| Ok(Reader::build(&[]))).unwrap();
    back.assert_as_written_first();
}

#[test]
fn a_guest_that_writes_on_comes_back_whole_from_both_kinds_of_restore() {
    let Some(faults) = faults() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest");
    let mut machine = SourceSide::running(Load {
        ram: RAM,
        working_set: RAM / PAGE as u64,
        pages_per_second: 20_000.0,
    });
    let report = file::save_live(&mut machine, &path, live(&faults)).unwrap();
    machine.assert_runs_whole();
    assert!(report.pause_ms.is_some());
    let build = |configuration: &[u8]| {
        let conduct = Conduct {
            trusting: true,
            ..Conduct::default()
        };
        DestinationSide::build(configuration, Arc::new(conduct))
    };
    let eager = file::restore(&path, build).unwrap();
    eager.guest().assert_whole();
    let (lazy, ends) = lazily(&faults);
    let Restored {
        machine: back,
        rest,
    } = file::restore_lazily(&path, lazy, build).unwrap();
    // It runs at once, whatever has been read.
    back.guest().start();
    back.assert_runs_whole();
    ends.recv().unwrap().unwrap();
    let (done, all) = rest.unwrap().progress();
    assert_eq!(done, all);
    back.assert_runs_whole();
    assert!(machine.guest.counter() > eager.guest().counter());
}

#[test]
fn a_lazy_restore_gives_each_page_when_it_is_touched_and_survives_the_file() {
    let Some(faults) = faults() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest");
    save_paused(&path);
    let last = RAM / PAGE as u64 - 1;
    let (lazy, ends) = lazily(&faults);
    let build = |_: &[u8]| Ok(Reader::build(&[last - 1, 7, last]));
    let restored = file::restore_lazily(&path, lazy, build).unwrap();
    std::fs::remove_file(&path).unwrap();
    let machine = restored.machine;
    assert!(machine.seen[0] == page_content(last - 1, 1));
    assert!(machine.seen[1] == page_content(7, 1));
    assert!(machine.seen[2] == [0; PAGE]);
    machine.memory.write_page(PageIndex(9), &[5; PAGE]);
    ends.recv().unwrap().unwrap();
    drop(restored.rest);
    assert_eq!(machine.page(9), [5; PAGE], "what the guest wrote stays");
    machine.memory.write_page(PageIndex(9), &page_content(9, 1));
    machine.assert_as_written_first();
}

#[test]
fn a_file_that_changes_under_a_running_guest_is_its_end_and_never_garbage() {
    let Some(faults) = faults() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest");
    for cut in [false, true] {
        save_paused(&path);
        let (lazy, ends) = lazily(&faults);
        let damage = |_: &[u8]| {
            // After the page table was read, before the pages are.
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            if cut {
                file.set_len(RAM / 2).unwrap();
            } else {
                file.write_all_at(&[0xee; 3], RAM / 2).unwrap();
            }
            Ok(Reader::build(&[3]))
        };
        // The guest looks at a page that is whole; the damage is found when it runs, or before.
        match file::restore_lazily(&path, lazy, damage) {
            Ok(restored) => {
                assert!(restored.machine.seen[0] == page_content(3, 1));
                let error = ends.recv().unwrap().unwrap_err();
                assert!(is_damage(&error), "{error}");
            }
            Err(error) => assert!(is_damage(&error), "{error}"),
        }
    }
}

fn is_damage(error: &SnapshotError) -> bool {
    matches!(
        error,
        SnapshotError::Pages { .. } | SnapshotError::NotWhole { .. }
    )
}

#[test]
fn a_machine_that_needs_a_damaged_page_to_be_restored_is_refused() {
    let Some(faults) = faults() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest");
    save_paused(&path);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xee; 3], RAM / 2).unwrap();
    let (lazy, ends) = lazily(&faults);
    let all: Vec<u64> = (0..RAM / PAGE as u64).collect();
    let error = file::restore_lazily(&path, lazy, |_| Ok(Reader::build(&all)));
    assert!(matches!(error, Err(SnapshotError::Pages { .. })));
    assert!(ends.recv().is_err(), "nobody is told of what was refused");
}

#[test]
fn a_save_that_fails_leaves_the_guest_writable_and_no_file() {
    let Some(faults) = faults() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest");
    let nothing_left = || std::fs::read_dir(folder.path()).unwrap().next().is_none();

    let nowhere = folder.path().join("nowhere").join("guest");
    let mut machine = Writer::new(|_| panic!("it was not paused"));
    let failure = file::save_live(&mut machine, &nowhere, live(&faults)).unwrap_err();
    assert_eq!(failure.guest, AfterFailure::Runs);
    machine.assert_writable();

    let mut machine = Writer::new(|_| Ok(()));
    let cancelled = live(&faults);
    cancelled.cancel.cancel();
    let failure = file::save_live(&mut machine, &path, cancelled).unwrap_err();
    assert!(matches!(failure.error, SnapshotError::Cancelled));
    assert_eq!(failure.guest, AfterFailure::Runs);
    machine.assert_writable();
    assert!(nothing_left());

    let mut machine = Writer::new(|_| Err(refused("go on")));
    let failure = file::save_live(&mut machine, &path, live(&faults)).unwrap_err();
    assert_eq!(failure.guest, AfterFailure::Paused);
    machine.assert_writable();
    assert!(nothing_left());
}

#[test]
fn one_descriptor_serves_one_save_after_the_other() {
    let Some(faults) = faults() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut machine = Writer::new(|_| Ok(()));
    let hashes: Vec<_> = (0..3)
        .map(|n| {
            let path = folder.path().join(n.to_string());
            let report = file::save_live(&mut machine, &path, live(&faults)).unwrap();
            report.ram_hash
        })
        .collect();
    assert_eq!(hashes[0], hashes[1]);
    assert_eq!(hashes[0], hashes[2]);
    machine.assert_writable();
}
