//! Readiness: an epoll instance and a periodic timer, as owned descriptors.
#![expect(unsafe_code, reason = "epoll and timerfd are system calls")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// What a descriptor is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interest {
    Read,
    Write,
    Both,
    /// Only errors and hang-ups.
    Nothing,
}

impl Interest {
    /// From two wishes.
    pub(crate) fn of(read: bool, write: bool) -> Self {
        match (read, write) {
            (true, true) => Interest::Both,
            (true, false) => Interest::Read,
            (false, true) => Interest::Write,
            (false, false) => Interest::Nothing,
        }
    }

    fn events(self) -> u32 {
        let bits = match self {
            Interest::Read => libc::EPOLLIN,
            Interest::Write => libc::EPOLLOUT,
            Interest::Both => libc::EPOLLIN | libc::EPOLLOUT,
            Interest::Nothing => 0,
        };
        bits.cast_unsigned()
    }
}

/// One descriptor that became ready, by the token it was registered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) token: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// Error or hang-up: reading or writing tells which.
    pub(crate) broken: bool,
}

/// A level-triggered epoll instance.
#[derive(Debug)]
pub(crate) struct Poller {
    epoll: OwnedFd,
}

/// Turns -1 into the error that the thread's last system call left.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: takes no pointer.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the kernel has just returned this descriptor and nothing else owns it.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Poller { epoll })
    }

    fn control(
        &self,
        operation: libc::c_int,
        fd: RawFd,
        token: u64,
        interest: Interest,
    ) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: interest.events(),
            u64: token,
        };
        // SAFETY: `event` lives for the call; bad descriptors give an error, not undefined behaviour.
        check(unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, fd, &raw mut event) })?;
        Ok(())
    }

    /// Watches `fd` until it is removed or closed.
    pub(crate) fn add(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, token, interest)
    }

    pub(crate) fn modify(&self, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, token, interest)
    }

    pub(crate) fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, fd, 0, Interest::Nothing)
    }

    /// Waits until something is ready or `timeout` has passed (`None`: for ever), and replaces
    /// the contents of `ready`. An interrupted wait returns nothing.
    pub(crate) fn wait(&self, ready: &mut Vec<Ready>, timeout: Option<Duration>) -> io::Result<()> {
        const AT_ONCE: usize = 64;
        ready.clear();
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; AT_ONCE];
        // Rounded up: waking early for a timer would spin until it is due.
        let milliseconds = timeout.map_or(-1, |timeout| {
            libc::c_int::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(libc::c_int::MAX)
        });
        // SAFETY: the kernel writes at most AT_ONCE entries into `events`.
        let count = unsafe {
            libc::epoll_wait(
                self.epoll.as_raw_fd(),
                events.as_mut_ptr(),
                AT_ONCE as libc::c_int,
                milliseconds,
            )
        };
        let count = match check(count) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?.cast_unsigned() as usize,
        };
        ready.extend(events.iter().take(count).map(|event| {
            let bits = event.events.cast_signed();
            Ready {
                token: event.u64,
                readable: bits & libc::EPOLLIN != 0,
                writable: bits & libc::EPOLLOUT != 0,
                broken: bits & (libc::EPOLLERR | libc::EPOLLHUP) != 0,
            }
        }));
        Ok(())
    }
}

/// One owner's share of a poller: its tokens carry the owner's number in the upper half.
#[derive(Debug, Clone)]
pub(crate) struct Registrar {
    poller: Arc<Poller>,
    owner: u32,
}

impl Registrar {
    pub(crate) fn new(poller: &Arc<Poller>, owner: u32) -> Self {
        Registrar {
            poller: Arc::clone(poller),
            owner,
        }
    }

    /// Owner and number of a token.
    pub(crate) fn split(token: u64) -> (u32, u32) {
        ((token >> 32) as u32, token as u32)
    }

    fn token(&self, number: u32) -> u64 {
        u64::from(self.owner) << 32 | u64::from(number)
    }

    pub(crate) fn add(&self, fd: &impl AsRawFd, number: u32, interest: Interest) -> io::Result<()> {
        self.poller
            .add(fd.as_raw_fd(), self.token(number), interest)
    }

    /// Changes the interest in a descriptor that is registered; the host refuses nothing then.
    pub(crate) fn modify(&self, fd: &impl AsRawFd, number: u32, interest: Interest) {
        if let Err(error) = self
            .poller
            .modify(fd.as_raw_fd(), self.token(number), interest)
        {
            tracing::warn!(%error, "failed to change what a descriptor is watched for");
        }
    }

    pub(crate) fn remove(&self, fd: &impl AsRawFd) {
        if let Err(error) = self.poller.remove(fd.as_raw_fd()) {
            tracing::debug!(%error, "failed to stop watching a descriptor");
        }
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// A timer that fires over and over, as a readable descriptor.
#[derive(Debug)]
pub(crate) struct PeriodicTimer {
    timer: OwnedFd,
}

impl PeriodicTimer {
    pub(crate) fn new(period: Duration) -> io::Result<Self> {
        // SAFETY: takes no pointer.
        let fd = check(unsafe {
            libc::timerfd_create(
                libc::CLOCK_MONOTONIC,
                libc::TFD_CLOEXEC | libc::TFD_NONBLOCK,
            )
        })?;
        // SAFETY: the kernel has just returned this descriptor and nothing else owns it.
        let timer = unsafe { OwnedFd::from_raw_fd(fd) };
        let period = libc::timespec {
            tv_sec: libc::time_t::try_from(period.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(period.subsec_nanos()),
        };
        let setting = libc::itimerspec {
            it_interval: period,
            it_value: period,
        };
        // SAFETY: `setting` lives for the call; the old setting is not asked for.
        check(unsafe {
            libc::timerfd_settime(
                timer.as_raw_fd(),
                0,
                &raw const setting,
                std::ptr::null_mut(),
            )
        })?;
        Ok(PeriodicTimer { timer })
    }

    /// True when the timer has fired since the last call.
    pub(crate) fn take(&self) -> bool {
        let mut count = [0_u8; 8];
        // SAFETY: the kernel writes at most eight bytes into `count`.
        let read = unsafe {
            libc::read(
                self.timer.as_raw_fd(),
                count.as_mut_ptr().cast(),
                count.len(),
            )
        };
        read == 8
    }
}

impl AsRawFd for PeriodicTimer {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
