//! The ports of a running switch: the forwarding core and the ends that its ports lead to.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::tap::TapEnd;
use super::tunnel::TunnelEnd;
use super::unix::UnixEnd;
use crate::datagram::ReceiveBatch;
use crate::forward::{DropReason, PortId, PortRole, PortRules, Switch};
use crate::gateway::Gateway;
use crate::poll::{Poller, Ready, Registrar};
use crate::{MAX_FRAME, PortConfig, PortKind, SwitchError, VlanMode, vxlan};

use super::tunnel::Arrival;

/// Rounds of "the gateway answers, its answers are forwarded" before other work has its turn.
const GATEWAY_ROUNDS: usize = 16;

/// What a port is connected to.
#[derive(Debug)]
pub(super) enum End {
    Unix(UnixEnd),
    Tunnel(TunnelEnd),
    Tap(TapEnd),
    Gateway(Box<Gateway>),
}

impl End {
    fn enqueue(&mut self, lane: usize, frame: &[u8]) -> Result<(), DropReason> {
        match self {
            End::Unix(end) => end.enqueue(frame),
            End::Tunnel(end) => end.enqueue(lane, frame),
            End::Tap(end) => end.enqueue(frame),
            End::Gateway(gateway) => gateway.enqueue(frame),
        }
    }
}

/// A configured port.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) config: PortConfig,
    pub(super) end: End,
    /// Its ports in the forwarding core: one, or one for each remote of a tunnel.
    pub(super) lanes: Vec<PortId>,
    is_dirty: bool,
}

/// All ports, by the number that their tokens carry.
#[derive(Debug)]
pub(super) struct Ports {
    poller: Arc<Poller>,
    pub(super) switch: Switch,
    pub(super) entries: BTreeMap<u32, Entry>,
    /// Where the ports of the forwarding core lead.
    routes: BTreeMap<PortId, (u32, usize)>,
    /// Entries that have frames to send.
    dirty: Vec<u32>,
    batch: ReceiveBatch,
    outbox: Vec<Vec<u8>>,
    next: u32,
}

impl Ports {
    /// `first` is the first number that ports may use as owners of tokens.
    pub(super) fn new(poller: Arc<Poller>, switch: Switch, first: u32) -> Self {
        Ports {
            poller,
            switch,
            entries: BTreeMap::new(),
            routes: BTreeMap::new(),
            dirty: Vec::new(),
            batch: ReceiveBatch::new(MAX_FRAME + vxlan::HEADER),
            outbox: Vec::new(),
            next: first,
        }
    }

    fn open(&self, config: &PortConfig, registrar: Registrar) -> Result<End, SwitchError> {
        let name = &config.name;
        Ok(match &config.kind {
            PortKind::Unix(unix) => End::Unix(UnixEnd::new(unix, registrar)?),
            PortKind::Tunnel(tunnel) => End::Tunnel(TunnelEnd::new(name, tunnel, registrar)?),
            PortKind::Tap(tap) => End::Tap(TapEnd::new(name, tap, registrar)?),
            PortKind::Gateway(gateway) => {
                if matches!(config.vlan, VlanMode::Trunk(_)) {
                    let reason = "a gateway serves one VLAN: give it as access".to_owned();
                    return Err(SwitchError::Invalid {
                        port: name.clone(),
                        reason,
                    });
                }
                End::Gateway(Box::new(Gateway::new(name, gateway, registrar)?))
            }
        })
    }

    pub(super) fn add(&mut self, config: PortConfig) -> Result<(), SwitchError> {
        if self
            .entries
            .values()
            .any(|entry| entry.config.name == config.name)
        {
            return Err(SwitchError::DuplicatePort(config.name));
        }
        let number = self.next;
        let end = self.open(&config, Registrar::new(&self.poller, number))?;
        self.next += 1;
        let (role, count) = match &end {
            End::Tunnel(tunnel) => (PortRole::Tunnel, tunnel.remotes().count()),
            _ => (PortRole::Edge, 1),
        };
        let rules = PortRules {
            role,
            vlan: config.vlan.clone(),
            allowed_sources: config.allowed_sources.clone(),
        };
        let lanes: Vec<_> = (0..count)
            .map(|_| self.switch.add_port(rules.clone()))
            .collect();
        for (lane, port) in lanes.iter().enumerate() {
            self.routes.insert(*port, (number, lane));
            if let PortKind::Gateway(gateway) = &config.kind {
                self.switch.pin(gateway.mac, *port);
            }
        }
        tracing::info!(port = config.name, "port added");
        self.entries.insert(
            number,
            Entry {
                config,
                end,
                lanes,
                is_dirty: false,
            },
        );
        Ok(())
    }

