//! Guest RAM: one memfd, mapped shared, in one or two ranges of guest physical address space.
//!
//! Offsets into the memfd are *RAM offsets*; a [`PageIndex`] counts pages of RAM offset, so RAM
//! has no hole in the dirty log or on the wire although guest physical address space has one.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder,
};

use crate::dirty::{DirtyLog, DirtyRange};
use crate::{HUGE_PAGE_SIZE, PAGE_SIZE, layout};

/// Guest RAM as vm-memory sees it; every write through it marks the dirty log.
pub type Mapping = GuestMemoryMmap<DirtyRange>;

/// A page of RAM, counted by RAM offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// One contiguous range of guest physical address space that is RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// First guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// RAM offset of the first byte.
    pub offset: u64,
}

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is zero, not a multiple of the page size, or more than the address map holds.
    #[error(
        "cannot give a guest {size} bytes of memory: it must be a multiple of 4096 between 1 MiB and {} GiB",
        layout::MAX_RAM >> 30
    )]
    Size {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// The kernel gave no memory file or mapping.
    #[error("failed to reserve {size} bytes of guest memory")]
    Reserve {
        /// What was asked for, in bytes.
        size: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file that came from another process is not the RAM that it should be.
    #[error("the file that came is no guest memory of {size} bytes: {reason}")]
    Foreign {
        /// What it should hold, in bytes.
        size: u64,
        /// What is wrong with it.
        reason: String,
    },
}

/// Guest RAM and its dirty log. Cheap to clone; clones share the same RAM.
#[derive(Debug, Clone)]
pub struct Memory {
    mapping: Mapping,
    file: Arc<File>,
    log: Arc<DirtyLog>,
    regions: Arc<[MappedRegion]>,
    size: u64,
}

#[derive(Debug, Clone)]
struct MappedRegion {
    ram: RamRegion,
    mapping: Arc<MmapRegion<DirtyRange>>,
}

impl Memory {
    /// Reserves `size` bytes of zeroed RAM. Pages take host memory when first touched.
    ///
    /// # Errors
    /// [`MemoryError`] when the size cannot be or the host refuses.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        let regions = ram_regions(size)?;
        let reserve = |source| MemoryError::Reserve { size, source };
        let file = memory_file(size).map_err(reserve)?;
        Self::map(file, size, &regions)
    }

    /// Maps RAM that another process made by [`Memory::new`] and still maps: both see the same
    /// bytes. The dirty log is this process's own.
    ///
    /// # Errors
    /// [`MemoryError::Foreign`] when the file is not `size` bytes of RAM that nobody can cut short
    /// under the mapping, [`MemoryError`] as in [`Memory::new`].
    pub fn from_file(file: File, size: u64) -> Result<Self, MemoryError> {
        let regions = ram_regions(size)?;
        let foreign = |reason: String| MemoryError::Foreign { size, reason };
        let length = file
            .metadata()
            .map_err(|error| foreign(error.to_string()))?;
        if length.len() != size {
            return Err(foreign(format!("it has {} bytes", length.len())));
        }
        match seals(&file) {
            Ok(seals) if seals & SEALS == SEALS && seals & WRITE_SEALS == 0 => {}
            Ok(seals) => return Err(foreign(format!("its seals are {seals:#x}"))),
            Err(error) => return Err(foreign(format!("it has no seals: {error}"))),
        }
        Self::map(file, size, &regions)
    }

    /// Maps the pages that exist already, so that nobody waits for a fault at each of them later;
    /// what is not done `until` then is left for those faults. Returns how many bytes were found.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn map_resident(&self, until: Instant) -> io::Result<u64> {
        let mut resident = 0;
        for region in self.regions.iter() {
            let start = region.mapping.as_ptr();
            for (offset, length) in pieces(region.ram.size as usize) {
                if Instant::now() >= until {
                    return Ok(resident);
                }
                let at = start.wrapping_add(offset);
                for run in resident_runs(at, length)? {
                    resident += run.len() as u64;
                    match advise(
                        at.wrapping_add(run.start),
                        run.len(),
                        libc::MADV_POPULATE_WRITE,
                    ) {
                        // A kernel before 5.14: the pages are mapped when they are touched.
                        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                        advised => advised?,
                    }
                }
                thread::yield_now();
            }
        }
        Ok(resident)
    }

    /// How many pages from `first` on, `most` at most, the host has in memory without a gap. One
    /// that is not among them may be swapped out, or was never written.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn resident_run(&self, first: PageIndex, most: u64) -> io::Result<u64> {
        let offset = first.0.saturating_mul(PAGE_SIZE);
        let mut regions = self.regions.iter();
        let Some((region, within)) = regions.find_map(|region| {
            let within = offset.checked_sub(region.ram.offset)?;
            (within < region.ram.size).then_some((region, within))
        }) else {
            return Ok(0);
        };
        let length = (region.ram.size - within).min(most.saturating_mul(PAGE_SIZE));
        let start = region.mapping.as_ptr().wrapping_add(within as usize);
        let runs = resident_runs(start, length as usize)?;
        let leading = runs.first().filter(|run| run.start == 0);
        Ok(leading.map_or(0, |run| run.len() as u64 / PAGE_SIZE))
    }

    /// Takes all pages out of this process's page tables. They stay in the file, and whoever
    /// touches one has it mapped again: what is left to do when the process ends is short.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn unmap_pages(&self) -> io::Result<()> {
        for region in self.regions.iter() {
            let start = region.mapping.as_ptr();
            for (offset, length) in pieces(region.ram.size as usize) {
                advise(start.wrapping_add(offset), length, libc::MADV_DONTNEED)?;
                thread::yield_now();
            }
        }
        Ok(())
    }

    fn map(file: File, size: u64, regions: &[RamRegion]) -> Result<Self, MemoryError> {
        let reserve = |source| MemoryError::Reserve { size, source };
        let file = Arc::new(file);
        let log = Arc::new(DirtyLog::new((size / PAGE_SIZE) as usize));
        let mut mapped = Vec::new();
        let mut mmaps = Vec::new();
        for region in regions {
            let _gap = AlignedGap::new(region.size as usize);
            let range = DirtyRange::new(Arc::clone(&log), region.offset);
            let mmap = MmapRegionBuilder::new_with_bitmap(region.size as usize, range)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&file), region.offset))
                .build()
                .map_err(|error| reserve(io::Error::other(error)))?;
            let mmap = Arc::new(mmap);
            mapped.push(MappedRegion {
                ram: *region,
                mapping: Arc::clone(&mmap),
            });
            let region = GuestRegionMmap::with_arc(mmap, GuestAddress(region.start))
                .ok_or_else(|| reserve(io::Error::other("region wraps the address space")))?;
            mmaps.push(region);
        }
        let mapping =
            Mapping::from_regions(mmaps).map_err(|error| reserve(io::Error::other(error)))?;
        Ok(Self {
            mapping,
            file,
            log,
            regions: mapped.into(),
            size,
        })
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        self.size / PAGE_SIZE
    }

    /// RAM as vm-memory sees it: use this for all access by devices and loaders.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The dirty log of this RAM.
    pub fn dirty_log(&self) -> &Arc<DirtyLog> {
        &self.log
    }

    /// The file that holds RAM, for handing it to another process.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The ranges of guest physical address space that are RAM, ascending.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.regions.iter().map(|region| region.ram)
    }

    /// The page that holds a guest physical address, if it is RAM.
    pub fn page_of(&self, address: u64) -> Option<PageIndex> {
        self.regions
            .iter()
            .find(|region| address.wrapping_sub(region.ram.start) < region.ram.size)
            .map(|region| PageIndex((region.ram.offset + (address - region.ram.start)) / PAGE_SIZE))
    }

    /// The guest physical address of a page, if the page exists.
    pub fn address_of(&self, page: PageIndex) -> Option<GuestAddress> {
        let offset = page.0.checked_mul(PAGE_SIZE)?;
        self.regions
            .iter()
            .find(|region| offset.wrapping_sub(region.ram.offset) < region.ram.size)
            .map(|region| GuestAddress(region.ram.start + (offset - region.ram.offset)))
    }

    /// Where the page is mapped in this process. The pointer is valid for [`PAGE_SIZE`] bytes
    /// and for as long as `self` or a clone lives; the guest may write it at any time, so only
    /// volatile, atomic or raw copies are sound, and a writer marks the page afterwards.
    pub fn host_page(&self, page: PageIndex) -> Option<NonNull<u8>> {
        let offset = page.0.checked_mul(PAGE_SIZE)?;
        let region = self
            .regions
            .iter()
            .find(|region| offset.wrapping_sub(region.ram.offset) < region.ram.size)?;
        let within = (offset - region.ram.offset) as usize;
        NonNull::new(region.mapping.as_ptr().wrapping_add(within))
    }

    /// Copies a page out. False when there is no such page.
    pub fn read_page(&self, page: PageIndex, into: &mut [u8; PAGE_SIZE as usize]) -> bool {
        let Some(from) = self.host_page(page) else {
            return false;
        };
        // SAFETY: `host_page` returned a mapping of a whole page, which `self` keeps alive.
        // The guest may write concurrently; a torn copy is allowed, since such a page is marked
        // dirty again and copied again.
        #[expect(unsafe_code, reason = "guest memory changes under the copy")]
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len());
        }
        true
    }

    /// A look at a few places of a page: are they zero? A page that is not zero may look so. True
    /// when there is no such page.
    pub fn looks_zero(&self, page: PageIndex) -> bool {
        let Some(from) = self.host_page(page) else {
            return true;
        };
        (0..PAGE_SIZE as usize)
            .step_by(PAGE_SIZE as usize / 8)
            .all(|offset| {
                // SAFETY: as in `read_page`; the offset is a multiple of eight within the page, which
                // is aligned to its own size.
                #[expect(unsafe_code, reason = "guest memory changes under the look")]
                unsafe {
                    from.as_ptr().add(offset).cast::<u64>().read_volatile() == 0
                }
            })
    }

    /// Writes a page and marks it. False when there is no such page.
    pub fn write_page(&self, page: PageIndex, from: &[u8; PAGE_SIZE as usize]) -> bool {
        let Some(to) = self.host_page(page) else {
            return false;
        };
        // SAFETY: as in `read_page`; the source is a Rust slice that guest RAM cannot overlap.
        #[expect(unsafe_code, reason = "guest memory changes under the copy")]
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.len());
        }
        self.log.mark(page);
        true
    }
}

