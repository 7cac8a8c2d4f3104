//! Pages as bytes: which are zero, what they hash to, where RAM was never touched.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use dunlin_guest::{Memory, PAGE_SIZE, PageIndex};
use dunlin_lane::Window;

/// A page of bytes.
pub(crate) const PAGE: usize = PAGE_SIZE as usize;

const K0: u64 = 0x9e37_79b9_7f4a_7c15;
const K1: u64 = 0xbf58_476d_1ce4_e5b9;
const K2: u64 = 0x94d0_49bb_1331_11eb;

/// Is every byte zero?
pub(crate) fn is_zero(page: &[u8]) -> bool {
    page.chunks(256).all(|chunk| {
        let words = chunk.chunks_exact(8);
        words.remainder().iter().all(|&byte| byte == 0)
            && words.fold(0, |acc, word| acc | word_of(word)) == 0
    })
}

/// Hash of one page at its place: zero for a page of zeros, so that RAM of zeros hashes to zero
/// and pages that were never touched need not be read. The hash of RAM is the wrapping sum over
/// its pages, which can be kept up to date page by page and in any order. It finds errors; it
/// is not made to resist an adversary.
pub(crate) fn hash(index: PageIndex, page: &[u8]) -> u64 {
    let mut lanes = [K0, K1, K2, K0 ^ K1];
    let mut any = 0;
    for chunk in page.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(chunk.chunks_exact(8)) {
            let word = word_of(word);
            any |= word;
            *lane = (*lane ^ word).wrapping_mul(K0).rotate_left(29);
        }
    }
    if any == 0 {
        return 0;
    }
    let mut sum = mix(index.0 ^ K2);
    for lane in lanes {
        sum = mix(sum.rotate_left(17) ^ lane);
    }
    sum
}

fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(K1);
    x = (x ^ (x >> 27)).wrapping_mul(K2);
    x ^ (x >> 31)
}

/// Hash of all RAM, which must not change meanwhile.
pub(crate) fn hash_ram(memory: &Memory) -> u64 {
    let mut sum: u64 = 0;
    let mut extents = Extents::new(memory);
    let mut page = [0u8; PAGE];
    let mut next = 0;
    while next < memory.pages() {
        let index = PageIndex(next);
        if let Some(end) = extents.hole_at(index) {
            next = end;
            continue;
        }
        if memory.read_page(index, &mut page) {
            sum = sum.wrapping_add(hash(index, &page));
        }
        next += 1;
    }
    sum
}

/// Pages that are looked at together: 1 MiB.
const PIECE: u64 = 256;

/// Where the memory file has data and where it has holes. Asked in ascending order.
pub(crate) struct Extents<'a> {
    memory: &'a Memory,
    /// The pages from `.0` to `.1` are of kind `.2`, true for a hole.
    known: (u64, u64, bool),
}

impl<'a> Extents<'a> {
    pub(crate) fn new(memory: &'a Memory) -> Self {
        Self {
            memory,
            known: (0, 0, false),
        }
    }

    /// The first page behind the hole that `page` lies in; `None` when it has data. A page in a
    /// hole was never written, so it is zero, and stays unallocated when it is not read.
    pub(crate) fn hole_at(&mut self, page: PageIndex) -> Option<u64> {
        if !(self.known.0..self.known.1).contains(&page.0) {
            self.known = self.look_up(page.0);
        }
        self.known.2.then_some(self.known.1)
    }

    fn look_up(&self, page: u64) -> (u64, u64, bool) {
        let pages = self.memory.pages();
        let at = page * PAGE_SIZE;
        match self.seek(at, libc::SEEK_DATA) {
            Seek::At(data) if data / PAGE_SIZE > page => (page, data / PAGE_SIZE, true),
            Seek::At(_) => {
                // Not by `SEEK_HOLE`: of full memory that looks at all of it in one go, for longer
                // than a guest may wait for this processor.
                let run = self
                    .memory
                    .resident_run(PageIndex(page), PIECE)
                    .unwrap_or(1);
                (page, page + run.max(1), false)
            }
            Seek::Nothing => (page, pages, true),
            Seek::Unknown => (page, pages, false),
        }
    }

    fn seek(&self, offset: u64, whence: libc::c_int) -> Seek {
        // SAFETY: lseek takes plain integers; nobody reads RAM's file by its file position.
        #[expect(unsafe_code, reason = "std has no SEEK_DATA")]
        let result = unsafe { libc::lseek(self.memory.file().as_raw_fd(), offset as i64, whence) };
        if result >= 0 {
            return Seek::At(result as u64);
        }
        match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::ENXIO) => Seek::Nothing,
            _ => Seek::Unknown,
        }
    }
}

enum Seek {
    At(u64),
    Nothing,
    Unknown,
}

/// Guest RAM as windows, one for each stretch that is contiguous here.
pub(crate) fn windows(memory: &Memory) -> Vec<Window> {
    let windows = memory.regions().filter_map(|region| {
        let start: NonNull<u8> = memory.host_page(PageIndex(region.offset / PAGE_SIZE))?;
        let range = region.offset..region.offset + region.size;
        let keep = Arc::new(memory.clone());
        // SAFETY: the mapping of a region is as long as the region, and `keep` holds it. Guest
        // RAM is never behind a Rust reference: whoever reads or writes it copies raw bytes.
        #[expect(unsafe_code, reason = "lanes read and place pages without a copy")]
        Some(unsafe { Window::new(range, start, keep) })
    });
    windows.collect()
}

/// CPU time of the calling thread, in seconds.
pub(crate) fn thread_cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the timespec lives across the call, which fills it.
    #[expect(unsafe_code, reason = "clock_gettime has no safe wrapper in std")]
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    if result == 0 {
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_makes_a_page_non_zero_and_changes_its_hash() {
        let mut page = [0u8; PAGE];
        assert!(is_zero(&page));
        assert_eq!(hash(PageIndex(3), &page), 0);
        let mut seen = std::collections::HashSet::new();
        for byte in 0..PAGE {
            page[byte] = 1;
            assert!(!is_zero(&page), "byte {byte}");
            assert!(seen.insert(hash(PageIndex(3), &page)), "byte {byte}");
            page[byte] = 0;
        }
    }

    #[test]
    fn the_hash_of_ram_depends_on_place_and_content() {
        let memory = Memory::new(1 << 20).unwrap();
        assert_eq!(hash_ram(&memory), 0);
        let page = [5u8; PAGE];
        memory.write_page(PageIndex(7), &page);
        let seven = hash_ram(&memory);
        assert_eq!(seven, hash(PageIndex(7), &page));
        memory.write_page(PageIndex(7), &[0; PAGE]);
        assert_eq!(hash_ram(&memory), 0);
        memory.write_page(PageIndex(8), &page);
        assert_ne!(hash_ram(&memory), seven);
    }

    #[test]
    fn untouched_ram_is_a_hole_and_stays_one() {
        let memory = Memory::new(16 << 20).unwrap();
        memory.write_page(PageIndex(100), &[1; PAGE]);
        hash_ram(&memory);
        let mut extents = Extents::new(&memory);
        assert_eq!(extents.hole_at(PageIndex(0)), Some(100));
        assert_eq!(extents.hole_at(PageIndex(100)), None);
        assert_eq!(extents.hole_at(PageIndex(101)), Some(memory.pages()));
    }
}
