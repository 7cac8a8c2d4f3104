//! What a switch process is told: its ports and how each is connected.
//!
//! ```json
//! {"name": "a", "control": "/run/dunlin/a.control", "ports": [
//!   {"name": "vm1", "kind": {"unix": {"path": "/run/dunlin/vm1.switch"}}},
//!   {"name": "uplink", "kind": {"tunnel": {"local": "127.0.0.2", "remotes": ["127.0.0.3"], "vni": 7}}},
//!   {"name": "lan", "vlan": {"trunk": [1, 20]}, "kind": {"tap": {"interface": "dunlin0"}}},
//!   {"name": "gateway", "kind": {"gateway": {
//!     "mac": "02:00:00:00:00:01", "address": "10.0.2.1", "prefix": 24,
//!     "dhcp": {"first": "10.0.2.15", "last": "10.0.2.99",
//!              "reservations": {"02:00:00:00:00:15": "10.0.2.15"}},
//!     "forwards": [{"listen": "127.0.0.2:8080", "to": "10.0.2.15:7"}]}}}]}
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::MacAddress;

/// UDP port of VXLAN (RFC 7348, section 5).
pub const VXLAN_PORT: u16 = 4789;

/// An 802.1Q VLAN identifier, 1 to 4094.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct VlanId(u16);

impl VlanId {
    /// The VLAN of ports that name none.
    pub const DEFAULT: VlanId = VlanId(1);

    /// `None` for 0, which means "no VLAN", and for 4095 and more, which are reserved.
    #[must_use]
    pub fn new(id: u16) -> Option<Self> {
        (1..4095).contains(&id).then_some(VlanId(id))
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }
}

/// A number that is no VLAN identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("failed to use {0} as VLAN: identifiers are 1 to 4094")]
pub struct VlanIdError(u16);

impl TryFrom<u16> for VlanId {
    type Error = VlanIdError;

    fn try_from(id: u16) -> Result<Self, Self::Error> {
        VlanId::new(id).ok_or(VlanIdError(id))
    }
}

impl From<VlanId> for u16 {
    fn from(id: VlanId) -> Self {
        id.0
    }
}

/// How a port takes part in VLANs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VlanMode {
    /// Untagged frames in and out, all in this VLAN; tagged ones are dropped.
    Access(VlanId),
    /// Tagged frames of these VLANs in and out; others and untagged ones are dropped.
    Trunk(Vec<VlanId>),
}

impl Default for VlanMode {
    fn default() -> Self {
        VlanMode::Access(VlanId::DEFAULT)
    }
}

/// An end of a tunnel: an IP address, and a UDP port if it is not [`VXLAN_PORT`]
/// (`127.0.0.2`, `127.0.0.2:4790`, `[::1]:4790`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TunnelEndpoint(pub SocketAddr);

/// A text that is no IP address with or without a port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failed to read \"{0}\" as the end of a tunnel: an IP address, or an address and a port")]
pub struct TunnelEndpointError(String);

impl FromStr for TunnelEndpoint {
    type Err = TunnelEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let with_port = text.parse::<SocketAddr>();
        let address = with_port.or_else(|_not_both| {
            text.parse::<IpAddr>()
                .map(|ip| SocketAddr::new(ip, VXLAN_PORT))
        });
        let address = address.ok().map(TunnelEndpoint);
        address.ok_or_else(|| TunnelEndpointError(text.chars().take(60).collect()))
    }
}

impl TryFrom<String> for TunnelEndpoint {
    type Error = TunnelEndpointError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl fmt::Display for TunnelEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.port() == VXLAN_PORT {
            self.0.ip().fmt(f)
        } else {
            self.0.fmt(f)
        }
    }
}

impl From<TunnelEndpoint> for String {
    fn from(endpoint: TunnelEndpoint) -> Self {
        endpoint.to_string()
    }
}

/// A switch process: what `dunlin switch` reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchConfig {
    /// Shown in logs and answers.
    pub name: String,
    /// Path of the control socket; none without.
    #[serde(default)]
    pub control: Option<PathBuf>,
    /// Ports from the start; more can be added while it runs.
    #[serde(default)]
    pub ports: Vec<PortConfig>,
    /// Bounds of what the switch remembers.
    #[serde(default)]
    pub learning: LearningLimits,
}

/// Bounds of the table of learned addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LearningLimits {
    /// Addresses in the whole table.
    pub addresses: usize,
    /// Addresses behind one port, so that one guest cannot fill the table. Tunnels have no such bound.
    pub addresses_per_port: usize,
    /// Seconds after its last frame when an address is forgotten.
    pub ageing_seconds: u64,
}

