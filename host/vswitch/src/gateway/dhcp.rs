//! The gateway's DHCP server (RFC 2131, options of RFC 2132). Deterministic: a station gets its
//! reservation, or what it had, or what it asks for if that is free, or the lowest free address.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use serde_json::{Value, json};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{EthernetProtocol, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr};

use super::Identity;
use super::responder::{DHCP_CLIENT, DHCP_SERVER, ethernet_frame};
use crate::{DhcpConfig, MacAddress};

/// Bytes before the options: BOOTP's fields and the magic cookie.
const FIXED: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Some clients drop shorter messages (RFC 1542, section 2.1).
const MIN_REPLY: usize = 300;
const ETHERNET: usize = 14;

/// Addresses in a pool at most.
const MAX_POOL: u32 = 1 << 16;

mod option {
    pub(super) const SUBNET: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const DNS: u8 = 6;
    pub(super) const BROADCAST: u8 = 28;
    pub(super) const REQUESTED: u8 = 50;
    pub(super) const LEASE_TIME: u8 = 51;
    pub(super) const KIND: u8 = 53;
    pub(super) const SERVER: u8 = 54;
    pub(super) const RENEWAL: u8 = 58;
    pub(super) const REBINDING: u8 = 59;
    pub(super) const END: u8 = 255;
}

mod kind {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const DECLINE: u8 = 4;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const RELEASE: u8 = 7;
    pub(super) const INFORM: u8 = 8;
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    address: Ipv4Addr,
    until: Duration,
}

#[derive(Debug)]
pub(super) struct DhcpServer {
    config: DhcpConfig,
    identity: Identity,
    leases: BTreeMap<MacAddress, Lease>,
    /// Addresses that a station found taken, and until when they are not given.
    declined: BTreeMap<Ipv4Addr, Duration>,
}

/// What a client says.
#[derive(Debug)]
struct Message<'a> {
    kind: u8,
    head: &'a [u8],
    station: MacAddress,
    client: Ipv4Addr,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

fn ipv4(bytes: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
}

impl<'a> Message<'a> {
    /// `None` for what is no whole request of a station that sends for itself.
    fn parse(bytes: &'a [u8], sender: MacAddress) -> Option<Self> {
        let (head, options) = bytes.split_at_checked(FIXED)?;
        let is_request = head[..3] == [1, 1, 6] && head[236..240] == COOKIE;
        let relay = ipv4(&head[24..28])?;
        if !is_request || head[28..34] != sender.0 || !relay.is_unspecified() {
            return None;
        }
        let mut message = Message {
            kind: 0,
            head,
            station: sender,
            client: ipv4(&head[12..16])?,
            requested: None,
            server: None,
        };
        let mut rest = options;
        loop {
            match rest {
                [] | [option::END, ..] => break,
                [0, tail @ ..] => rest = tail,
                [code, length, tail @ ..] => {
                    let (value, tail) = tail.split_at_checked(usize::from(*length))?;
                    match *code {
                        option::KIND => message.kind = *value.first()?,
                        option::REQUESTED => message.requested = ipv4(value),
                        option::SERVER => message.server = ipv4(value),
                        _ => {}
                    }
                    rest = tail;
                }
                [_] => return None,
            }
        }
        Some(message)
    }

    fn wants_broadcast(&self) -> bool {
        self.head[10] & 0x80 != 0
    }
}

