//! TCP and unix sockets as a [`Transport`].

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{RawSlice, StreamTraits, Transport, TransportError};

/// How long written bytes may stay unacknowledged before the kernel gives a TCP peer up.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(20);
/// Silence before the kernel probes a TCP peer, and between its probes, in seconds.
const TCP_KEEPALIVE_SECONDS: libc::c_int = 5;

/// What the kernel takes in one call.
const MAX_SLICES: usize = 1024;

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A connected socket, non-blocking underneath.
#[derive(Debug)]
pub struct SocketTransport {
    socket: Socket,
    peer: String,
}

impl SocketTransport {
    /// Takes a connected TCP socket: no delay, keep-alive, and a limit on unacknowledged data,
    /// so that a half-dead peer is noticed.
    ///
    /// # Errors
    /// What the kernel said to one of the options.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        let peer = stream.peer_addr()?.to_string();
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let fd = stream.as_raw_fd();
        let timeout = TCP_USER_TIMEOUT.as_millis() as libc::c_int;
        set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        set_option(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_KEEPIDLE,
            TCP_KEEPALIVE_SECONDS,
        )?;
        set_option(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_KEEPINTVL,
            TCP_KEEPALIVE_SECONDS,
        )?;
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, timeout)?;
        Ok(Self {
            socket: Socket::Tcp(stream),
            peer,
        })
    }

    /// Takes a connected unix stream socket. `peer` names it in messages.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn unix(stream: UnixStream, peer: impl Into<String>) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            socket: Socket::Unix(stream),
            peer: peer.into(),
        })
    }

    fn fd(&self) -> RawFd {
        match &self.socket {
            Socket::Tcp(stream) => stream.as_raw_fd(),
            Socket::Unix(stream) => stream.as_raw_fd(),
        }
    }

    /// Repeats `operation` until it moves bytes, waiting for `events` in between.
    fn move_bytes(
        &mut self,
        events: libc::c_short,
        deadline: Instant,
        mut operation: impl FnMut(&mut Socket) -> io::Result<usize>,
    ) -> Result<usize, TransportError> {
        loop {
            match operation(&mut self.socket) {
                Ok(0) => return Err(self.closed()),
                Ok(count) => return Ok(count),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        wait_or_time_out(self.fd(), events, deadline, &self.peer)?;
                    }
                    _ => return Err(failed(error, &self.peer)),
                },
            }
        }
    }

    fn closed(&self) -> TransportError {
        TransportError::Closed {
            peer: self.peer.clone(),
        }
    }
}

/// What an error of a stream means.
pub(super) fn failed(source: io::Error, peer: &str) -> TransportError {
    let peer = peer.to_owned();
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            TransportError::Closed { peer }
        }
        _ => TransportError::Io { peer, source },
    }
}

/// Waits until `fd` is ready for `events`; an error at the deadline.
pub(super) fn wait_or_time_out(
    fd: RawFd,
    events: libc::c_short,
    deadline: Instant,
    peer: &str,
) -> Result<(), TransportError> {
    match wait(fd, events, deadline) {
        Ok(true) => Ok(()),
        Ok(false) => Err(TransportError::TimedOut {
            peer: peer.to_owned(),
        }),
        Err(error) => Err(failed(error, peer)),
    }
}

impl Transport for SocketTransport {
    fn traits(&self) -> StreamTraits {
        let name = match &self.socket {
            Socket::Tcp(_) => "tcp",
            Socket::Unix(_) => "unix",
        };
        StreamTraits {
            name,
            confidential: false,
        }
    }

    fn read(
        &mut self,
        into: &mut [IoSliceMut<'_>],
        deadline: Instant,
    ) -> Result<usize, TransportError> {
        self.move_bytes(libc::POLLIN, deadline, |socket| match socket {
            Socket::Tcp(stream) => stream.read_vectored(into),
            Socket::Unix(stream) => stream.read_vectored(into),
        })
    }

    fn read_raw(&mut self, into: &[RawSlice], deadline: Instant) -> Result<usize, TransportError> {
        let fd = self.fd();
        self.move_bytes(libc::POLLIN, deadline, |_| read_raw(fd, into))
    }

    fn write(&mut self, from: &[IoSlice<'_>], deadline: Instant) -> Result<usize, TransportError> {
        self.move_bytes(libc::POLLOUT, deadline, |socket| match socket {
            Socket::Tcp(stream) => stream.write_vectored(from),
            Socket::Unix(stream) => stream.write_vectored(from),
        })
    }

    fn shutdown(&mut self, how: Shutdown) {
        // A peer that is gone already is no news here.
        let _ = match &self.socket {
            Socket::Tcp(stream) => stream.shutdown(how),
            Socket::Unix(stream) => stream.shutdown(how),
        };
    }

    fn peer(&self) -> &str {
        &self.peer
    }
}

fn read_raw(fd: RawFd, into: &[RawSlice]) -> io::Result<usize> {
    let count = into.len().min(MAX_SLICES) as libc::c_int;
    // SAFETY: raw slices are iovecs, `count` of them are there, and who made them vouched for the
    // memory that they name.
    #[expect(unsafe_code, reason = "std reads into Rust slices only")]
    let read = unsafe { libc::readv(fd, RawSlice::as_iovecs(into), count) };
    if read < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(read as usize)
}

/// Waits until `fd` is ready for `events`; false at the deadline.
pub(super) fn wait(fd: RawFd, events: libc::c_short, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        let time = libc::timespec {
            tv_sec: left.as_secs().min(3600) as libc::time_t,
            tv_nsec: libc::c_long::from(left.subsec_nanos() as i32),
        };
        // SAFETY: one pollfd and one timespec, both live across the call; no signal mask.
        #[expect(unsafe_code, reason = "poll has no safe wrapper in std")]
        let ready = unsafe { libc::ppoll(&raw mut poll, 1, &raw const time, std::ptr::null()) };
        match ready {
            0 if left.is_zero() || Instant::now() >= deadline => return Ok(false),
            0 => {}
            1.. => return Ok(true),
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn set_option(
    fd: RawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the option value is an int that lives across the call, and its size is given.
    #[expect(unsafe_code, reason = "std offers none of these options")]
    let result = unsafe {
        libc::setsockopt(
            fd,
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
