use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use dunlin_guest::{Memory, PageIndex};

use super::{FaultingMemory, Userfaultfd};
use crate::pages::PAGE;

fn faulting(bytes: u64) -> Option<FaultingMemory> {
    match Userfaultfd::open() {
        Ok(uffd) => {
            let memory = Memory::new(bytes).unwrap();
            Some(FaultingMemory::new(Arc::new(uffd), memory))
        }
        Err(error) => {
            eprintln!("SKIP: {error}");
            None
        }
    }
}

fn next_fault(memory: &FaultingMemory) -> PageIndex {
    let (quiet, _open) = std::io::pipe().unwrap();
    let mut faults = Vec::new();
    for _ in 0..100 {
        let patience = Duration::from_millis(200);
        if memory.uffd().wait(quiet.as_raw_fd(), patience).unwrap() {
            memory.uffd().read(&mut faults).unwrap();
        }
        if let Some(&address) = faults.first() {
            return memory.page_at(address).unwrap();
        }
    }
    panic!("no fault came");
}

fn content(memory: &Memory, page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    assert!(memory.read_page(PageIndex(page), &mut bytes));
    bytes
}

#[test]
fn a_thread_that_touches_a_missing_page_waits_until_it_is_placed() {
    let Some(faulting) = faulting(1 << 20) else {
        return;
    };
    faulting.memory().write_page(PageIndex(7), &[1; PAGE]);
    faulting.discard(PageIndex(7), 1).unwrap();
    faulting.register().unwrap();
    let (sender, seen) = channel();
    let memory = faulting.memory().clone();
    let reader = std::thread::spawn(move || sender.send(content(&memory, 7)).unwrap());
    assert_eq!(next_fault(&faulting), PageIndex(7));
    assert!(seen.try_recv().is_err());
    assert_eq!(faulting.place(PageIndex(7), &[9; PAGE]).unwrap(), 1);
    assert_eq!(seen.recv().unwrap(), [9; PAGE]);
    reader.join().unwrap();
    faulting.unregister().unwrap();
}

#[test]
fn the_kernel_waits_too_when_it_reads_a_missing_page_for_a_device() {
    use std::io::Write;
    let Some(faulting) = faulting(1 << 20) else {
        return;
    };
    faulting.register().unwrap();
    let memory = faulting.memory().clone();
    let writer = std::thread::spawn(move || {
        let at = memory.host_page(PageIndex(3)).unwrap();
        // SAFETY: a whole page of a mapping that `memory` keeps; nobody writes it but the kernel.
        #[expect(unsafe_code, reason = "a device's view of guest memory")]
        let page = unsafe { std::slice::from_raw_parts(at.as_ptr(), PAGE) };
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(page).unwrap();
        let mut back = vec![0; PAGE];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 0).unwrap();
        back
    });
    assert_eq!(next_fault(&faulting), PageIndex(3));
    faulting.place(PageIndex(3), &[5; PAGE]).unwrap();
    assert_eq!(writer.join().unwrap(), vec![5; PAGE]);
    faulting.unregister().unwrap();
}

#[test]
fn a_page_that_is_there_is_never_overwritten_and_the_run_around_it_is_placed() {
    let Some(faulting) = faulting(1 << 20) else {
        return;
    };
    faulting.register().unwrap();
    faulting.place(PageIndex(11), &[1; PAGE]).unwrap();
    faulting.memory().write_page(PageIndex(11), &[2; PAGE]);
    assert_eq!(faulting.place(PageIndex(10), &[3; 4 * PAGE]).unwrap(), 3);
    assert_eq!(faulting.place_zeros(PageIndex(9), 6).unwrap(), 2);
    let memory = faulting.memory();
    assert_eq!(content(memory, 9), [0; PAGE]);
    assert_eq!(content(memory, 10), [3; PAGE]);
    assert_eq!(content(memory, 11), [2; PAGE]);
    assert_eq!(content(memory, 13), [3; PAGE]);
    assert_eq!(content(memory, 14), [0; PAGE]);
    faulting.unregister().unwrap();
}

#[test]
fn a_writer_waits_until_writes_are_allowed_and_readers_do_not() {
    let Some(faulting) = faulting(1 << 20) else {
        return;
    };
    if !faulting.uffd().serves_writes() {
        eprintln!("SKIP: {}", super::UffdError::NoWrites);
        return;
    }
    faulting.memory().write_page(PageIndex(7), &[1; PAGE]);
    faulting.register_writes().unwrap();
    faulting.forbid_writes(PageIndex(0), 256).unwrap();
    // One page that is there, and one that is a hole.
    for (page, before) in [(7, 1), (8, 0)] {
        assert_eq!(content(faulting.memory(), page), [before; PAGE]);
        let memory = faulting.memory().clone();
        let writer = std::thread::spawn(move || memory.write_page(PageIndex(page), &[2; PAGE]));
        assert_eq!(next_fault(&faulting), PageIndex(page));
        assert_eq!(content(faulting.memory(), page), [before; PAGE]);
        faulting.allow_writes(PageIndex(page), 1).unwrap();
        assert!(writer.join().unwrap());
        assert_eq!(content(faulting.memory(), page), [2; PAGE]);
    }
    faulting.unregister().unwrap();
    faulting.memory().write_page(PageIndex(9), &[3; PAGE]);
}

#[test]
fn letting_go_frees_who_waits() {
    let Some(faulting) = faulting(1 << 20) else {
        return;
    };
    faulting.register().unwrap();
    let memory = faulting.memory().clone();
    let reader = std::thread::spawn(move || content(&memory, 20));
    assert_eq!(next_fault(&faulting), PageIndex(20));
    faulting.unregister().unwrap();
    assert_eq!(reader.join().unwrap(), [0; PAGE]);
}
