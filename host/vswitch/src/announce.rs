//! The frame that tells switches where a station now is.

use crate::{Frame, MacAddress};

/// Shortest frame on a wire, without its frame check sequence.
const MIN_FRAME: usize = 60;

/// A reverse ARP request (RFC 903) for `mac` from `mac`, to everybody: it carries no protocol
/// address, so it is right for any guest, and every switch on its way learns the new place.
#[must_use]
pub fn announcement(mac: MacAddress) -> Frame {
    const RARP: [u8; 2] = [0x80, 0x35];
    const REQUEST_REVERSE: [u8; 2] = [0, 3];
    let mut bytes = Vec::with_capacity(MIN_FRAME);
    bytes.extend(MacAddress::BROADCAST.0);
    bytes.extend(mac.0);
    bytes.extend(RARP);
    // Ethernet (1) and IPv4 (0x0800) addresses of six and four bytes.
    bytes.extend([0, 1, 0x08, 0x00, 6, 4]);
    bytes.extend(REQUEST_REVERSE);
    for _sender_then_target in 0..2 {
        bytes.extend(mac.0);
        bytes.extend([0; 4]);
    }
    bytes.resize(MIN_FRAME, 0);
    Frame { bytes }
}
