//! Memory for translated code: written through one mapping, run through another (W^X).

use std::io;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A memory file that is mapped twice.
#[derive(Debug)]
pub(crate) struct CodeMemory {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    used: usize,
}

// SAFETY: the mappings belong to this value alone, and any thread may use them.
#[expect(unsafe_code, reason = "the pointers are owned mappings")]
unsafe impl Send for CodeMemory {}

#[expect(unsafe_code, reason = "memory that is executed is mapped by hand")]
impl CodeMemory {
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        let file = memfd_create("dunlin-code", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, size as u64)?;
        let map = |protection| -> io::Result<NonNull<u8>> {
            // SAFETY: a new mapping at a place of the kernel's choice touches no other memory.
            let address = unsafe {
                mmap(
                    std::ptr::null_mut(),
                    size,
                    protection,
                    MapFlags::SHARED,
                    &file,
                    0,
                )
            }?;
            NonNull::new(address.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
        };
        let writable = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let executable = match map(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(executable) => executable,
            Err(error) => {
                // SAFETY: just mapped, and known to nobody else.
                let _unmapped = unsafe { munmap(writable.as_ptr().cast(), size) };
                return Err(error);
            }
        };
        Ok(Self {
            writable,
            executable,
            size,
            used: 0,
        })
    }

    /// Bytes that are left.
    pub(super) fn room(&self) -> usize {
        self.size - self.used
    }

    /// Bytes in use.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// The place that runs `offset`.
    pub(crate) fn address(&self, offset: usize) -> *const u8 {
        self.executable.as_ptr().wrapping_add(offset)
    }

    /// Appends code; says where it begins. `None` when there is no room for it.
    pub(crate) fn append(&mut self, code: &[u8]) -> Option<usize> {
        let start = self.used.next_multiple_of(16);
        let end = start
            .checked_add(code.len())
            .filter(|&end| end <= self.size)?;
        // SAFETY: the range lies within the mapping, which nobody reads as Rust memory; the
        // processor runs none of it yet.
        unsafe {
            std::ptr::copy_nonoverlapping(
                code.as_ptr(),
                self.writable.as_ptr().add(start),
                code.len(),
            );
        }
        self.used = end;
        Some(start)
    }

    /// Makes the jump whose distance is at `place` go to `target`. Only the thread that runs the code
    /// does so.
    pub(super) fn patch(&mut self, place: usize, target: usize) {
        let distance = (target as i64 - (place as i64 + 4)) as i32;
        debug_assert!(place + 4 <= self.used, "a place in code");
        // SAFETY: `place` is that of a distance within code that was appended.
        unsafe {
            self.writable
                .as_ptr()
                .add(place)
                .cast::<i32>()
                .write_unaligned(distance);
        }
    }

    /// Puts other bytes in the place of some that are there; false when they are not.
    #[cfg(test)]
    pub(super) fn spoil(&mut self, old: &[u8], new: &[u8]) -> bool {
        // SAFETY: so many bytes are in use, and none of them runs.
        let code = unsafe { std::slice::from_raw_parts_mut(self.writable.as_ptr(), self.used) };
        let at = code.windows(old.len()).position(|bytes| bytes == old);
        if let Some(at) = at {
            code[at..at + new.len()].copy_from_slice(new);
        }
        at.is_some()
    }

    /// Forgets all code.
    pub(super) fn clear(&mut self) {
        self.used = 0;
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        for mapping in [self.writable, self.executable] {
            // SAFETY: the mapping is this value's own, and nothing of it runs.
            #[expect(unsafe_code, reason = "rustix unmaps by address")]
            let _unmapped = unsafe { munmap(mapping.as_ptr().cast(), self.size) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_runs_and_what_is_patched_goes_elsewhere() {
        let mut memory = CodeMemory::new(1 << 16).unwrap();
        // mov eax, 1; ret
        let one = memory.append(&[0xb8, 1, 0, 0, 0, 0xc3]).unwrap();
        let two = memory.append(&[0xb8, 2, 0, 0, 0, 0xc3]).unwrap();
        let jump = memory.append(&[0xe9, 0, 0, 0, 0]).unwrap();
        for (target, expected) in [(one, 1), (two, 2)] {
            memory.patch(jump + 1, target);
            let address = memory.address(jump);
            // SAFETY: the code there is a function that takes nothing and returns a number.
            #[expect(unsafe_code, reason = "the test runs what it wrote")]
            let function =
                unsafe { std::mem::transmute::<*const u8, extern "sysv64" fn() -> u32>(address) };
            assert_eq!(function(), expected);
        }
        assert!(memory.append(&vec![0; 1 << 16]).is_none());
    }
}
