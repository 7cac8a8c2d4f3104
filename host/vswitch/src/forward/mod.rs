//! The forwarding core: which ports a frame leaves by. It does no I/O: the caller offers a frame
//! with its ingress port and the time, and is called back once for each egress port.
//!
//! - Stations are learned from source addresses, per VLAN; the newest frame decides where a
//!   station is. Frames to stations not known, to groups and to all are flooded.
//! - No frame leaves by the port it came from, nor by one tunnel when it came from another: in a
//!   full mesh every other switch has had it already (split horizon).
//! - VLANs by IEEE 802.1Q: access ports are untagged, trunks are tagged, both are filters.

mod counters;
mod table;
mod vlan;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

pub use counters::{DropCounters, DropReason, PortCounters};
pub use table::StationEntry;
use table::{AddressTable, Learned};
use vlan::{Classified, Membership, Rewriter};

use crate::{LearningLimits, MAX_FRAME, MacAddress, VlanId, VlanMode};

/// Bytes of destination, source and type.
pub(crate) const HEADER: usize = 14;

/// A port of a [`Switch`]; never used again for another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub(crate) u32);

/// Where a port leads, which decides about loops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortRole {
    /// To stations.
    Edge,
    /// To one other switch of a full mesh.
    Tunnel,
}

/// What a port lets through.
#[derive(Debug, Clone)]
pub struct PortRules {
    /// Where it leads.
    pub role: PortRole,
    /// Its VLANs.
    pub vlan: VlanMode,
    /// When not empty: the only source addresses that may come in.
    pub allowed_sources: Vec<MacAddress>,
}

#[derive(Debug)]
struct PortState {
    role: PortRole,
    membership: Membership,
    allowed_sources: Vec<MacAddress>,
    counters: PortCounters,
}

/// A station that was known at one port and has now been heard at another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// The station.
    pub station: MacAddress,
    /// Its VLAN.
    pub vlan: VlanId,
}

/// A learning switch.
#[derive(Debug)]
pub struct Switch {
    ports: BTreeMap<PortId, PortState>,
    next: u32,
    table: AddressTable,
    rewriter: Rewriter,
}

impl Switch {
    /// A switch without ports.
    #[must_use]
    pub fn new(limits: LearningLimits) -> Self {
        Switch {
            ports: BTreeMap::new(),
            next: 0,
            table: AddressTable::new(limits),
            rewriter: Rewriter::default(),
        }
    }

    /// Adds a port.
    pub fn add_port(&mut self, rules: PortRules) -> PortId {
        let id = PortId(self.next);
        self.next += 1;
        let state = PortState {
            role: rules.role,
            membership: Membership::new(&rules.vlan),
            allowed_sources: rules.allowed_sources,
            counters: PortCounters::default(),
        };
        self.ports.insert(id, state);
        id
    }

    /// Removes a port and forgets the stations behind it.
    pub fn remove_port(&mut self, port: PortId) {
        self.ports.remove(&port);
        self.table.forget_port(port);
    }

    /// Binds a station of the switch itself to a port for good: frames that claim to come from it
    /// elsewhere are dropped.
    pub fn pin(&mut self, station: MacAddress, port: PortId) {
        if let Some(state) = self.ports.get(&port) {
            for vlan in state.membership.vlans() {
                self.table.pin(vlan, station, port);
            }
        }
    }

    /// What a port has carried; `None` when there is no such port.
    #[must_use]
    pub fn counters(&self, port: PortId) -> Option<&PortCounters> {
        self.ports.get(&port).map(|state| &state.counters)
    }