impl Default for LearningLimits {
    fn default() -> Self {
        LearningLimits {
            addresses: 16_384,
            addresses_per_port: 1024,
            ageing_seconds: 300,
        }
    }
}

/// One port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortConfig {
    /// Unique in its switch.
    pub name: String,
    /// What it is connected to.
    pub kind: PortKind,
    /// Its VLANs.
    #[serde(default)]
    pub vlan: VlanMode,
    /// When not empty: the only source addresses that frames from this port may carry.
    #[serde(default)]
    pub allowed_sources: Vec<MacAddress>,
}

/// What a port is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortKind {
    /// A VM's device by unix datagrams, one frame each.
    Unix(UnixConfig),
    /// Other switches by VXLAN over UDP.
    Tunnel(TunnelConfig),
    /// A tap interface of the host; needs the right to make one.
    Tap(TapConfig),
    /// The built-in gateway: ARP, ICMP echo, DHCP, TCP from the host to guests.
    Gateway(GatewayConfig),
}

/// A `unix` port.
///
/// With QEMU: `-netdev dgram,id=n0,local.type=unix,local.path=PEER,remote.type=unix,remote.path=PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnixConfig {
    /// The switch's socket, to which the device sends.
    pub path: PathBuf,
    /// The device's socket. Without it the switch answers to the socket that sent last, so that
    /// a VM can be taken over by another process.
    #[serde(default)]
    pub peer: Option<PathBuf>,
}

/// A `tunnel` port: a full mesh of switches. Frames that came from a tunnel do not go to another
/// one, so that the mesh has no loop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunnelConfig {
    /// The address to bind and to send from.
    pub local: TunnelEndpoint,
    /// The other switches.
    pub remotes: Vec<TunnelEndpoint>,
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
}

/// A `tap` port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapConfig {
    /// Name of the interface, at most 15 bytes; it is made when it does not exist.
    pub interface: String,
}

/// A `gateway` port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewayConfig {
    /// The gateway's own Ethernet address.
    pub mac: MacAddress,
    /// The gateway's own IP address.
    pub address: Ipv4Addr,
    /// Length of the subnet's prefix.
    pub prefix: u8,
    /// The DHCP server; none without.
    #[serde(default)]
    pub dhcp: Option<DhcpConfig>,
    /// TCP ports of the host that lead to guests.
    #[serde(default)]
    pub forwards: Vec<ForwardConfig>,
    /// TCP connections at a time; more wait in the host's queue.
    #[serde(default = "default_connections")]
    pub max_connections: usize,
}

fn default_connections() -> usize {
    256
}

/// The gateway's DHCP server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DhcpConfig {
    /// First address of the pool.
    pub first: Ipv4Addr,
    /// Last address of the pool, included.
    pub last: Ipv4Addr,
    /// Fixed addresses, in the pool or outside it.
    #[serde(default)]
    pub reservations: BTreeMap<MacAddress, Ipv4Addr>,
    /// Name servers to tell; none without.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// Seconds for which an address is given.
    #[serde(default = "default_lease")]
    pub lease_seconds: u32,
}

fn default_lease() -> u32 {
    3600
}

/// A TCP port of the host that leads to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForwardConfig {
    /// Where the host listens.
    pub listen: SocketAddr,
    /// The guest's address and port.
    pub to: SocketAddrV4,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_example_is_read_and_written_back_the_same() {
        let lines = include_str!("config.rs").lines();
        let text: String = lines
            .skip_while(|line| *line != "//! ```json")
            .skip(1)
            .take_while(|line| *line != "//! ```")
            .map(|line| line.trim_start_matches("//!"))
            .collect();
        let config: SwitchConfig = serde_json::from_str(&text).unwrap();
        assert_eq!(config.ports.len(), 4);
        let again = serde_json::to_string(&config).unwrap();
        assert_eq!(
            serde_json::from_str::<SwitchConfig>(&again).unwrap(),
            config
        );
    }

    #[test]
    fn wrong_addresses_and_vlans_are_refused() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "02:00:00:00:00:+1",
            "2:0:0:0:0:0",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
        assert_eq!(
            "02:00:00:00:Ab:01"
                .parse::<MacAddress>()
                .unwrap()
                .to_string(),
            "02:00:00:00:ab:01"
        );
        for id in ["0", "4095", "70000", "-1"] {
            assert!(serde_json::from_str::<VlanId>(id).is_err(), "{id}");
        }
        assert!("localhost".parse::<TunnelEndpoint>().is_err());
        assert_eq!(
            "::1".parse::<TunnelEndpoint>().unwrap().0.port(),
            VXLAN_PORT
        );
        assert_eq!(
            "127.0.0.1:9".parse::<TunnelEndpoint>().unwrap().to_string(),
            "127.0.0.1:9"
        );
    }
}