    pub(super) fn remove(&mut self, name: &str) -> Result<(), SwitchError> {
        let number = self
            .entries
            .iter()
            .find(|(_, entry)| entry.config.name == name);
        let number = number.map(|(number, _)| *number);
        let entry = number.and_then(|number| self.entries.remove(&number));
        let entry = entry.ok_or_else(|| SwitchError::Unknown {
            what: "port",
            name: name.to_owned(),
        })?;
        for port in entry.lanes {
            self.routes.remove(&port);
            self.switch.remove_port(port);
        }
        tracing::info!(port = name, "port removed");
        Ok(())
    }

    /// The gateway of this name, or the only one there is.
    pub(super) fn gateway(&mut self, name: Option<&str>) -> Result<&mut Gateway, SwitchError> {
        let unknown = || SwitchError::Unknown {
            what: "gateway",
            name: name.unwrap_or("").to_owned(),
        };
        let mut gateways = self
            .entries
            .values_mut()
            .filter_map(|entry| match &mut entry.end {
                End::Gateway(gateway) if name.is_none_or(|name| name == entry.config.name) => {
                    Some(gateway)
                }
                _ => None,
            });
        match (gateways.next(), gateways.next()) {
            (Some(gateway), None) => Ok(gateway),
            _ => Err(unknown()),
        }
    }

    fn mark(&mut self, number: u32) {
        if let Some(entry) = self.entries.get_mut(&number)
            && !entry.is_dirty
        {
            entry.is_dirty = true;
            self.dirty.push(number);
        }
    }

    /// Handles a descriptor of port `number` that became ready.
    pub(super) fn ready(&mut self, number: u32, token: u32, ready: Ready, now: Duration) {
        let Some(entry) = self.entries.get_mut(&number) else {
            return;
        };
        match &mut entry.end {
            End::Gateway(gateway) => {
                gateway.ready(token, ready, now);
                self.mark(number);
                return;
            }
            End::Unix(end) if ready.writable || token != super::unix::SOCKET => end.unblock(),
            End::Tunnel(end) if ready.writable => end.unblock(),
            End::Tap(end) if ready.writable => end.unblock(),
            _ => {}
        }
        if ready.writable || ready.broken {
            self.mark(number);
        }
        if ready.readable || ready.broken {
            self.receive(number, now);
        }
    }

    /// Takes one batch from a port and offers it to the forwarding core.
    fn receive(&mut self, number: u32, now: Duration) {
        let Some(entry) = self.entries.get_mut(&number) else {
            return;
        };
        let received = match &entry.end {
            End::Unix(end) => self.batch.receive(end.fd(), crate::datagram::BATCH),
            End::Tunnel(end) => self.batch.receive(end.fd(), crate::datagram::BATCH),
            End::Tap(end) => self.batch.read(end.fd()),
            End::Gateway(_) => return,
        };
        if let Err(error) = received {
            // Asynchronous errors are told once and are over: those of a peer that went away.
            tracing::debug!(port = entry.config.name, %error, "failed to receive");
            return;
        }
        let batch = std::mem::replace(&mut self.batch, ReceiveBatch::empty());
        for incoming in batch.datagrams() {
            let Some(entry) = self.entries.get_mut(&number) else {
                break;
            };
            let length = incoming.bytes.len();
            let rejected = |reason| Arrival::Rejected(0, reason);
            let mut heard = false;
            let arrival = match &mut entry.end {
                End::Tunnel(end) => end.arrival(&incoming),
                _ if incoming.truncated => rejected(DropReason::TooLong),
                End::Unix(end) => {
                    heard = end.hear(&incoming);
                    // An empty datagram says only where the device is.
                    if length == 0 {
                        Arrival::Stray
                    } else {
                        Arrival::Frame(0, incoming.bytes)
                    }
                }
                _ => Arrival::Frame(0, incoming.bytes),
            };
            let port = |lane: usize| entry.lanes.get(lane).copied();
            match arrival {
                Arrival::Frame(lane, frame) => {
                    if let Some(port) = port(lane) {
                        self.offer(port, frame, now);
                    }
                }
                Arrival::Rejected(lane, reason) => {
                    if let Some(port) = port(lane) {
                        self.switch.rejected(port, length, reason);
                    }
                }
                Arrival::Stray => {}
            }
            if heard {
                self.mark(number);
            }
        }
        self.batch = batch;
    }

