//! Duplex byte streams with deadlines, and the places where they begin.
//!
//! The protocol above asks for four things: bytes in, bytes out, each with a deadline, and an end.
//! TCP and unix sockets give them, and so does TLS over either ([`TlsTransport`]).

mod connect;
mod descriptors;
mod fencing;
mod listen;
mod raw;
mod socket;
mod tls;

use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::time::Instant;

pub use connect::{Connector, TcpConnector, UnixConnector};
pub use descriptors::{DescriptorTransport, MAX_DESCRIPTORS};
pub use fencing::{Fencing, PeerProcess, ProcessIdentity};
pub use listen::Listener;
pub use raw::RawSlice;
pub use socket::SocketTransport;
pub use tls::{IdentityError, TlsConnector, TlsFailure, TlsIdentity, TlsName, TlsTransport};

/// Bytes that a stream without a way of its own reads at once on their way to raw memory.
const BOUNCE: usize = 64 << 10;

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
    /// The two sides do not trust each other, or somebody meddles with the stream.
    #[error("no secure connection with {peer}")]
    Tls {
        /// The peer's address.
        peer: String,
        /// What is wrong.
        #[source]
        source: TlsFailure,
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

/// What a stream is to those who ask what it can be trusted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamTraits {
    /// For reports: `tcp`, `tls`, `unix`.
    pub name: &'static str,
    /// Does it keep others from reading and forging what it carries? Then it needs no checksums.
    pub confidential: bool,
}

/// A duplex byte stream.
pub trait Transport: Send {
    /// What kind of stream this is.
    fn traits(&self) -> StreamTraits;

    /// Reads at least one byte, waiting until `deadline`.
    ///
    /// # Errors
    /// [`TransportError::TimedOut`] when nothing came, [`TransportError::Closed`] at the end.
    fn read(
        &mut self,
        into: &mut [IoSliceMut<'_>],
        deadline: Instant,
    ) -> Result<usize, TransportError>;

    /// Reads at least one byte into memory that other threads may use at the same time.
    ///
    /// # Errors
    /// As [`Transport::read`].
    fn read_raw(&mut self, into: &[RawSlice], deadline: Instant) -> Result<usize, TransportError> {
        let wanted: usize = into.iter().map(RawSlice::len).sum();
        let mut bounce = vec![0; wanted.min(BOUNCE)];
        let count = self.read(&mut [IoSliceMut::new(&mut bounce)], deadline)?;
        let mut rest = &bounce[..count];
        for slice in into {
            rest = &rest[slice.copy_from(rest)..];
        }
        Ok(count)
    }

    /// Writes at least one byte, waiting until `deadline`. After a time-out the next call has to
    /// begin with the same bytes: some may have been taken on the way already.
    ///
    /// # Errors
    /// [`TransportError::TimedOut`] when nothing was taken, [`TransportError::Closed`] at the end.
    fn write(&mut self, from: &[IoSlice<'_>], deadline: Instant) -> Result<usize, TransportError>;

    /// As [`Transport::write`], of memory that other threads may write at the same time: each byte
    /// goes as it was at some moment of this call or of one that timed out before it.
    ///
    /// # Errors
    /// As [`Transport::write`].
    fn write_raw(&mut self, from: &[RawSlice], deadline: Instant) -> Result<usize, TransportError> {
        let offered: usize = from.iter().map(RawSlice::len).sum();
        let mut bounce = vec![0; offered.min(BOUNCE)];
        let mut filled = 0;
        for slice in from {
            filled += slice.copy_to(&mut bounce[filled..]);
        }
        self.write(&[IoSlice::new(&bounce)], deadline)
    }

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
