//! Guest memory whose writers wait.

use dunlin_guest::{PAGE_SIZE, PageIndex};

use super::{FaultingMemory, UffdError, raw};

impl FaultingMemory {
    /// Gets ready for [`FaultingMemory::forbid_writes`]; nobody waits yet.
    pub(crate) fn register_writes(&self) -> Result<(), UffdError> {
        if !self.uffd.serves_writes() {
            return Err(UffdError::NoWrites);
        }
        self.watch(raw::MODE_WRITES)
    }

    /// From now on who writes one of `count` pages from `first` on waits until that is allowed
    /// again. Holes are pages, too.
    pub(crate) fn forbid_writes(&self, first: PageIndex, count: u64) -> Result<(), UffdError> {
        self.protect(first, count, raw::PROTECT)
    }

    /// Allows writes to `count` pages from `first` on, and wakes who waits there.
    pub(crate) fn allow_writes(&self, first: PageIndex, count: u64) -> Result<(), UffdError> {
        self.protect(first, count, 0)
    }

    fn protect(&self, first: PageIndex, count: u64, mode: u64) -> Result<(), UffdError> {
        for extent in self.extents(first, count) {
            let mut argument = raw::WriteProtect {
                start: extent.address,
                len: extent.pages * PAGE_SIZE,
                mode,
            };
            while !raw::ioctl(self.uffd.fd(), raw::IOC_WRITEPROTECT, &mut argument) {
                let error = UffdError::last("say who may write guest memory");
                let again = matches!(&error, UffdError::Operation { source, .. }
                    if source.raw_os_error() == Some(libc::EAGAIN));
                if !again {
                    return Err(error);
                }
                // The kernel is changing the mapping.
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}