    /// Forwards one frame into the queues of the ports it leaves by.
    fn offer(&mut self, port: PortId, frame: &[u8], now: Duration) {
        let Ports {
            switch,
            entries,
            routes,
            dirty,
            ..
        } = self;
        let moved = switch.forward(now, port, frame, |port, bytes| {
            let (number, lane) = routes.get(&port).ok_or(DropReason::PeerGone)?;
            let entry = entries.get_mut(number).ok_or(DropReason::PeerGone)?;
            entry.end.enqueue(*lane, bytes)?;
            if !entry.is_dirty {
                entry.is_dirty = true;
                dirty.push(*number);
            }
            Ok(())
        });
        let Some(moved) = moved else { return };
        tracing::debug!(station = %moved.station, "station moved");
        let mut told = Vec::new();
        for (number, entry) in &mut self.entries {
            if let End::Gateway(gateway) = &mut entry.end
                && entry.config.vlan == VlanMode::Access(moved.vlan)
            {
                gateway.station_moved(moved.station);
                told.push(*number);
            }
        }
        for number in told {
            self.mark(number);
        }
    }

    /// Sends what has been queued, and lets the gateways answer.
    pub(super) fn flush(&mut self, now: Duration) {
        for _round in 0..GATEWAY_ROUNDS {
            if self.dirty.is_empty() {
                return;
            }
            for number in std::mem::take(&mut self.dirty) {
                self.flush_one(number, now);
            }
        }
    }

    fn flush_one(&mut self, number: u32, now: Duration) {
        let Ports {
            switch,
            entries,
            outbox,
            ..
        } = self;
        let Some(entry) = entries.get_mut(&number) else {
            return;
        };
        entry.is_dirty = false;
        let lanes = &entry.lanes;
        let mut lost = |lane: usize, length, reason| {
            if let Some(port) = lanes.get(lane) {
                switch.lost(*port, length, reason);
            }
        };
        match &mut entry.end {
            End::Unix(end) => end.flush(|length, reason| lost(0, length, reason)),
            End::Tunnel(end) => end.flush(lost),
            End::Tap(end) => end.flush(|length, reason| lost(0, length, reason)),
            End::Gateway(gateway) => {
                gateway.poll(now, outbox);
                let Some(port) = entry.lanes.first().copied() else {
                    return;
                };
                let mut frames = std::mem::take(&mut self.outbox);
                for frame in frames.drain(..) {
                    self.offer(port, &frame, now);
                }
                self.outbox = frames;
            }
        }
    }

    /// When something is due without any descriptor becoming ready.
    pub(super) fn timeout(&mut self, now: Duration) -> Option<Duration> {
        if !self.dirty.is_empty() {
            return Some(Duration::ZERO);
        }
        let gateways = self
            .entries
            .values_mut()
            .filter_map(|entry| match &mut entry.end {
                End::Gateway(gateway) => gateway.timeout(now),
                _ => None,
            });
        gateways.min()
    }

    /// Lets the gateways do what is due.
    pub(super) fn tick(&mut self, now: Duration) {
        let mut due = Vec::new();
        for (number, entry) in &mut self.entries {
            if let End::Gateway(gateway) = &mut entry.end
                && gateway
                    .timeout(now)
                    .is_some_and(|timeout| timeout.is_zero())
            {
                due.push(*number);
            }
        }
        for number in due {
            self.mark(number);
        }
        self.flush(now);
    }

    /// Counters of all ports: an object for each lane.
    pub(super) fn counters(&self) -> Value {
        let mut ports = Vec::new();
        for entry in self.entries.values() {
            let name = &entry.config.name;
            for (lane, port) in entry.lanes.iter().enumerate() {
                let counters = self.switch.counters(*port);
                let mut object = json!({ "name": name, "counters": counters });
                match &entry.end {
                    End::Unix(end) => object["device"] = json!(end.device()),
                    End::Tunnel(end) => {
                        object["remote"] = json!(end.remotes().nth(lane));
                        object["strays"] = json!(end.strays());
                    }
                    End::Tap(_) => {}
                    End::Gateway(gateway) => object["gateway"] = gateway.status(),
                }
                ports.push(object);
            }
        }
        json!(ports)
    }

    /// Learned stations with their ports.
    pub(super) fn stations(&self, now: Duration) -> Value {
        let stations = self.switch.stations().map(|station| {
            let route = self.routes.get(&station.port);
            let entry = route.and_then(|(number, lane)| Some((self.entries.get(number)?, *lane)));
            let mut object = json!({
                "vlan": station.vlan,
                "station": station.station,
                "port": entry.map(|(entry, _)| &entry.config.name),
                "age_seconds": station.heard.map(|heard| now.saturating_sub(heard).as_secs()),
            });
            if let Some((
                Entry {
                    end: End::Tunnel(end),
                    ..
                },
                lane,
            )) = entry
            {
                object["remote"] = json!(end.remotes().nth(lane));
            }
            object
        });
        Value::Array(stations.collect())
    }
}
