//! The contract between a network device and the switch.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Largest Ethernet frame that a port carries without its frame check sequence: 1500 bytes of
/// payload, 14 of header, 4 of VLAN tag. Longer frames are dropped and counted.
pub const MAX_FRAME: usize = 1518;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// All stations.
    pub const BROADCAST: MacAddress = MacAddress([0xff; 6]);

    /// True for broadcast and multicast addresses: they are never a frame's source.
    #[must_use]
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

/// A text that is not six pairs of hexadecimal digits joined by colons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failed to read \"{0}\" as an Ethernet address: six hexadecimal pairs joined by colons")]
pub struct MacAddressError(String);

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || MacAddressError(text.chars().take(40).collect());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().ok_or_else(wrong)?;
            if pair.len() != 2 || !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(pair, 16).ok().ok_or_else(wrong)?;
        }
        match pairs.next() {
            None => Ok(MacAddress(bytes)),
            Some(_) => Err(wrong()),
        }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacAddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

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

    /// Readable when `receive` has something to return, and when frames that `send` refused can
    /// be tried again. After each wake-up call `receive` (it also does the port's own upkeep and
    /// may return 0), then send what waits.
    fn readiness(&self) -> BorrowedFd<'_>;

    /// Tells the switch that `mac` is reachable here from now on (after a move): RARP broadcast.
    ///
    /// # Errors
    /// [`PortError`] when the other end is gone.
    fn announce(&mut self, mac: MacAddress) -> Result<(), PortError>;
}
