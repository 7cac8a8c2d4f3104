//! Memory for translated code: written through one mapping, run through another (W^X).

use std::io;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::emit::Part;

/// What the processor looks up at once where it can.
const HUGE: usize = 2 << 20;
/// Code of a huge page from which on it gets one.
const WORTH: usize = 256 << 10;
/// `MADV_COLLAPSE` of Linux 6.1: a huge page, whatever the host's setting for shared memory is.
const COLLAPSE: libc::c_int = 25;

/// A memory file that is mapped twice. One half is for code that often runs, the other for that which
/// rarely does.
#[derive(Debug)]
pub(crate) struct CodeMemory {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    /// Where each part ends.
    ends: [usize; 2],
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
            let address = reserve(size)?;
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: the place was just reserved, and is known to nobody else.
            match unsafe { mmap(address, size, protection, flags, &file, 0) } {
                Ok(address) => {
                    NonNull::new(address.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
                }
                Err(error) => {
                    // SAFETY: what was reserved is known to nobody else.
                    let _unmapped = unsafe { munmap(address, size) };
                    Err(error.into())
                }
            }
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
            ends: [0, size / 2],
        })
    }

    /// Bytes that are left of the part that has the fewest.
    pub(super) fn room(&self) -> usize {
        (self.size / 2 - self.ends[0]).min(self.size - self.ends[1])
    }

    /// Bytes in use.
    pub(super) fn used(&self) -> usize {
        self.ends[0] + self.ends[1] - self.size / 2
    }

    /// Where code that is appended begins.
    pub(super) fn next(&self, part: Part) -> usize {
        self.ends[part as usize].next_multiple_of(16)
    }

    /// The place that runs `offset`.
    pub(crate) fn address(&self, offset: usize) -> *const u8 {
        self.executable.as_ptr().wrapping_add(offset)
    }

    /// Appends code; says where it begins. `None` when there is no room for it.
    pub(crate) fn append(&mut self, part: Part, code: &[u8]) -> Option<usize> {
        let start = self.next(part);
        let most = match part {
            Part::Often => self.size / 2,
            Part::Rarely => self.size,
        };
        let end = start.checked_add(code.len()).filter(|&end| end <= most)?;
        // SAFETY: the range lies within the mapping, which nobody reads as Rust memory; the
        // processor runs none of it yet.
        unsafe {
            std::ptr::copy_nonoverlapping(
                code.as_ptr(),
                self.writable.as_ptr().add(start),
                code.len(),
            );
        }
        self.ends[part as usize] = end;
        let worth = (start & !(HUGE - 1)) + WORTH;
        if (start..end).contains(&worth) {
            self.make_huge(worth & !(HUGE - 1));
        }
        Some(start)
    }

    /// Asks for a huge page. Where there is none, all stays as it is.
    fn make_huge(&self, start: usize) {
        if start + HUGE > self.size {
            return;
        }
        for mapping in [self.writable, self.executable] {
            // SAFETY: the range is whole pages of a mapping of this value's own. What it holds does not
            // change, and neither does what it is mapped for.
            let _kept =
                unsafe { libc::madvise(mapping.as_ptr().add(start).cast(), HUGE, COLLAPSE) };
        }
    }

    /// Makes the jump whose distance is at `place` go to `target`. Only the thread that runs the code
    /// does so.
    pub(super) fn patch(&mut self, place: usize, target: usize) {
        let distance = (target as i64 - (place as i64 + 4)) as i32;
        debug_assert!(
            place + 4 <= self.ends[0] || (self.size / 2..self.ends[1]).contains(&(place + 3)),
            "a place in code"
        );
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
        [(0, self.ends[0]), (self.size / 2, self.ends[1])]
            .into_iter()
            .any(|(start, end)| {
                let first = self.writable.as_ptr().wrapping_add(start);
                // SAFETY: so many bytes are in use, and none of them runs.
                let code = unsafe { std::slice::from_raw_parts_mut(first, end - start) };
                let at = code.windows(old.len()).position(|bytes| bytes == old);
                if let Some(at) = at {
                    code[at..at + new.len()].copy_from_slice(new);
                }
                at.is_some()
            })
    }

    /// Forgets all code.
    pub(super) fn clear(&mut self) {
        self.ends = [0, self.size / 2];
    }
}

/// Addresses for so many bytes, at the border of a huge page.
#[expect(unsafe_code, reason = "memory that is executed is mapped by hand")]
fn reserve(size: usize) -> io::Result<*mut std::ffi::c_void> {
    let nothing = ProtFlags::empty();
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at a place of the kernel's choice touches no other memory.
    let whole = unsafe { mmap_anonymous(std::ptr::null_mut(), size + HUGE, nothing, flags) }?;
    let before = whole.addr().next_multiple_of(HUGE) - whole.addr();
    let start = whole.wrapping_byte_add(before);
    let rest = [
        (whole, before),
        (start.wrapping_byte_add(size), HUGE - before),
    ];
    for (address, length) in rest {
        if length != 0 {
            // SAFETY: a part of what was just reserved, which nobody knows.
            let _unmapped = unsafe { munmap(address, length) };
        }
    }
    Ok(start)
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
        let mut append = |part, code: &[u8]| memory.append(part, code).unwrap();
        let one = append(Part::Often, &[0xb8, 1, 0, 0, 0, 0xc3]);
        let two = append(Part::Rarely, &[0xb8, 2, 0, 0, 0, 0xc3]);
        let jump = append(Part::Often, &[0xe9, 0, 0, 0, 0]);
        for (target, expected) in [(one, 1), (two, 2)] {
            memory.patch(jump + 1, target);
            let address = memory.address(jump);
            // SAFETY: the code there is a function that takes nothing and returns a number.
            #[expect(unsafe_code, reason = "the test runs what it wrote")]
            let function =
                unsafe { std::mem::transmute::<*const u8, extern "sysv64" fn() -> u32>(address) };
            assert_eq!(function(), expected);
        }
        for part in [Part::Often, Part::Rarely] {
            assert!(memory.append(part, &vec![0; 1 << 15]).is_none());
            assert!(memory.append(part, &vec![0; 1 << 14]).is_some());
        }
    }

    #[test]
    fn code_that_fills_a_huge_page_stays_what_it_is() {
        let mut memory = CodeMemory::new(4 * HUGE).unwrap();
        // mov eax, ...; ret
        let function = |value: u32| {
            let mut code = vec![0xb8];
            code.extend_from_slice(&value.to_le_bytes());
            code.push(0xc3);
            code
        };
        for value in 0..2 * HUGE as u32 / 16 {
            for part in [Part::Often, Part::Rarely] {
                let at = memory.append(part, &function(value)).unwrap();
                let address = memory.address(at);
                if value % 1000 != 0 {
                    continue;
                }
                // SAFETY: the code there is a function that takes nothing and returns a number.
                #[expect(unsafe_code, reason = "the test runs what it wrote")]
                let function = unsafe {
                    std::mem::transmute::<*const u8, extern "sysv64" fn() -> u32>(address)
                };
                assert_eq!(function(), value);
            }
        }
        assert!(memory.room() < 16, "both parts are full");
    }
}