/// Where RAM of `size` bytes sits in guest physical address space.
fn ram_regions(size: u64) -> Result<Vec<RamRegion>, MemoryError> {
    if !(1 << 20..=layout::MAX_RAM).contains(&size) || !size.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::Size { size });
    }
    let low = size.min(layout::LOW_RAM_END);
    let mut regions = vec![RamRegion {
        start: 0,
        size: low,
        offset: 0,
    }];
    if size > low {
        regions.push(RamRegion {
            start: layout::HIGH_RAM_START,
            size: size - low,
            offset: low,
        });
    }
    Ok(regions)
}

/// A gap in this process's address space that begins at a multiple of [`HUGE_PAGE_SIZE`], with
/// something on both sides: the next mapping of its size goes there, unless another thread maps
/// something meanwhile or a smaller gap fits as well. A mapping that goes elsewhere works, but may be
/// without huge pages.
struct AlignedGap {
    sides: [(*mut libc::c_void, usize); 2],
}

impl AlignedGap {
    /// None when there is no room.
    fn new(size: usize) -> Option<Self> {
        const HUGE: usize = HUGE_PAGE_SIZE as usize;
        let reserved = size.checked_add(HUGE)?;
        // SAFETY: a new mapping at an address that the kernel chooses affects no other.
        #[expect(unsafe_code, reason = "mmap has no safe wrapper in std")]
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(
                std::ptr::null_mut(),
                reserved,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return None;
        }
        let before = start.addr().next_multiple_of(HUGE) - start.addr();
        let gap = start.wrapping_byte_add(before);
        let after = gap.wrapping_byte_add(size);
        unmap(gap, size);
        Some(Self {
            sides: [(start, before), (after, HUGE - before)],
        })
    }
}

