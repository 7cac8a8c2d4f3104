//! The table of learned stations: bounded as a whole and per port, and ageing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Duration;

use super::{PortId, PortRole};
use crate::{LearningLimits, MacAddress, VlanId};

/// Where one station is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StationEntry {
    /// Its VLAN.
    pub vlan: VlanId,
    /// Its address.
    pub station: MacAddress,
    /// The port behind which it is.
    pub port: PortId,
    /// When it was last heard, on the clock given to the switch; `None` when it is pinned.
    pub heard: Option<Duration>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    port: PortId,
    heard: Duration,
    pinned: bool,
}

/// What became of a source address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Learned {
    /// It is in the table, where it was or as a new entry.
    Known,
    /// It was at another port until now.
    Moved,
    /// It is new and there is no room.
    NoRoom,
    /// It belongs to another port for good.
    Pinned,
}

#[derive(Debug)]
pub(super) struct AddressTable {
    limits: LearningLimits,
    places: HashMap<(VlanId, MacAddress), Place>,
    /// Learned addresses by port.
    shares: HashMap<PortId, usize>,
    /// When a full table was last searched for old entries.
    swept: Duration,
}

impl AddressTable {
    pub(super) fn new(limits: LearningLimits) -> Self {
        AddressTable {
            limits,
            places: HashMap::new(),
            shares: HashMap::new(),
            swept: Duration::ZERO,
        }
    }

    fn ageing(&self) -> Duration {
        Duration::from_secs(self.limits.ageing_seconds)
    }

    pub(super) fn pin(&mut self, vlan: VlanId, station: MacAddress, port: PortId) {
        let place = Place {
            port,
            heard: Duration::ZERO,
            pinned: true,
        };
        if let Some(old) = self.places.insert((vlan, station), place)
            && !old.pinned
        {
            release(&mut self.shares, old.port);
        }
    }

    pub(super) fn learn(
        &mut self,
        now: Duration,
        key: (VlanId, MacAddress),
        port: PortId,
        role: PortRole,
    ) -> Learned {
        let full = self.places.len() >= self.limits.addresses;
        if full && now.saturating_sub(self.swept) >= Duration::from_secs(1) {
            self.expire(now);
        }
        let full = self.places.len() >= self.limits.addresses;
        let share = self.shares.get(&port).copied().unwrap_or(0);
        let share_full = role == PortRole::Edge && share >= self.limits.addresses_per_port;
        match self.places.entry(key) {
            Entry::Occupied(mut entry) => {
                let place = entry.get_mut();
                if place.port == port {
                    place.heard = now;
                    return Learned::Known;
                }
                if place.pinned {
                    return Learned::Pinned;
                }
                release(&mut self.shares, place.port);
                if share_full {
                    // Wherever it is, it is no longer where it was: flood until there is room.
                    entry.remove();
                    return Learned::NoRoom;
                }
                *place = Place {
                    port,
                    heard: now,
                    pinned: false,
                };
                *self.shares.entry(port).or_default() += 1;
                Learned::Moved
            }
            Entry::Vacant(_) if full || share_full => Learned::NoRoom,
            Entry::Vacant(entry) => {
                entry.insert(Place {
                    port,
                    heard: now,
                    pinned: false,
                });
                *self.shares.entry(port).or_default() += 1;
                Learned::Known
            }
        }
    }

    /// The port of a station; `None` for groups and for stations not known or too old.
    pub(super) fn find(&self, now: Duration, vlan: VlanId, station: MacAddress) -> Option<PortId> {
        if station.is_multicast() {
            return None;
        }
        let place = self.places.get(&(vlan, station))?;
        let fresh = place.pinned || now.saturating_sub(place.heard) < self.ageing();
        fresh.then_some(place.port)
    }

    pub(super) fn expire(&mut self, now: Duration) {
        self.swept = now;
        let ageing = self.ageing();
        self.places.retain(|_, place| {
            let keep = place.pinned || now.saturating_sub(place.heard) < ageing;
            if !keep {
                release(&mut self.shares, place.port);
            }
            keep
        });
    }

    pub(super) fn forget_port(&mut self, port: PortId) {
        self.places.retain(|_, place| place.port != port);
        self.shares.remove(&port);
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = StationEntry> + '_ {
        self.places
            .iter()
            .map(|((vlan, station), place)| StationEntry {
                vlan: *vlan,
                station: *station,
                port: place.port,
                heard: (!place.pinned).then_some(place.heard),
            })
    }
}

fn release(shares: &mut HashMap<PortId, usize>, port: PortId) {
    if let Some(share) = shares.get_mut(&port) {
        *share = share.saturating_sub(1);
    }
}
