//! Guest memory whose missing pages are placed while the guest runs.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use dunlin_guest::{Memory, PAGE_SIZE, PageIndex};

use super::{UffdError, Userfaultfd, raw};
use crate::pages::PAGE;

/// RAM under userfaultfd: whoever touches a hole in it waits until the hole is filled.
#[derive(Debug, Clone)]
pub(crate) struct FaultingMemory {
    pub(super) uffd: Arc<Userfaultfd>,
    memory: Memory,
}

/// Pages that are contiguous in this process.
pub(super) struct Extent {
    pub(super) address: u64,
    pub(super) pages: u64,
}

impl FaultingMemory {
    pub(crate) fn new(uffd: Arc<Userfaultfd>, memory: Memory) -> Self {
        Self { uffd, memory }
    }

    pub(crate) fn uffd(&self) -> &Userfaultfd {
        &self.uffd
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// From now on who touches a hole waits.
    pub(crate) fn register(&self) -> Result<(), UffdError> {
        self.watch(raw::MODE_MISSING)
    }

    pub(super) fn watch(&self, mode: u64) -> Result<(), UffdError> {
        for extent in self.whole() {
            let mut argument = raw::Register {
                start: extent.address,
                len: extent.pages * PAGE_SIZE,
                mode,
                ioctls: 0,
            };
            if !raw::ioctl(self.uffd.fd(), raw::IOC_REGISTER, &mut argument) {
                return Err(UffdError::last("watch over guest memory"));
            }
        }
        Ok(())
    }

    /// Nobody waits any more: a hole is zero again, at once, for those who wait too.
    pub(crate) fn unregister(&self) -> Result<(), UffdError> {
        for extent in self.whole() {
            let mut argument = raw::Range {
                start: extent.address,
                len: extent.pages * PAGE_SIZE,
            };
            if !raw::ioctl(self.uffd.fd(), raw::IOC_UNREGISTER, &mut argument) {
                return Err(UffdError::last("let go of guest memory"));
            }
            // The kernel does so by itself for those who wait at a hole, not for writers. From
            // here on nobody begins to wait.
            self.wake(&extent);
        }
        Ok(())
    }

    /// All of RAM.
    fn whole(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents(PageIndex(0), self.memory.pages())
    }

    /// `count` pages from `first` on, as far as they exist.
    pub(super) fn extents(
        &self,
        first: PageIndex,
        count: u64,
    ) -> impl Iterator<Item = Extent> + '_ {
        let mut done = 0;
        std::iter::from_fn(move || {
            let extent = self.extent(PageIndex(first.0.checked_add(done)?), count - done);
            let extent = extent.filter(|extent| extent.pages > 0)?;
            done += extent.pages;
            Some(extent)
        })
    }

    /// The page at an address that a fault told.
    pub(crate) fn page_at(&self, address: usize) -> Option<PageIndex> {
        self.memory.regions().find_map(|region| {
            let first = region.offset / PAGE_SIZE;
            let start = self.memory.host_page(PageIndex(first))?.as_ptr() as usize;
            let within = address.checked_sub(start)? as u64;
            (within < region.size).then(|| PageIndex(first + within / PAGE_SIZE))
        })
    }

