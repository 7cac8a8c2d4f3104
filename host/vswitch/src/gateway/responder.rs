//! What the gateway answers from one frame to the next: ARP and ICMP echo; and which of its own
//! parts another frame is for.

use std::net::Ipv4Addr;
use std::ops::Range;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv4Message, Icmpv4Packet, IpProtocol, Ipv4Packet, TcpPacket, UdpPacket,
};

use super::Identity;
use crate::MacAddress;

/// UDP ports of DHCP servers and clients (RFC 2131).
pub(super) const DHCP_SERVER: u16 = 67;
pub(super) const DHCP_CLIENT: u16 = 68;

const ETHERNET: usize = 14;

/// A frame for the gateway.
pub(super) enum Packet {
    Arp {
        sender: Ipv4Addr,
        station: MacAddress,
        /// Asks for the gateway's address.
        is_request: bool,
    },
    /// Where the ICMP message is in the frame.
    Echo(Range<usize>),
    /// The UDP payload of a message to the DHCP server.
    Dhcp(Vec<u8>),
    /// From this guest.
    Tcp(Ipv4Addr, Segment),
}

/// What the gateway itself needs to know of a TCP segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    /// The port on the gateway.
    pub(super) gateway_port: u16,
    /// It opens a connection rather than answer one that the gateway opens.
    pub(super) is_bare_syn: bool,
}

/// The sender's address of a frame that has been parsed before.
pub(super) fn source(frame: &[u8]) -> MacAddress {
    let mut address = [0; 6];
    address.copy_from_slice(&frame[6..12]);
    MacAddress(address)
}

impl Packet {
    /// `None` for everything that the gateway has no business with.
    pub(super) fn parse(frame: &[u8], identity: Identity) -> Option<Packet> {
        let ethernet = EthernetFrame::new_checked(frame).ok()?;
        let is_ours = ethernet.dst_addr().0 == identity.mac.0 || ethernet.dst_addr().is_broadcast();
        match ethernet.ethertype() {
            EthernetProtocol::Arp if is_ours => Self::parse_arp(ethernet.payload(), identity),
            EthernetProtocol::Ipv4 if is_ours => Self::parse_ipv4(ethernet.payload(), identity),
            _ => None,
        }
    }

    fn parse_arp(payload: &[u8], identity: Identity) -> Option<Packet> {
        let ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr: sender,
            target_protocol_addr,
            ..
        } = ArpRepr::parse(&ArpPacket::new_checked(payload).ok()?).ok()?
        else {
            return None;
        };
        let known = matches!(operation, ArpOperation::Request | ArpOperation::Reply);
        // A sender without address probes whether an address is taken (RFC 5227).
        let is_station = identity.is_station(sender) || sender.is_unspecified();
        if !known || !is_station || sender == identity.address || !source_hardware_addr.is_unicast()
        {
            return None;
        }
        let is_request =
            operation == ArpOperation::Request && target_protocol_addr == identity.address;
        Some(Packet::Arp {
            sender,
            station: MacAddress(source_hardware_addr.0),
            is_request,
        })
    }

    fn parse_ipv4(payload: &[u8], identity: Identity) -> Option<Packet> {
        let ip = Ipv4Packet::new_checked(payload).ok()?;
        if ip.version() != 4 || !ip.verify_checksum() || ip.more_frags() || ip.frag_offset() != 0 {
            return None;
        }
        let sender = ip.src_addr();
        let is_for_us = ip.dst_addr() == identity.address && identity.is_station(sender);
        match ip.next_header() {
            IpProtocol::Icmp if is_for_us => {
                let icmp = Icmpv4Packet::new_checked(ip.payload()).ok()?;
                let is_echo =
                    icmp.msg_type() == Icmpv4Message::EchoRequest && icmp.verify_checksum();
                let start = ETHERNET + usize::from(ip.header_len());
                is_echo.then(|| Packet::Echo(start..start + ip.payload().len()))
            }
            IpProtocol::Udp => {
                let udp = UdpPacket::new_checked(ip.payload()).ok()?;
                let is_dhcp = udp.dst_port() == DHCP_SERVER && udp.src_port() == DHCP_CLIENT;
                let to_us = ip.dst_addr() == identity.address || ip.dst_addr().is_broadcast();
                let intact = udp.verify_checksum(&sender.into(), &ip.dst_addr().into());
                (is_dhcp && to_us && intact).then(|| Packet::Dhcp(udp.payload().to_vec()))
            }
            IpProtocol::Tcp if is_for_us => {
                let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
                let is_bare_syn = tcp.syn() && !tcp.ack();
                Some(Packet::Tcp(
                    sender,
                    Segment {
                        gateway_port: tcp.dst_port(),
                        is_bare_syn,
                    },
                ))
            }
            _ => None,
        }
    }
}

/// A frame from the gateway with a zeroed payload of `length` bytes.
pub(super) fn ethernet_frame(
    from: MacAddress,
    to: MacAddress,
    ethertype: EthernetProtocol,
    length: usize,
) -> Vec<u8> {
    let mut bytes = vec![0; ETHERNET + length];
    let repr = EthernetRepr {
        src_addr: EthernetAddress(from.0),
        dst_addr: EthernetAddress(to.0),
        ethertype,
    };
    repr.emit(&mut EthernetFrame::new_unchecked(&mut bytes[..]));
    bytes
}

/// An ARP reply from one station to another.
pub(super) fn arp_frame(from: (MacAddress, Ipv4Addr), to: (MacAddress, Ipv4Addr)) -> Vec<u8> {
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(from.0.0),
        source_protocol_addr: from.1,
        target_hardware_addr: EthernetAddress(to.0.0),
        target_protocol_addr: to.1,
    };
    let mut bytes = ethernet_frame(from.0, to.0, EthernetProtocol::Arp, reply.buffer_len());
    reply.emit(&mut ArpPacket::new_unchecked(&mut bytes[ETHERNET..]));
    bytes
}

/// Tells a station the gateway's address.
pub(super) fn arp_reply(identity: Identity, station: MacAddress, sender: Ipv4Addr) -> Vec<u8> {
    arp_frame((identity.mac, identity.address), (station, sender))
}

/// The answer to an echo request whose ICMP message is at `message` in `frame`.
pub(super) fn echo_reply(identity: Identity, frame: &[u8], message: &Range<usize>) -> Vec<u8> {
    let sender = Ipv4Packet::new_unchecked(&frame[ETHERNET..]).src_addr();
    let request = &frame[message.clone()];
    let repr = smoltcp::wire::Ipv4Repr {
        src_addr: identity.address,
        dst_addr: sender,
        next_header: IpProtocol::Icmp,
        payload_len: request.len(),
        hop_limit: 64,
    };
    let length = repr.buffer_len() + request.len();
    let mut bytes = ethernet_frame(identity.mac, source(frame), EthernetProtocol::Ipv4, length);
    let mut ip = Ipv4Packet::new_unchecked(&mut bytes[ETHERNET..]);
    repr.emit(&mut ip, &ChecksumCapabilities::default());
    ip.payload_mut().copy_from_slice(request);
    let mut icmp = Icmpv4Packet::new_unchecked(ip.payload_mut());
    icmp.set_msg_type(Icmpv4Message::EchoReply);
    icmp.fill_checksum();
    bytes
}