impl Drop for AlignedGap {
    fn drop(&mut self) {
        for (start, length) in self.sides {
            unmap(start, length);
        }
    }
}

/// Gives back a part of what [`AlignedGap::new`] reserved.
fn unmap(start: *mut libc::c_void, length: usize) {
    if length == 0 {
        return;
    }
    // SAFETY: the range is reserved and nobody was given its address.
    #[expect(unsafe_code, reason = "munmap has no safe wrapper in std")]
    unsafe {
        libc::munmap(start, length);
    }
}

fn memory_file(size: u64) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated constant; the descriptor that comes back is ours.
    #[expect(unsafe_code, reason = "memfd_create has no safe wrapper in std")]
    let file = unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        let fd = libc::memfd_create(c"dunlin-guest-ram".as_ptr(), flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(size)?;
    // SAFETY: the call takes an open descriptor and integers.
    #[expect(unsafe_code, reason = "seals have no safe wrapper in std")]
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) };
    if sealed < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// RAM keeps its size for ever: a process that maps it is not killed by another that has it.
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
/// Seals that RAM cannot have.
const WRITE_SEALS: libc::c_int = libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE;

fn seals(file: &File) -> io::Result<libc::c_int> {
    // SAFETY: the call takes an open descriptor and an integer.
    #[expect(unsafe_code, reason = "seals have no safe wrapper in std")]
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(seals)
}

