//! A raw copy over loopback TCP: the bound that a move's rate is held against. One side writes
//! memory that is
//! there, the other reads into a fresh memfd, whose pages come as they are written, as at a move's
//! destination.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::{Duration, Instant};

use anyhow::Context;

/// Bytes of a call.
const CHUNK: usize = 1 << 20;

/// Shared memory of its own.
pub(super) struct SharedMemory {
    address: *mut libc::c_void,
    size: usize,
    _file: File,
}

// SAFETY: the mapping belongs to this value alone, and is reached through its borrows only.
#[expect(unsafe_code, reason = "the pointer is an owned mapping")]
unsafe impl Send for SharedMemory {}

impl SharedMemory {
    /// Fresh memory, of which no page is there yet.
    pub(super) fn new(size: usize) -> anyhow::Result<Self> {
        // SAFETY: the name is a string that ends with zero.
        #[expect(unsafe_code, reason = "std makes no memfd")]
        let descriptor = unsafe { libc::memfd_create(c"raw-copy".as_ptr(), libc::MFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(std::io::Error::last_os_error()).context("failed to make a memfd");
        }
        // SAFETY: the descriptor was just made, and belongs to nobody else.
        #[expect(unsafe_code, reason = "the kernel gives a bare number")]
        let file = unsafe { File::from_raw_fd(descriptor) };
        file.set_len(size as u64)?;
        // SAFETY: a new mapping at a place of the kernel's choice touches no other memory.
        #[expect(unsafe_code, reason = "std maps no files")]
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).context("failed to map a memfd");
        }
        Ok(Self {
            address,
            size,
            _file: file,
        })
    }

    /// Memory full of random numbers (xorshift).
    pub(super) fn random(size: usize) -> anyhow::Result<Self> {
        let mut memory = Self::new(size)?;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for word in memory.bytes().chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        Ok(memory)
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is of this size, lives as long as this value, and the exclusive
        // borrow keeps others out; nobody else has the descriptor.
        #[expect(unsafe_code, reason = "a slice of a mapping")]
        unsafe {
            std::slice::from_raw_parts_mut(self.address.cast(), self.size)
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no borrow of it is left.
        #[expect(unsafe_code, reason = "std unmaps nothing")]
        unsafe {
            libc::munmap(self.address, self.size);
        }
    }
}

/// How the receiver's pages come to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pages {
    /// When they are written first.
    ByTouch,
    /// A thread has the kernel make them, a MiB at a time, as a move's destination does.
    Ahead,
}

/// Pages that are to be made, by another thread than the one that writes them.
struct Ahead {
    start: usize,
    size: usize,
}

impl Ahead {
    fn make(&self) {
        for offset in (0..self.size).step_by(CHUNK) {
            let length = CHUNK.min(self.size - offset);
            // SAFETY: the range is mapped until the thread that runs this has been joined, and
            // pages that are there are left as they are.
            #[expect(unsafe_code, reason = "std has no madvise")]
            let result = unsafe {
                libc::madvise(
                    std::ptr::with_exposed_provenance_mut(self.start + offset),
                    length,
                    libc::MADV_POPULATE_WRITE,
                )
            };
            if result != 0 {
                return;
            }
        }
    }
}

/// Copies all of `source` over loopback; returns how long it took until the receiver had all.
pub(super) fn copy(source: &mut SharedMemory, pages: Pages) -> anyhow::Result<Duration> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?;
    let size = source.size;
    let receiver = std::thread::spawn(move || -> anyhow::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut memory = SharedMemory::new(size)?;
        let ahead = Ahead {
            start: memory.address.expose_provenance(),
            size,
        };
        std::thread::scope(|scope| {
            if pages == Pages::Ahead {
                scope.spawn(|| ahead.make());
            }
            for chunk in memory.bytes().chunks_mut(CHUNK) {
                stream.read_exact(chunk)?;
            }
            stream.write_all(&[1])
        })?;
        // The sender has stopped its clock before this memory is given back.
        Ok(stream.read_exact(&mut [0])?)
    });
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let start = Instant::now();
    for chunk in source.bytes().chunks(CHUNK) {
        stream.write_all(chunk)?;
    }
    stream.read_exact(&mut [0])?;
    let took = start.elapsed();
    stream.write_all(&[1])?;
    let received = receiver.join();
    received.map_err(|_panic| anyhow::anyhow!("the receiver of the raw copy failed"))??;
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_copied_and_no_two_words_of_it_are_alike() {
        let mut source = SharedMemory::random(4 << 20).unwrap();
        for pages in [Pages::ByTouch, Pages::Ahead] {
            assert!(copy(&mut source, pages).unwrap() > Duration::ZERO);
        }
        let words: std::collections::BTreeSet<_> = source.bytes().chunks(8).collect();
        assert_eq!(words.len(), (4 << 20) / 8);
    }
}
