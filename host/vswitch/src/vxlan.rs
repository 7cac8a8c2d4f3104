//! VXLAN framing (RFC 7348, section 5): eight bytes before each Ethernet frame.
//!
//! ```text
//! | flags: I = 0x08 | reserved, 24 bits | network identifier, 24 bits | reserved, 8 bits |
//! ```

/// Bytes of the header.
pub(crate) const HEADER: usize = 8;

/// "The network identifier is valid."
const FLAG_IDENTIFIER: u8 = 0x08;

/// The header of frames of network `vni`; its upper eight bits do not count.
pub(crate) fn header(vni: u32) -> [u8; HEADER] {
    let [_, a, b, c] = vni.to_be_bytes();
    [FLAG_IDENTIFIER, 0, 0, 0, a, b, c, 0]
}

/// The frame in a packet of network `vni`; `None` when it is another network's, or none at all.
/// Reserved bits are ignored, as the RFC says.
pub(crate) fn frame(packet: &[u8], vni: u32) -> Option<&[u8]> {
    let (head, frame) = packet.split_at_checked(HEADER)?;
    let ours = head[0] & FLAG_IDENTIFIER != 0 && head[4..7] == header(vni)[4..7];
    ours.then_some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packets_of_the_own_network_hold_a_frame() {
        let packet = [&header(0x12_3456)[..], b"frame"].concat();
        assert_eq!(packet[..8], [8, 0, 0, 0, 0x12, 0x34, 0x56, 0]);
        assert_eq!(frame(&packet, 0x12_3456), Some(&b"frame"[..]));
        assert_eq!(frame(&packet, 0x12_3457), None);
        let mut reserved = packet.clone();
        (reserved[0], reserved[2], reserved[7]) = (0xff, 9, 9);
        assert_eq!(frame(&reserved, 0x12_3456), Some(&b"frame"[..]));
        let mut invalid = packet.clone();
        invalid[0] = 0xf7;
        assert_eq!(frame(&invalid, 0x12_3456), None);
        for length in 0..8 {
            assert_eq!(frame(&packet[..length], 0x12_3456), None);
        }
    }
}