    /// Makes `count` pages from `first` holes.
    pub(crate) fn discard(&self, first: PageIndex, count: u64) -> Result<(), UffdError> {
        let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let end = first.0.saturating_add(count).min(self.memory.pages());
        let bytes = end.saturating_sub(first.0) * PAGE_SIZE;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: plain integers on a descriptor that `memory` holds. The guest does not run yet.
        #[expect(unsafe_code, reason = "fallocate has no safe wrapper in std")]
        let result = unsafe {
            libc::fallocate(
                self.memory.file().as_raw_fd(),
                flags,
                (first.0 * PAGE_SIZE) as libc::off_t,
                bytes as libc::off_t,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(UffdError::last("discard old pages"))
        }
    }

    /// Fills holes from `first` on with `bytes`, whole pages, and wakes who waits there. A page
    /// that is there already stays as it is. Returns how many were filled.
    pub(crate) fn place(&self, first: PageIndex, bytes: &[u8]) -> Result<u64, UffdError> {
        self.fill(first, (bytes.len() / PAGE) as u64, Some(bytes))
    }

    /// Fills holes with zeros, as [`FaultingMemory::place`] does with content.
    pub(crate) fn place_zeros(&self, first: PageIndex, count: u64) -> Result<u64, UffdError> {
        self.fill(first, count, None)
    }

    fn fill(&self, first: PageIndex, count: u64, bytes: Option<&[u8]>) -> Result<u64, UffdError> {
        let mut done = 0;
        let mut filled = 0;
        while done < count {
            let page = PageIndex(first.0.saturating_add(done));
            let Some(extent) = self.extent(page, count - done) else {
                break;
            };
            let from = bytes.map(|bytes| &bytes[done as usize * PAGE..]);
            match self.fill_extent(&extent, from) {
                Filled::Pages(pages) => {
                    done += pages;
                    filled += pages;
                }
                Filled::Exists => {
                    let pages = 1;
                    let address = extent.address;
                    self.wake(&Extent { address, pages });
                    done += 1;
                }
                // The kernel is changing the mapping.
                Filled::Again => std::thread::yield_now(),
                Filled::Failed(source) => {
                    let action = "place a page";
                    return Err(UffdError::Operation { action, source });
                }
            }
        }
        Ok(filled)
    }

    fn fill_extent(&self, extent: &Extent, from: Option<&[u8]>) -> Filled {
        let len = extent.pages * PAGE_SIZE;
        let (ok, result) = match from {
            Some(bytes) => {
                let mut argument = raw::Copy {
                    dst: extent.address,
                    src: bytes.as_ptr() as u64,
                    len: len.min(bytes.len() as u64),
                    ..raw::Copy::default()
                };
                let ok = raw::ioctl(self.uffd.fd(), raw::IOC_COPY, &mut argument);
                (ok, argument.copy)
            }
            None => {
                let mut argument = raw::ZeroPage {
                    start: extent.address,
                    len,
                    ..raw::ZeroPage::default()
                };
                let ok = raw::ioctl(self.uffd.fd(), raw::IOC_ZEROPAGE, &mut argument);
                (ok, argument.zeropage)
            }
        };
        let error = io::Error::last_os_error();
        if ok || (result as i64) > 0 {
            return Filled::Pages(result / PAGE_SIZE);
        }
        match error.raw_os_error() {
            Some(libc::EEXIST) => Filled::Exists,
            Some(libc::EAGAIN) => Filled::Again,
            _ => Filled::Failed(error),
        }
    }

    /// Wakes who waits in an extent.
    fn wake(&self, extent: &Extent) {
        let mut argument = raw::Range {
            start: extent.address,
            len: extent.pages * PAGE_SIZE,
        };
        if !raw::ioctl(self.uffd.fd(), raw::IOC_WAKE, &mut argument) {
            let error = io::Error::last_os_error();
            tracing::warn!(%error, "a thread that waits for a page was not woken");
        }
    }

    /// The first stretch of `count` pages from `first` on that is contiguous in this process.
    fn extent(&self, first: PageIndex, count: u64) -> Option<Extent> {
        let address = self.memory.host_page(first)?.as_ptr() as u64;
        let offset = first.0 * PAGE_SIZE;
        let region = self
            .memory
            .regions()
            .find(|region| offset.wrapping_sub(region.offset) < region.size)?;
        let left = (region.offset + region.size - offset) / PAGE_SIZE;
        Some(Extent {
            address,
            pages: count.min(left),
        })
    }
}

enum Filled {
    Pages(u64),
    Exists,
    Again,
    Failed(io::Error),
}
