//! Reaching the destination, again if need be.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{
    DescriptorTransport, Fencing, PeerProcess, SocketTransport, Transport, TransportError,
};

/// Between two attempts at a listener whose queue is full.
const RETRY: Duration = Duration::from_millis(5);

/// Reaches one destination. The source connects once to move, and again to ask who owns the
/// guest when the first connection broke at the hand-over.
pub trait Connector: Fencing {
    /// A new connection.
    ///
    /// # Errors
    /// [`TransportError::Connect`] when none comes about before the deadline.
    fn connect(&mut self, deadline: Instant) -> Result<Box<dyn Transport>, TransportError>;

    /// The destination has said that it is this process of this host: its death can be known.
    /// Who answers at the address proves nothing: it may pass all on to another host.
    fn watch(&mut self, process: PeerProcess);

    /// The transport's name in reports: `tcp`, `unix`.
    fn transport(&self) -> &'static str;
}

/// Reaches a destination over TCP.
#[derive(Debug)]
pub struct TcpConnector {
    address: SocketAddr,
    process: Option<PeerProcess>,
}

impl TcpConnector {
    /// A destination that listens on `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            process: None,
        }
    }

    /// The destination is this process on this machine: its death can be known.
    #[must_use]
    pub fn with_process(mut self, process: PeerProcess) -> Self {
        self.process = Some(process);
        self
    }
}

impl Fencing for TcpConnector {
    /// Only a process that is watched gives certainty. A refused connection does not, not even on
    /// a loopback address: a tunnel may have listened there.
    fn peer_is_dead(&self) -> Option<bool> {
        self.process.as_ref()?.peer_is_dead()
    }
}

impl Connector for TcpConnector {
    fn connect(&mut self, deadline: Instant) -> Result<Box<dyn Transport>, TransportError> {
        let failed = |source| TransportError::Connect {
            peer: self.address.to_string(),
            source,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        let stream = TcpStream::connect_timeout(&self.address, left);
        let transport = stream.and_then(SocketTransport::tcp).map_err(failed)?;
        Ok(Box::new(transport))
    }

    fn watch(&mut self, process: PeerProcess) {
        self.process.get_or_insert(process);
    }

    fn transport(&self) -> &'static str {
        "tcp"
    }
}

/// Reaches a destination on this machine over a unix socket.
#[derive(Debug)]
pub struct UnixConnector {
    path: PathBuf,
    process: Option<PeerProcess>,
    descriptors: bool,
}

impl UnixConnector {
    /// A destination that listens on the socket at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            process: None,
            descriptors: false,
        }
    }

    /// Connections carry descriptors, and the peer has to run as the same user.
    #[must_use]
    pub fn with_descriptors(mut self) -> Self {
        self.descriptors = true;
        self
    }

    /// Watches this process instead of the one that listens on the socket.
    #[must_use]
    pub fn with_process(mut self, process: PeerProcess) -> Self {
        self.process = Some(process);
        self
    }
}

impl Fencing for UnixConnector {
    /// Where descriptors are carried the kernel said at the first connection which process
    /// listens, and nobody can stand in between.
    fn peer_is_dead(&self) -> Option<bool> {
        self.process.as_ref()?.peer_is_dead()
    }
}

impl Connector for UnixConnector {
    fn connect(&mut self, deadline: Instant) -> Result<Box<dyn Transport>, TransportError> {
        let name = self.path.display().to_string();
        let failed = |source| TransportError::Connect {
            peer: name.clone(),
            source,
        };
        let stream = connect_unix(&self.path, deadline).map_err(failed)?;
        if self.descriptors && self.process.is_none() {
            self.process = peer_pid(&stream).and_then(|pid| PeerProcess::open(pid).ok());
        }
        Ok(if self.descriptors {
            Box::new(DescriptorTransport::new(stream, name.clone()).map_err(failed)?)
        } else {
            Box::new(SocketTransport::unix(stream, name.clone()).map_err(failed)?)
        })
    }

    fn watch(&mut self, process: PeerProcess) {
        self.process.get_or_insert(process);
    }

    fn transport(&self) -> &'static str {
        "unix"
    }
}

/// Connects, and waits until the deadline for a listener whose queue is full.
fn connect_unix(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match net::connect(&socket, &address) {
            Ok(()) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(RETRY);
            }
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The process at the other end, when it can be seen from here.
fn peer_pid(stream: &UnixStream) -> Option<u32> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the buffer is a ucred, its size is given, both live across the call.
    #[expect(unsafe_code, reason = "SO_PEERCRED has no stable wrapper in std")]
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    (result == 0 && credentials.pid > 0).then_some(credentials.pid as u32)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::os::fd::AsFd;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(200)
    }

    #[test]
    fn a_loopback_address_that_refuses_proves_no_death() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut connector = TcpConnector::new(listener.local_addr().unwrap());
        drop(connector.connect(soon()).unwrap());
        drop(listener);
        assert!(connector.connect(soon()).is_err());
        assert_eq!(connector.peer_is_dead(), None);
    }

    #[test]
    fn a_listener_whose_queue_is_full_is_waited_for_until_the_deadline() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("door");
        let flags = SocketFlags::CLOEXEC;
        let listener =
            net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        net::bind(listener.as_fd(), &SocketAddrUnix::new(&path).unwrap()).unwrap();
        net::listen(&listener, 0).unwrap();
        let mut connector = UnixConnector::new(&path);
        let mut waiting = Vec::new();
        let error = loop {
            match connector.connect(soon()) {
                Ok(transport) => waiting.push(transport),
                Err(error) => break error,
            }
        };
        assert!(waiting.len() < 8, "{} wait", waiting.len());
        let TransportError::Connect { source, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(source.kind(), io::ErrorKind::TimedOut);
    }
}
