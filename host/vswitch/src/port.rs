//! The contract between a network device and the switch.

use std::fmt;
use std::os::fd::BorrowedFd;

/// Largest Ethernet frame that a port carries without its frame check sequence: 1500 bytes of
/// payload, 14 of header, 4 of VLAN tag. Longer frames are dropped and counted.
pub const MAX_FRAME: usize = 1518;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One Ethernet frame without its frame check sequence. Checksums are complete in both
/// directions: offload metadata joins here when a port offers offloads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frame {
    /// Destination, source, type or tag, payload.
    pub bytes: Vec<u8>,
}

/// Why a port failed. A frame that cannot be carried is dropped and counted, not an error.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The other end cannot be reached; the device goes on and frames are dropped meanwhile.
    #[error("failed to {action} port \"{port}\"")]
    Io {
        /// Connect, send or receive.
        action: &'static str,
        /// Name of the port: its socket path or interface.
        port: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

/// A device's end of a switch port. Never blocks.
pub trait Port: fmt::Debug + Send {
    /// Sends a batch; returns how many frames from the front were taken (dropped ones included).
    /// Fewer than given means that the port is full: try again later.
    ///
    /// # Errors
    /// [`PortError`] when the other end is gone.
    fn send(&mut self, frames: &[Frame]) -> Result<usize, PortError>;

    /// Receives up to `limit` frames into `into`; returns how many, 0 when none waits.
    ///
    /// # Errors
    /// [`PortError`] when the other end is gone.
    fn receive(&mut self, into: &mut Vec<Frame>, limit: usize) -> Result<usize, PortError>;

    /// Readable when `receive` has something to return.
    fn readiness(&self) -> BorrowedFd<'_>;

    /// Tells the switch that `mac` is reachable here from now on (after a move): RARP broadcast.
    ///
    /// # Errors
    /// [`PortError`] when the other end is gone.
    fn announce(&mut self, mac: MacAddress) -> Result<(), PortError>;
}
