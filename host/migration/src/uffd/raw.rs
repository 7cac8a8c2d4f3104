//! The kernel's interface as `linux/userfaultfd.h` lays it out.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use super::Ready;

/// `UFFD_API`.
pub(super) const API: u64 = 0xaa;
/// `UFFD_FEATURE_MISSING_SHMEM`.
pub(super) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP` and `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`.
pub(super) const FEATURES_WRITE_PROTECTION: u64 = 1 << 0 | 1 << 12;
/// `UFFDIO_REGISTER_MODE_MISSING`.
pub(super) const MODE_MISSING: u64 = 1;
/// `UFFDIO_REGISTER_MODE_WP`.
pub(super) const MODE_WRITES: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`.
pub(super) const PROTECT: u64 = 1;

pub(super) const IOC_NEW: u64 = 0xaa00;
pub(super) const IOC_API: u64 = 0xc018_aa3f;
pub(super) const IOC_REGISTER: u64 = 0xc020_aa00;
pub(super) const IOC_UNREGISTER: u64 = 0x8010_aa01;
pub(super) const IOC_WAKE: u64 = 0x8010_aa02;
pub(super) const IOC_COPY: u64 = 0xc028_aa03;
pub(super) const IOC_ZEROPAGE: u64 = 0xc020_aa04;
pub(super) const IOC_WRITEPROTECT: u64 = 0xc018_aa06;

/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// Events in one read.
const EVENTS: usize = 32;

/// What an ioctl of this module takes: a structure of `u64`s that the kernel reads and writes.
///
/// # Safety
/// The type is `repr(C)`, of the size that the request number says, valid for every bit pattern.
#[expect(unsafe_code, reason = "the kernel writes into what implements this")]
pub(super) unsafe trait Argument {}

macro_rules! arguments {
    ($($(#[$doc:meta])* $name:ident { $($field:ident),* $(,)? })*) => { $(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default)]
        pub(super) struct $name { $(pub(super) $field: u64),* }

        // SAFETY: `repr(C)`, integers only, laid out as the kernel's structure of that name.
        #[expect(unsafe_code, reason = "plain integers")]
        unsafe impl Argument for $name {}
    )* };
}

arguments! {
    /// `struct uffdio_api`.
    Api { api, features, ioctls }
    /// `struct uffdio_range`.
    Range { start, len }
    /// `struct uffdio_register`.
    Register { start, len, mode, ioctls }
    /// `struct uffdio_writeprotect`.
    WriteProtect { start, len, mode }
    /// `struct uffdio_copy`; `copy` is what was done, or a negative error.
    Copy { dst, src, len, mode, copy }
    /// `struct uffdio_zeropage`; `zeropage` as `copy` above.
    ZeroPage { start, len, mode, zeropage }
}

/// Asks the kernel; false when it refused, and `errno` says why.
pub(super) fn ioctl<T: Argument>(fd: RawFd, request: u64, argument: &mut T) -> bool {
    // SAFETY: the argument lives across the call and is what the request takes. The memory that it
    // names by address is vouched for by the caller in `memory`, which takes it from mappings and
    // slices that it holds.
    #[expect(unsafe_code, reason = "ioctl has no safe wrapper in std")]
    unsafe {
        libc::ioctl(fd, request as _, std::ptr::from_mut(argument)) == 0
    }
}

/// Waits for either descriptor, a fault on the first or anything on the second.
pub(super) fn poll_two(first: RawFd, second: RawFd, patience: Duration) -> io::Result<Ready> {
    let mut polls = [first, second].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    let wait = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: two pollfds that live across the call.
    #[expect(unsafe_code, reason = "poll has no safe wrapper in std")]
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), 2, wait) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        return Ok(Ready {
            fault: false,
            other: false,
        });
    }
    if polls[0].revents & (libc::POLLERR | libc::POLLNVAL) != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    Ok(Ready {
        fault: polls[0].revents & libc::POLLIN != 0,
        other: polls[1].revents != 0,
    })
}

/// Reads pending faults without waiting.
pub(super) fn read_faults(fd: RawFd, into: &mut Vec<usize>) -> io::Result<()> {
    // `struct uffd_msg`: event in the first byte, a fault's address in the third word.
    let mut messages = [[0u64; 4]; EVENTS];
    // SAFETY: the buffer lives across the call, and its length is given.
    #[expect(unsafe_code, reason = "the descriptor is not a File")]
    let count = unsafe {
        libc::read(
            fd,
            messages.as_mut_ptr().cast(),
            std::mem::size_of_val(&messages),
        )
    };
    if count < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
            _ => Err(error),
        };
    }
    let whole = count as usize / std::mem::size_of::<[u64; 4]>();
    for message in &messages[..whole] {
        if message[0].to_ne_bytes()[0] == EVENT_PAGEFAULT {
            into.push(message[2] as usize);
        }
    }
    Ok(())
}
