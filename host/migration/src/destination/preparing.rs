//! Host memory for pages that are on their way.
//!
//! The first touch of a page of guest RAM makes the kernel find, clear and map a page of the host,
//! which takes longer than receiving it. Sources say ahead which pages will come, and this thread
//! lets the kernel prepare them (`MADV_POPULATE_WRITE`) while the lanes receive those before. A page
//! that it is too late for costs what it would have cost anyway.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use dunlin_guest::{Memory, PAGE_SIZE, PageIndex};

use crate::error::MigrationError;
use crate::options::CancelToken;
use crate::protocol::runs::Run;

/// Announcements that wait; more are passed over.
const WAITING: usize = 64;
/// How often the thread looks whether it shall end.
const SLICE: Duration = Duration::from_millis(100);
/// Pages that are prepared at once: 1 MiB.
const STEP: u64 = 256;
/// `MADV_POPULATE_WRITE` of Linux 5.14.
const POPULATE_WRITE: libc::c_int = 23;

/// Starts the thread; what it is sent, it prepares, until `stop`.
pub(super) fn start(
    memory: Memory,
    stop: CancelToken,
) -> Result<SyncSender<Vec<Run>>, MigrationError> {
    let (sender, inbox) = sync_channel(WAITING);
    std::thread::Builder::new()
        .name("page-preparer".to_owned())
        .spawn(move || run(&memory, &stop, &inbox))
        .map_err(|source| MigrationError::Host {
            what: "a thread",
            source,
        })?;
    Ok(sender)
}

fn run(memory: &Memory, stop: &CancelToken, inbox: &Receiver<Vec<Run>>) {
    while !stop.is_cancelled() {
        let runs = match inbox.recv_timeout(SLICE) {
            Ok(runs) => runs,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => continue,
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return,
        };
        for run in runs {
            let end = run.first.0 + u64::from(run.count);
            let mut at = run.first.0;
            while at < end && !stop.is_cancelled() {
                let count = STEP.min(end - at);
                if !populate(memory, at, count) {
                    // An old kernel, or one without memory: the lanes will find out.
                    return;
                }
                at += count;
            }
        }
    }
}

/// Prepares pages; false when the kernel does not.
fn populate(memory: &Memory, first: u64, count: u64) -> bool {
    let last = memory.host_page(PageIndex(first + count - 1));
    let (Some(start), Some(last)) = (memory.host_page(PageIndex(first)), last) else {
        return false;
    };
    let length = (count * PAGE_SIZE) as usize;
    if last.as_ptr() as usize - start.as_ptr() as usize != length - PAGE_SIZE as usize {
        // The run crosses from one mapping to the next: not worth two calls.
        return true;
    }
    // SAFETY: the range is whole pages of one mapping that `memory` holds; the call changes no
    // content.
    #[expect(unsafe_code, reason = "madvise has no safe wrapper in std")]
    let result = unsafe { libc::madvise(start.as_ptr().cast(), length, POPULATE_WRITE) };
    result == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_memory_afterwards_and_no_others_do() {
        use std::os::unix::fs::MetadataExt;
        let memory = Memory::new(16 << 20).unwrap();
        let first = PageIndex(100);
        assert!(first.0 + 300 < memory.pages());
        let stop = CancelToken::new();
        let (sender, inbox) = sync_channel(1);
        sender.send(vec![Run { first, count: 300 }]).unwrap();
        drop(sender);
        run(&memory, &stop, &inbox);
        let bytes = memory.file().metadata().unwrap().blocks() * 512;
        if bytes == 0 {
            println!("SKIP: this kernel does not populate memory on demand");
            return;
        }
        assert_eq!(bytes, 300 * PAGE_SIZE);
    }

    #[test]
    fn a_run_across_the_hole_in_the_address_space_is_left_to_the_lanes() {
        let memory = Memory::new((3 << 30) + (1 << 20)).unwrap();
        let border = (3 << 30) / PAGE_SIZE;
        assert!(populate(&memory, border - 1, 2));
        assert!(!populate(&memory, memory.pages(), 1));
    }
}