/// Pieces of a mapping, offset and length, each of which takes the kernel a fraction of a
/// millisecond: who works on memory piece by piece and yields between them holds no lock for long,
/// and leaves the processor to those who want it, a guest above all.
fn pieces(size: usize) -> impl Iterator<Item = (usize, usize)> {
    const PIECE: usize = 1 << 20;
    (0..size)
        .step_by(PIECE)
        .map(move |offset| (offset, PIECE.min(size - offset)))
}

/// The ranges of bytes, from `start`, whose pages the file has in memory. (`SEEK_HOLE` would tell
/// the same, but of a full file only after it looked at all of it.)
fn resident_runs(start: *mut u8, length: usize) -> io::Result<Vec<Range<usize>>> {
    const PAGE: usize = PAGE_SIZE as usize;
    let mut pages = vec![0u8; length.div_ceil(PAGE)];
    // SAFETY: the vector has a byte for each page of the range, which lies in a mapping that the
    // caller keeps alive.
    #[expect(unsafe_code, reason = "mincore has no safe wrapper in std")]
    let result = unsafe { libc::mincore(start.cast(), length, pages.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut at = 0;
    let mut runs = Vec::new();
    for run in pages.chunk_by(|a, b| a & 1 == b & 1) {
        let end = at + run.len() * PAGE;
        if run[0] & 1 == 1 {
            runs.push(at..end.min(length));
        }
        at = end;
    }
    Ok(runs)
}

/// Advises the kernel about page tables of part of a shared mapping.
fn advise(start: *mut u8, length: usize, advice: libc::c_int) -> io::Result<()> {
    loop {
        // SAFETY: the range lies in a shared mapping of a file that the caller keeps alive; the
        // advices that are given change page tables and no byte of it.
        #[expect(unsafe_code, reason = "madvise has no safe wrapper in std")]
        let result = unsafe { libc::madvise(start.cast(), length, advice) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use vm_memory::Bytes;

    #[test]
    fn ram_above_three_gib_continues_above_four() {
        let memory = Memory::new(5 << 30).unwrap();
        let regions: Vec<_> = memory.regions().collect();
        assert_eq!(regions.len(), 2);
        assert_eq!(regions[1].start, 4 << 30);
        assert_eq!(regions[1].size, 2 << 30);
        assert_eq!(memory.page_of(0xd000_0000), None);
        let page = memory.page_of(4 << 30).unwrap();
        assert_eq!(page, PageIndex((3 << 30) / PAGE_SIZE));
        assert_eq!(memory.address_of(page), Some(GuestAddress(4 << 30)));
        assert_eq!(memory.address_of(PageIndex(memory.pages())), None);
    }

    #[test]
    fn ram_can_have_huge_pages() {
        // A fragment of a huge page in front, as other mappings leave it.
        let odd = Memory::new((1 << 20) + 4096).unwrap();
        for size in [4 << 20, (5 << 30) + 4096] {
            let memory = Memory::new(size).unwrap();
            for region in memory.regions() {
                let start = memory.host_page(PageIndex(region.offset / PAGE_SIZE));
                let start = start.unwrap().addr().get() as u64;
                assert!(start.is_multiple_of(HUGE_PAGE_SIZE), "{start:#x}");
            }
        }
        drop(odd);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        for size in [0, 1, 4096, (1 << 20) + 1, u64::MAX, !4095] {
            assert!(
                matches!(Memory::new(size), Err(MemoryError::Size { .. })),
                "{size}"
            );
        }
    }

    #[test]
    fn a_write_through_vm_memory_marks_its_pages() {
        let memory = Memory::new(1 << 20).unwrap();
        memory
            .mapping()
            .write_slice(&[1, 2, 3], GuestAddress(0x2fff))
            .unwrap();
        assert!(memory.dirty_log().is_dirty(PageIndex(2)));
        assert!(memory.dirty_log().is_dirty(PageIndex(3)));
        assert_eq!(memory.dirty_log().count(), 2);
    }

    #[test]
    fn a_page_that_is_not_zero_at_one_of_the_places_does_not_look_so() {
        let memory = Memory::new(1 << 20).unwrap();
        assert!(memory.looks_zero(PageIndex(3)));
        let mut page = [0u8; 4096];
        page[7 * 512] = 1;
        memory.write_page(PageIndex(3), &page);
        assert!(!memory.looks_zero(PageIndex(3)));
        assert!(memory.looks_zero(PageIndex(4)));
        assert!(memory.looks_zero(PageIndex(256)));
    }

    #[test]
    fn a_page_survives_the_round_trip() {
        let memory = Memory::new(1 << 20).unwrap();
        let mut page = [0u8; 4096];
        page[17] = 9;
        assert!(memory.write_page(PageIndex(5), &page));
        let mut back = [1u8; 4096];
        assert!(memory.read_page(PageIndex(5), &mut back));
        assert_eq!(page, back);
        assert!(!memory.read_page(PageIndex(256), &mut back));
    }

    #[test]
    fn two_mappings_of_one_ram_see_the_same_bytes() {
        let first = Memory::new(4 << 20).unwrap();
        let mut page = [0u8; 4096];
        page[5] = 7;
        first.write_page(PageIndex(3), &page);
        first.write_page(PageIndex(1000), &page);
        let second = Memory::from_file(first.file().try_clone().unwrap(), 4 << 20).unwrap();
        let soon = Instant::now() + Duration::from_secs(60);
        assert_eq!(second.map_resident(soon).unwrap(), 2 * PAGE_SIZE);
        assert_eq!(second.map_resident(Instant::now()).unwrap(), 0);
        let run = |page, most| second.resident_run(PageIndex(page), most).unwrap();
        assert_eq!(
            [run(3, 100), run(4, 100), run(999, 5), run(1000, 1)],
            [1, 0, 0, 1]
        );
        assert_eq!(run(u64::MAX, 100), 0);
        second.unmap_pages().unwrap();
        let mut back = [0u8; 4096];
        second.read_page(PageIndex(1000), &mut back);
        assert_eq!(back, page);
        page[5] = 8;
        second.write_page(PageIndex(3), &page);
        first.read_page(PageIndex(3), &mut back);
        assert_eq!(back, page);
        assert!(!first.dirty_log().is_dirty(PageIndex(5)));
        assert_eq!(second.dirty_log().count(), 1);
    }

    #[test]
    fn a_file_that_is_no_ram_of_that_size_is_refused() {
        let memory = Memory::new(4 << 20).unwrap();
        let other_size = Memory::from_file(memory.file().try_clone().unwrap(), 8 << 20);
        assert!(matches!(other_size, Err(MemoryError::Foreign { .. })));
        assert!(
            memory.file().set_len(1 << 20).is_err(),
            "its size is sealed"
        );
        let ordinary = tempfile::tempfile().unwrap();
        ordinary.set_len(4 << 20).unwrap();
        let unsealed = Memory::from_file(ordinary, 4 << 20);
        assert!(matches!(unsealed, Err(MemoryError::Foreign { .. })));
    }
}
