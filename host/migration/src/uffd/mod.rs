//! userfaultfd: a thread that touches a page of guest memory which has not arrived yet waits in the
//! kernel until the page is placed.
//!
//! Faults of the kernel on behalf of a device (`readv` into guest memory, KVM's own accesses) have
//! to wait as well, so a descriptor that serves faults of user mode alone is of no use here. The
//! kernel gives the full one to who may trace other processes, to everybody when
//! `vm.unprivileged_userfaultfd` is 1, and to who may open `/dev/userfaultfd`.
//! See `userfaultfd(2)` and `ioctl_userfaultfd(2)`.

mod memory;
mod raw;
mod writes;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

pub(crate) use memory::FaultingMemory;

/// Why pages cannot arrive behind a running guest.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Neither the system call nor the device gave a descriptor.
    #[error(
        "userfaultfd is not permitted: it takes root, vm.unprivileged_userfaultfd = 1, or the \
         right to open /dev/userfaultfd"
    )]
    NotPermitted {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel is too old for faults in shared memory.
    #[error("this kernel's userfaultfd does not serve shared memory")]
    NoSharedMemory,
    /// The kernel is too old to let writers of shared memory wait.
    #[error("this kernel's userfaultfd does not serve writes to shared memory: Linux 5.19 does")]
    NoWrites,
    /// An operation failed.
    #[error("userfaultfd failed to {action}")]
    Operation {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl UffdError {
    fn last(action: &'static str) -> Self {
        let source = io::Error::last_os_error();
        Self::Operation { action, source }
    }
}

/// What can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ready {
    /// A fault.
    pub(crate) fault: bool,
    /// The other descriptor, or its end.
    pub(crate) other: bool,
}

/// A descriptor through which this process serves faults of its own memory.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
    /// Writes to shared memory are served, too.
    write_protection: bool,
}

impl Userfaultfd {
    /// Opens one that serves faults of kernel and user mode. A process that is about to give up
    /// rights opens it before that.
    ///
    /// # Errors
    /// [`UffdError`] when the host does not permit it, or cannot.
    pub fn open() -> Result<Self, UffdError> {
        let fd = by_call().or_else(|_refused| by_device());
        let fd = fd.map_err(|source| UffdError::NotPermitted { source })?;
        // The kernel answers EINVAL to a feature that it does not have, and may be asked again.
        let agree = |features| {
            let mut api = raw::Api {
                api: raw::API,
                features,
                ioctls: 0,
            };
            raw::ioctl(fd.as_raw_fd(), raw::IOC_API, &mut api)
                && api.features & features == features
        };
        let write_protection = agree(raw::FEATURE_MISSING_SHMEM | raw::FEATURES_WRITE_PROTECTION);
        if !write_protection && !agree(raw::FEATURE_MISSING_SHMEM) {
            return Err(UffdError::NoSharedMemory);
        }
        Ok(Self {
            fd,
            write_protection,
        })
    }

    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Can it let writers of shared memory wait (Linux 5.19 and later)?
    pub fn serves_writes(&self) -> bool {
        self.write_protection
    }

    /// Waits until a fault is to be read, or `other` can be read, or `patience` is over. True for
    /// a fault.
    pub(crate) fn wait(&self, other: RawFd, patience: Duration) -> Result<bool, UffdError> {
        self.wait_either(other, patience).map(|ready| ready.fault)
    }

    /// As [`Userfaultfd::wait`]; says what there is of both.
    pub(crate) fn wait_either(&self, other: RawFd, patience: Duration) -> Result<Ready, UffdError> {
        raw::poll_two(self.fd(), other, patience).map_err(|source| UffdError::Operation {
            action: "wait for a fault",
            source,
        })
    }

    /// Addresses that threads wait at: those that the kernel has to tell now, at most as many
    /// as one read brings.
    pub(crate) fn read(&self, into: &mut Vec<usize>) -> Result<(), UffdError> {
        into.clear();
        raw::read_faults(self.fd(), into).map_err(|source| UffdError::Operation {
            action: "read a fault",
            source,
        })
    }
}

/// Waits until something can be read, or `patience` is over.
pub(crate) fn wait_readable(fd: RawFd, patience: Duration) -> Result<bool, UffdError> {
    let ready = raw::poll_two(fd, fd, patience);
    let ready = ready.map_err(|source| UffdError::Operation {
        action: "wait for the disk",
        source,
    })?;
    Ok(ready.fault)
}

fn by_call() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes plain integers; the descriptor that comes back is ours.
    #[expect(unsafe_code, reason = "userfaultfd has no wrapper in std")]
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

fn by_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the request takes a plain integer; the descriptor that comes back is ours.
    #[expect(unsafe_code, reason = "userfaultfd has no wrapper in std")]
    unsafe {
        let fd = libc::ioctl(device.as_raw_fd(), raw::IOC_NEW as _, flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

#[cfg(test)]
mod tests;
