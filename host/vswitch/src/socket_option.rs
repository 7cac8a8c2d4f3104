//! Socket options that the standard library does not offer.
#![expect(unsafe_code, reason = "setsockopt takes raw values")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes asked for as a socket's send and receive buffer; the host may give less.
const BUFFER: libc::c_int = 4 << 20;

fn set<T: Copy>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: T,
) -> io::Result<()> {
    // SAFETY: the value lives for the call and its size is given; the callers below pass the
    // type that their option wants.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Asks for large buffers, so that bursts wait rather than get lost.
pub(crate) fn enlarge_buffers(fd: BorrowedFd<'_>) -> io::Result<()> {
    set(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, BUFFER)?;
    set(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, BUFFER)
}

/// Lets the host cut datagrams that are longer than the path's MTU: a frame and its
/// encapsulation need more than the 1500 bytes of an ordinary link.
pub(crate) fn allow_fragments(fd: BorrowedFd<'_>, is_ipv4: bool) -> io::Result<()> {
    if is_ipv4 {
        set(
            fd,
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DONT,
        )
    } else {
        set(
            fd,
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DONT,
        )
    }
}

/// Makes closing a TCP connection reset it.
pub(crate) fn reset_on_close(fd: BorrowedFd<'_>) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    set(fd, libc::SOL_SOCKET, libc::SO_LINGER, linger)
}
