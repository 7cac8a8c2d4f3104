//! Where a destination is reached.

use std::fs::{self, Permissions};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{
    DescriptorTransport, SocketTransport, TlsIdentity, TlsTransport, Transport, TransportError,
    socket,
};

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    identity: Option<TlsIdentity>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        path: PathBuf,
        descriptors: bool,
    },
}

impl Listener {
    /// Listens for TCP connections. Port 0 chooses a free port; see [`Listener::tcp_address`].
    ///
    /// # Errors
    /// [`TransportError::Listen`] when the address cannot be had.
    pub fn tcp(address: SocketAddr) -> Result<Self, TransportError> {
        let failed = |source| TransportError::Listen {
            address: address.to_string(),
            source,
        };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            socket: Socket::Tcp(listener),
            identity: None,
        })
    }

    /// Listens on a unix socket at `path`, which must not exist; it is removed with the listener.
    ///
    /// # Errors
    /// [`TransportError::Listen`] when the path cannot be had.
    pub fn unix(path: &Path) -> Result<Self, TransportError> {
        let failed = |source| TransportError::Listen {
            address: path.display().to_string(),
            source,
        };
        let listener = UnixListener::bind(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            socket: Socket::Unix {
                listener,
                path: path.to_owned(),
                descriptors: false,
            },
            identity: None,
        })
    }

    /// Lets in only who has a certificate of the same authority. The handshake takes place when
    /// a connection is first read from or written to, not while it is accepted.
    #[must_use]
    pub fn with_tls(mut self, identity: TlsIdentity) -> Self {
        self.identity = Some(identity);
        self
    }

    /// As [`Listener::unix`], for connections that carry descriptors: nobody but this user can
    /// connect.
    ///
    /// # Errors
    /// [`TransportError::Listen`] when the path cannot be had.
    pub fn unix_with_descriptors(path: &Path) -> Result<Self, TransportError> {
        let mut this = Self::unix(path)?;
        let protected = fs::set_permissions(path, Permissions::from_mode(0o600));
        protected.map_err(|source| TransportError::Listen {
            address: path.display().to_string(),
            source,
        })?;
        if let Socket::Unix { descriptors, .. } = &mut this.socket {
            *descriptors = true;
        }
        Ok(this)
    }

    /// The TCP address listened on.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix { .. } => None,
        }
    }

    /// The next connection, waiting until `deadline`. `None`: there was none, or it broke off.
    ///
    /// # Errors
    /// [`TransportError::Listen`] when the socket itself fails.
    pub fn accept(&self, deadline: Instant) -> Result<Option<Box<dyn Transport>>, TransportError> {
        let failed = |source| TransportError::Listen {
            address: self.address(),
            source,
        };
        if !socket::wait(self.fd(), libc::POLLIN, deadline).map_err(failed)? {
            return Ok(None);
        }
        let accepted = match &self.socket {
            Socket::Tcp(listener) => listener.accept().map(|(stream, _)| Accepted::Tcp(stream)),
            Socket::Unix { listener, .. } => {
                listener.accept().map(|(stream, _)| Accepted::Unix(stream))
            }
        };
        match accepted {
            Ok(accepted) => Ok(self.welcome(accepted)),
            Err(error) if is_fatal(&error) => Err(failed(error)),
            Err(error) => {
                if is_shortage(&error) {
                    tracing::warn!(%error, "a connection waits to be accepted");
                    // It would be tried again at once, over and over.
                    std::thread::sleep(SHORTAGE);
                } else {
                    tracing::debug!(%error, "a connection broke off before it was accepted");
                }
                Ok(None)
            }
        }
    }

    /// Makes a transport of a connection, unless that has broken off already.
    fn welcome(&self, accepted: Accepted) -> Option<Box<dyn Transport>> {
        let transport = match (accepted, &self.socket) {
            (Accepted::Tcp(stream), _) => boxed(SocketTransport::tcp(stream)),
            (
                Accepted::Unix(stream),
                Socket::Unix {
                    path, descriptors, ..
                },
            ) => {
                let peer = path.display().to_string();
                if *descriptors {
                    boxed(DescriptorTransport::new(stream, peer))
                } else {
                    boxed(SocketTransport::unix(stream, peer))
                }
            }
            (Accepted::Unix(_), Socket::Tcp(_)) => return None,
        };
        let transport = match transport {
            Ok(transport) => transport,
            Err(error) => {
                tracing::debug!(%error, "a connection broke off when it was accepted");
                return None;
            }
        };
        let Some(identity) = &self.identity else {
            return Some(transport);
        };
        match TlsTransport::server(transport, identity) {
            Ok(transport) => Some(Box::new(transport)),
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be secured");
                None
            }
        }
    }

    fn address(&self) -> String {
        match &self.socket {
            Socket::Tcp(listener) => listener
                .local_addr()
                .map_or_else(|_| "a TCP socket".to_owned(), |address| address.to_string()),
            Socket::Unix { path, .. } => path.display().to_string(),
        }
    }

    fn fd(&self) -> RawFd {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_raw_fd(),
            Socket::Unix { listener, .. } => listener.as_raw_fd(),
        }
    }
}

/// A connection as the kernel gives it.
enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Pause when the host cannot take a connection that waits.
const SHORTAGE: Duration = Duration::from_millis(50);

/// Is the host short of what another connection takes?
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}

fn boxed(transport: io::Result<impl Transport + 'static>) -> io::Result<Box<dyn Transport>> {
    Ok(Box::new(transport?))
}

/// Is the listening socket itself of no use any more? All else concerns one connection only.
fn is_fatal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK)
    )
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix { path, .. } = &self.socket
            && let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(%error, path = %path.display(), "left a socket file behind");
        }
    }
}
