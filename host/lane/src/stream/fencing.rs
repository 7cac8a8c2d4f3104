//! Knowing that a peer does not run.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

use super::socket;

/// Tells whether the destination process is dead, where that can be known.
///
/// It is asked when the peer does not answer after `Commit` was written. A wrong `Some(true)`
/// lets a guest run twice, so an implementation says `None` unless it is certain.
pub trait Fencing: Send {
    /// `Some(true)`: surely dead, its guest does not run. `Some(false)`: surely alive.
    fn peer_is_dead(&self) -> Option<bool>;
}

/// A process on this machine, held by a descriptor, so that a reused process id fools nobody.
#[derive(Debug)]
pub struct PeerProcess {
    pidfd: OwnedFd,
}

impl PeerProcess {
    /// The process that has this id now.
    ///
    /// # Errors
    /// What the kernel said when there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes plain integers; the descriptor that comes back is ours.
        #[expect(unsafe_code, reason = "pidfd_open has no safe wrapper in std")]
        let pidfd = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd as i32)
        };
        Ok(Self { pidfd })
    }
}

impl Fencing for PeerProcess {
    fn peer_is_dead(&self) -> Option<bool> {
        socket::wait(self.pidfd.as_raw_fd(), libc::POLLIN, Instant::now()).ok()
    }
}
