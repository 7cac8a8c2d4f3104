//! Reaching the destination, again if need be.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use super::{
    DescriptorTransport, Fencing, PeerProcess, SocketTransport, Transport, TransportError,
};

/// Reaches one destination. The source connects once to move, and again to ask who owns the
/// guest when the first connection broke at the hand-over.
pub trait Connector: Fencing {
    /// A new connection.
    ///
    /// # Errors
    /// [`TransportError::Connect`] when none comes about before the deadline.
    fn connect(&mut self, deadline: Instant) -> Result<Box<dyn Transport>, TransportError>;

    /// The transport's name in reports: `tcp`, `unix`.
    fn transport(&self) -> &'static str;
}

/// Reaches a destination over TCP.
#[derive(Debug)]
pub struct TcpConnector {
    address: SocketAddr,
    process: Option<PeerProcess>,
    connected: bool,
    refused: bool,
}

impl TcpConnector {
    /// A destination that listens on `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            process: None,
            connected: false,
            refused: false,
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
    /// Without a process to watch, only a loopback address gives certainty: a destination keeps
    /// its listening socket until the hand-over is settled, and a loopback connection is refused
    /// by this very kernel, which then has no such socket any more.
    fn peer_is_dead(&self) -> Option<bool> {
        if let Some(process) = &self.process {
            return process.peer_is_dead();
        }
        (self.address.ip().is_loopback() && self.connected && self.refused).then_some(true)
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
        self.refused = matches!(&stream, Err(e) if e.kind() == io::ErrorKind::ConnectionRefused);
        self.connected |= stream.is_ok();
        let transport = stream.and_then(SocketTransport::tcp).map_err(failed)?;
        Ok(Box::new(transport))
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
    /// The kernel said at the first connection which process listens.
    fn peer_is_dead(&self) -> Option<bool> {
        self.process.as_ref()?.peer_is_dead()
    }
}

impl Connector for UnixConnector {
    fn connect(&mut self, _deadline: Instant) -> Result<Box<dyn Transport>, TransportError> {
        let name = self.path.display().to_string();
        let failed = |source| TransportError::Connect {
            peer: name.clone(),
            source,
        };
        let stream = UnixStream::connect(&self.path).map_err(failed)?;
        if self.process.is_none() {
            self.process = peer_pid(&stream).and_then(|pid| PeerProcess::open(pid).ok());
        }
        Ok(if self.descriptors {
            Box::new(DescriptorTransport::new(stream, name.clone()).map_err(failed)?)
        } else {
            Box::new(SocketTransport::unix(stream, name.clone()).map_err(failed)?)
        })
    }

    fn transport(&self) -> &'static str {
        "unix"
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
