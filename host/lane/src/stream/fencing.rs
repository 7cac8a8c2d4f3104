//! Knowing that a peer does not run.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
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

    /// The process that has this identity, if it runs where this one does: under the same kernel,
    /// in the same namespace of process ids.
    pub fn identified(identity: &ProcessIdentity) -> Option<Self> {
        let here = ProcessIdentity::of("self")?;
        if (&here.boot, here.namespace) != (&identity.boot, identity.namespace) {
            return None;
        }
        // Held first: what is looked at then is what is held, or it has ended.
        let process = Self::open(identity.pid).ok()?;
        let found = ProcessIdentity::of(&identity.pid.to_string())?;
        (found == *identity).then_some(process)
    }
}

/// Names a process among all that run on any host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessIdentity {
    /// The kernel's run: its `boot_id`.
    pub boot: String,
    /// The inode of its namespace of process ids.
    pub namespace: u64,
    /// Its id in there.
    pub pid: u32,
    /// When it began, in clock ticks since the kernel did.
    pub started: u64,
}

impl ProcessIdentity {
    /// This process; `None` where `/proc` does not tell.
    pub fn own() -> Option<Self> {
        Self::of("self")
    }

    /// As proc(5) tells of a process.
    fn of(process: &str) -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let namespace = fs::metadata(format!("/proc/{process}/ns/pid")).ok()?.ino();
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        let pid = stat.split(' ').next()?.parse().ok()?;
        // The name in parentheses may hold anything; the start is the 20th field behind it.
        let started = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
        Some(Self {
            boot: boot.trim().to_owned(),
            namespace,
            pid,
            started: started.parse().ok()?,
        })
    }
}

impl Fencing for PeerProcess {
    fn peer_is_dead(&self) -> Option<bool> {
        socket::wait(self.pidfd.as_raw_fd(), libc::POLLIN, Instant::now()).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_known_by_its_identity_until_it_dies() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let identity = ProcessIdentity::of(&child.id().to_string()).unwrap();
        let process = PeerProcess::identified(&identity).unwrap();
        assert_eq!(process.peer_is_dead(), Some(false));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(process.peer_is_dead(), Some(true));
        assert!(PeerProcess::identified(&identity).is_none());
    }

    #[test]
    fn what_is_no_process_of_this_host_is_not_watched() {
        let own = ProcessIdentity::own().unwrap();
        assert_eq!(own.pid, std::process::id());
        assert!(PeerProcess::identified(&own).is_some());
        let others = [
            ProcessIdentity {
                boot: "another".into(),
                ..own.clone()
            },
            ProcessIdentity {
                namespace: own.namespace + 1,
                ..own.clone()
            },
            ProcessIdentity {
                started: own.started + 1,
                ..own.clone()
            },
            ProcessIdentity { pid: 1, ..own },
        ];
        for other in others {
            assert!(PeerProcess::identified(&other).is_none(), "{other:?}");
        }
    }
}
