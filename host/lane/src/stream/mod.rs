//! Duplex byte streams with deadlines, and the places where they begin.
//!
//! The protocol above asks for four things: bytes in, bytes out, each with a deadline, and an end.
//! TCP and unix sockets give them; an encrypted stream will fit behind the same trait.

mod connect;
mod descriptors;
mod fencing;
mod listen;
mod socket;

use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::time::Instant;

pub use connect::{Connector, TcpConnector, UnixConnector};
pub use descriptors::{DescriptorTransport, MAX_DESCRIPTORS};
pub use fencing::{Fencing, PeerProcess};
pub use listen::Listener;
pub use socket::SocketTransport;

/// Why a transport did not carry on.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Nothing moved until the deadline.
    #[error("peer {peer} did not respond in time")]
    TimedOut {
        /// The peer's address.
        peer: String,
    },
    /// The peer closed the stream, or died.
    #[error("peer {peer} closed the connection")]
    Closed {
        /// The peer's address.
        peer: String,
    },
    /// The stream failed.
    #[error("connection to {peer} failed")]
    Io {
        /// The peer's address.
        peer: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No connection came about.
    #[error("failed to connect to {peer}")]
    Connect {
        /// The peer's address.
        peer: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("failed to listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// This side was told to stop.
    #[error("stopped while waiting for peer {peer}")]
    Stopped {
        /// The peer's address.
        peer: String,
    },
}

/// A duplex byte stream.
pub trait Transport: Send {
    /// Reads at least one byte, waiting until `deadline`.
    ///
    /// # Errors
    /// [`TransportError::TimedOut`] when nothing came, [`TransportError::Closed`] at the end.
    fn read(
        &mut self,
        into: &mut [IoSliceMut<'_>],
        deadline: Instant,
    ) -> Result<usize, TransportError>;

    /// Writes at least one byte, waiting until `deadline`.
    ///
    /// # Errors
    /// [`TransportError::TimedOut`] when nothing was taken, [`TransportError::Closed`] at the end.
    fn write(&mut self, from: &[IoSlice<'_>], deadline: Instant) -> Result<usize, TransportError>;

    /// Ends one direction or both; the peer sees the end after what was written.
    fn shutdown(&mut self, how: Shutdown);

    /// The peer's address, for messages.
    fn peer(&self) -> &str;

    /// Sends descriptors with the next byte that is written, where the stream can.
    ///
    /// # Errors
    /// [`TransportError::Io`] on all streams but a [`DescriptorTransport`], and there when they
    /// are too many.
    fn attach(&mut self, descriptors: Vec<OwnedFd>) -> Result<(), TransportError> {
        drop(descriptors);
        Err(TransportError::Io {
            peer: self.peer().to_owned(),
            source: io::ErrorKind::Unsupported.into(),
        })
    }

    /// The descriptors that came with what was read so far, in the order of their sending.
    fn detach(&mut self) -> Vec<OwnedFd> {
        Vec::new()
    }
}