impl DhcpServer {
    pub(super) fn new(config: &DhcpConfig, identity: Identity) -> Result<Self, String> {
        let (first, last) = (u32::from(config.first), u32::from(config.last));
        if !identity.is_station(config.first) || !identity.is_station(config.last) || first > last {
            return Err(
                "the pool's first and last address must be in the subnet, in this order".into(),
            );
        }
        if last - first >= MAX_POOL {
            return Err(format!("the pool has more than {MAX_POOL} addresses"));
        }
        for (station, address) in &config.reservations {
            if !identity.is_station(*address) || *address == identity.address {
                return Err(format!(
                    "{address}, reserved for {station}, is no station in the subnet"
                ));
            }
        }
        let mut addresses: Vec<_> = config.reservations.values().collect();
        addresses.sort_unstable();
        if addresses.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("an address is reserved twice".into());
        }
        let leases = BTreeMap::new();
        Ok(DhcpServer {
            config: config.clone(),
            identity,
            leases,
            declined: BTreeMap::new(),
        })
    }

    /// Stations with their addresses.
    pub(super) fn leases(&self) -> Value {
        let leases = self.leases.iter();
        leases
            .map(|(station, lease)| (station.to_string(), json!(lease.address)))
            .collect()
    }

    /// Answers the payload of a DHCP message from `sender` with a frame, if an answer is due.
    pub(super) fn answer(
        &mut self,
        now: Duration,
        sender: MacAddress,
        payload: &[u8],
    ) -> Option<Vec<u8>> {
        let message = Message::parse(payload, sender)?;
        let is_for_us = message
            .server
            .is_none_or(|server| server == self.identity.address);
        match message.kind {
            kind::DISCOVER => {
                let address = self.choose(now, &message)?;
                Some(self.reply(&message, kind::OFFER, Some(address)))
            }
            kind::REQUEST if is_for_us => self.confirm(now, &message),
            kind::DECLINE if is_for_us => {
                let address = self.leases.remove(&message.station)?.address;
                if Some(address) != self.reserved(message.station) {
                    self.declined.insert(address, now + self.lease_time());
                }
                None
            }
            kind::RELEASE if is_for_us => {
                self.leases.remove(&message.station);
                None
            }
            kind::INFORM => Some(self.reply(&message, kind::ACK, None)),
            _ => None,
        }
    }

    fn lease_time(&self) -> Duration {
        Duration::from_secs(u64::from(self.config.lease_seconds))
    }

    fn reserved(&self, station: MacAddress) -> Option<Ipv4Addr> {
        self.config.reservations.get(&station).copied()
    }

    fn is_free(&self, now: Duration, address: Ipv4Addr, station: MacAddress) -> bool {
        let in_pool = (self.config.first..=self.config.last).contains(&address);
        let taken = self.leases.iter().any(|(holder, lease)| {
            *holder != station && lease.address == address && lease.until > now
        });
        let declined = self
            .declined
            .get(&address)
            .is_some_and(|until| *until > now);
        let reserved = self
            .config
            .reservations
            .values()
            .any(|reserved| *reserved == address);
        in_pool && !taken && !declined && !reserved && address != self.identity.address
    }

    fn choose(&self, now: Duration, message: &Message<'_>) -> Option<Ipv4Addr> {
        let station = message.station;
        if let Some(reserved) = self.reserved(station) {
            return Some(reserved);
        }
        let previous = self.leases.get(&station).map(|lease| lease.address);
        let free = |address: &Ipv4Addr| self.is_free(now, *address, station);
        if let Some(address) = previous.filter(free).or(message.requested.filter(free)) {
            return Some(address);
        }
        // One pass over what is taken, rather than one for each address of the pool.
        let held = self
            .leases
            .values()
            .filter(|lease| lease.until > now)
            .map(|lease| lease.address);
        let declined = self
            .declined
            .iter()
            .filter(|(_, until)| **until > now)
            .map(|(address, _)| *address);
        let mut taken: Vec<Ipv4Addr> = held
            .chain(declined)
            .chain(self.config.reservations.values().copied())
            .chain([self.identity.address])
            .collect();
        taken.sort_unstable();
        (u32::from(self.config.first)..=u32::from(self.config.last))
            .map(Ipv4Addr::from)
            .find(|address| taken.binary_search(address).is_err())
    }

    fn confirm(&mut self, now: Duration, message: &Message<'_>) -> Option<Vec<u8>> {
        let wanted = message.requested.unwrap_or(message.client);
        let station = message.station;
        let allowed = match self.reserved(station) {
            Some(reserved) => reserved == wanted,
            None => self.is_free(now, wanted, station),
        };
        if !allowed {
            return Some(self.reply(message, kind::NAK, None));
        }
        // Leases that ended make room; what is left is bounded by the pool and the reservations.
        self.leases.retain(|_, lease| lease.until > now);
        self.declined.retain(|_, until| *until > now);
        self.leases.insert(
            station,
            Lease {
                address: wanted,
                until: now + self.lease_time(),
            },
        );
        Some(self.reply(message, kind::ACK, Some(wanted)))
    }

    fn options(&self, kind: u8, has_lease: bool) -> Vec<u8> {
        let mut options = vec![option::KIND, 1, kind];
        let mut put = |code: u8, value: &[u8]| {
            // The longest is the list of name servers: cut to what one option holds.
            let value = &value[..value.len().min(252)];
            options.extend([code, value.len() as u8]);
            options.extend(value);
        };
        put(option::SERVER, &self.identity.address.octets());
        if kind != kind::NAK {
            let mask = self.identity.mask();
            put(option::SUBNET, &mask.to_be_bytes());
            put(option::ROUTER, &self.identity.address.octets());
            put(
                option::BROADCAST,
                &(u32::from(self.identity.address) | !mask).to_be_bytes(),
            );
            let servers: Vec<u8> = self.config.dns.iter().flat_map(Ipv4Addr::octets).collect();
            if !servers.is_empty() {
                put(option::DNS, &servers);
            }
        }
        if has_lease {
            let seconds = self.config.lease_seconds;
            put(option::LEASE_TIME, &seconds.to_be_bytes());
            put(option::RENEWAL, &(seconds / 2).to_be_bytes());
            put(option::REBINDING, &(seconds / 8 * 7).to_be_bytes());
        }
        options.push(option::END);
        options
    }

    fn reply(&self, message: &Message<'_>, kind: u8, address: Option<Ipv4Addr>) -> Vec<u8> {
        let mut body = message.head.to_vec();
        body[0] = 2;
        // Hops, seconds; then addresses are ours to fill in, names are not used.
        body[3] = 0;
        body[8..10].fill(0);
        body[16..28].fill(0);
        body[44..236].fill(0);
        if kind == kind::NAK {
            body[12..16].fill(0);
        }
        if let Some(address) = address {
            body[16..20].copy_from_slice(&address.octets());
            body[20..24].copy_from_slice(&self.identity.address.octets());
        }
        body.extend(self.options(kind, address.is_some()));
        body.resize(body.len().max(MIN_REPLY), 0);
        // RFC 2131, section 4.1.
        let unicast = match (kind, address) {
            (kind::NAK, _) => None,
            _ if !message.client.is_unspecified() => Some(message.client),
            (_, Some(address)) if !message.wants_broadcast() => Some(address),
            _ => None,
        };
        let (mac, ip) = match unicast {
            Some(address) => (message.station, address),
            None => (MacAddress::BROADCAST, Ipv4Addr::BROADCAST),
        };
        self.datagram(mac, ip, &body)
    }

    fn datagram(&self, to: MacAddress, address: Ipv4Addr, body: &[u8]) -> Vec<u8> {
        let checksums = ChecksumCapabilities::default();
        let udp = UdpRepr {
            src_port: DHCP_SERVER,
            dst_port: DHCP_CLIENT,
        };
        let ip = Ipv4Repr {
            src_addr: self.identity.address,
            dst_addr: address,
            next_header: IpProtocol::Udp,
            payload_len: udp.header_len() + body.len(),
            hop_limit: 64,
        };
        let length = ip.buffer_len() + ip.payload_len;
        let mut bytes = ethernet_frame(self.identity.mac, to, EthernetProtocol::Ipv4, length);
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes[ETHERNET..]);
        ip.emit(&mut packet, &checksums);
        let (from, to) = (self.identity.address.into(), address.into());
        udp.emit(
            &mut UdpPacket::new_unchecked(packet.payload_mut()),
            &from,
            &to,
            body.len(),
            |payload| payload.copy_from_slice(body),
            &checksums,
        );
        bytes
    }
}