    /// The stations known, in no order.
    pub fn stations(&self) -> impl Iterator<Item = StationEntry> + '_ {
        self.table.entries()
    }

    /// Forgets stations that have been silent for too long. Lookups do not depend on it.
    pub fn expire(&mut self, now: Duration) {
        self.table.expire(now);
    }

    /// Counts a frame that `deliver` had taken and that got lost on its way out.
    pub fn lost(&mut self, port: PortId, length: usize, reason: DropReason) {
        if let Some(state) = self.ports.get_mut(&port) {
            state.counters.take_back(length, reason);
        }
    }

    /// Counts a frame that was dropped before it could be offered.
    pub fn rejected(&mut self, port: PortId, length: usize, reason: DropReason) {
        if let Some(state) = self.ports.get_mut(&port) {
            state.counters.receive(length);
            state.counters.drop(reason);
        }
    }

    /// Offers a frame that came in at `ingress`. `now` is the time since any fixed moment.
    /// `deliver` is called for each egress port with the frame as it leaves there, and says
    /// whether the port took it.
    ///
    /// Returns the move of a station that the frame revealed.
    pub fn forward(
        &mut self,
        now: Duration,
        ingress: PortId,
        frame: &[u8],
        mut deliver: impl FnMut(PortId, &[u8]) -> Result<(), DropReason>,
    ) -> Option<Move> {
        let from = self.ports.get_mut(&ingress)?;
        from.counters.receive(frame.len());
        let frame = match admit(from, frame) {
            Ok(frame) => frame,
            Err(reason) => {
                from.counters.drop(reason);
                return None;
            }
        };
        let role = from.role;
        let moved = match self
            .table
            .learn(now, (frame.vlan, frame.source), ingress, role)
        {
            Learned::Known => None,
            Learned::Moved => Some(Move {
                station: frame.source,
                vlan: frame.vlan,
            }),
            Learned::NoRoom => {
                from.counters.not_learned += 1;
                None
            }
            Learned::Pinned => {
                from.counters.drop(DropReason::Spoofed);
                return None;
            }
        };
        let mut egress = Egress {
            switch_ports: &mut self.ports,
            rewriter: &mut self.rewriter,
            ingress,
            role,
        };
        let delivered = match self.table.find(now, frame.vlan, frame.destination) {
            Some(port) if port == ingress => {
                egress.count_drop(DropReason::SamePort);
                return moved;
            }
            Some(port) => egress.unicast(port, &frame, &mut deliver),
            None => egress.flood(&frame, &mut deliver),
        };
        if !delivered {
            egress.count_drop(DropReason::NoEgress);
        }
        moved
    }
}

/// What the rules of the ingress port say about a frame.
fn admit<'f>(port: &PortState, frame: &'f [u8]) -> Result<Classified<'f>, DropReason> {
    if frame.len() > MAX_FRAME {
        return Err(DropReason::TooLong);
    }
    let frame = port.membership.classify(frame)?;
    if frame.source.is_multicast() || frame.source.0 == [0; 6] {
        return Err(DropReason::BadSource);
    }
    if !port.allowed_sources.is_empty() && !port.allowed_sources.contains(&frame.source) {
        return Err(DropReason::Spoofed);
    }
    // 01-80-C2-00-00-0X never crosses a bridge (IEEE 802.1Q, table 8-1).
    if let [0x01, 0x80, 0xc2, 0x00, 0x00, 0x00..=0x0f] = frame.destination.0 {
        return Err(DropReason::LinkLocal);
    }
    Ok(frame)
}

/// The way out for one frame.
struct Egress<'s> {
    switch_ports: &'s mut BTreeMap<PortId, PortState>,
    rewriter: &'s mut Rewriter,
    ingress: PortId,
    role: PortRole,
}

impl Egress<'_> {
    fn count_drop(&mut self, reason: DropReason) {
        if let Some(state) = self.switch_ports.get_mut(&self.ingress) {
            state.counters.drop(reason);
        }
    }

    /// True when the frame had this way out, whether or not the port took it.
    fn unicast(
        &mut self,
        port: PortId,
        frame: &Classified<'_>,
        deliver: &mut impl FnMut(PortId, &[u8]) -> Result<(), DropReason>,
    ) -> bool {
        let Some(state) = self.switch_ports.get_mut(&port) else {
            return false;
        };
        self.rewriter.start();
        if !may_leave(state, self.role, frame.vlan) {
            return false;
        }
        leave(port, state, self.rewriter, frame, deliver);
        true
    }

    fn flood(
        &mut self,
        frame: &Classified<'_>,
        deliver: &mut impl FnMut(PortId, &[u8]) -> Result<(), DropReason>,
    ) -> bool {
        self.rewriter.start();
        let mut any = false;
        for (port, state) in self.switch_ports.iter_mut() {
            if *port != self.ingress && may_leave(state, self.role, frame.vlan) {
                leave(*port, state, self.rewriter, frame, deliver);
                any = true;
            }
        }
        any
    }
}

fn may_leave(state: &PortState, from: PortRole, vlan: VlanId) -> bool {
    let mesh = from == PortRole::Tunnel && state.role == PortRole::Tunnel;
    !mesh && state.membership.contains(vlan)
}

fn leave(
    port: PortId,
    state: &mut PortState,
    rewriter: &mut Rewriter,
    frame: &Classified<'_>,
    deliver: &mut impl FnMut(PortId, &[u8]) -> Result<(), DropReason>,
) {
    let bytes = rewriter.rewrite(frame, &state.membership);
    let taken = if bytes.len() > MAX_FRAME {
        Err(DropReason::TooLongTagged)
    } else {
        deliver(port, bytes)
    };
    match taken {
        Ok(()) => state.counters.send(bytes.len()),
        Err(reason) => state.counters.drop(reason),
    }
}
