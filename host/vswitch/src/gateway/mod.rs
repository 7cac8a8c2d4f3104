//! The built-in gateway: what makes a network usable without any right on the host.
//!
//! It is a station of its own on the switch. ARP, ICMP echo and DHCP are answered from one frame
//! to the next; TCP connections from the host to guests end here and go on as connections of
//! their own to the guest, on one small TCP/IP stack per guest: what one guest does or suffers
//! (a move, a pause, garbage) does not touch the connections of another.
//!
//! ```text
//! frame from the switch ─┬─▶ responder: ARP, ICMP echo ──┐
//!                        ├─▶ DHCP server ────────────────┼─▶ frames to the switch
//! host TCP connections ──┴─▶ the guest's stack ──────────┘
//! ```

mod connection;
mod dhcp;
mod responder;
mod stack;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use serde_json::{Value, json};

use crate::forward::DropReason;
use crate::poll::{Interest, Ready, Registrar};
use crate::{ForwardConfig, GatewayConfig, MacAddress, SwitchError};
use dhcp::DhcpServer;
use responder::Packet;
use stack::GuestStack;

/// Frames that may wait for the next poll.
const QUEUE: usize = 1024;

/// How long no connection is accepted after the host has run out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections taken from a listener at a time.
const ACCEPTS: usize = 16;

/// Who the gateway is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    mac: MacAddress,
    address: Ipv4Addr,
    prefix: u8,
}

impl Identity {
    fn mask(self) -> u32 {
        u32::MAX
            .checked_shl(32 - u32::from(self.prefix))
            .unwrap_or(0)
    }

    /// True for addresses that a station of the subnet can have.
    fn is_station(self, address: Ipv4Addr) -> bool {
        let (own, address, host) = (u32::from(self.address), u32::from(address), !self.mask());
        own & self.mask() == address & self.mask() && address & host != 0 && address & host != host
    }
}

#[derive(Debug)]
struct Listener {
    socket: TcpListener,
    forward: ForwardConfig,
    is_watched: bool,
}

/// A gateway. Frames go in by [`Gateway::enqueue`] and come out by [`Gateway::poll`].
#[derive(Debug)]
pub(crate) struct Gateway {
    name: String,
    identity: Identity,
    dhcp: Option<DhcpServer>,
    listeners: BTreeMap<u32, Listener>,
    stacks: BTreeMap<Ipv4Addr, GuestStack>,
    /// The guest of a connection's descriptor.
    guests: BTreeMap<u32, Ipv4Addr>,
    max_connections: usize,
    queue: Vec<Vec<u8>>,
    moved: Vec<MacAddress>,
    accept_again: Option<Duration>,
    next: u32,
    registrar: Registrar,
    accepted: u64,
    /// Stacks given up because they panicked.
    broken: u64,
}

fn check(config: &GatewayConfig, identity: Identity) -> Result<(), String> {
    if config.mac.is_multicast() || config.mac.0 == [0; 6] {
        return Err(format!("{} is no station's address", config.mac));
    }
    if !(1..=30).contains(&config.prefix) {
        return Err("the prefix must have 1 to 30 bits".to_owned());
    }
    if !identity.is_station(config.address) {
        return Err(format!(
            "{} is no station's address in its subnet",
            config.address
        ));
    }
    Ok(())
}

impl Gateway {
    pub(crate) fn new(
        name: &str,
        config: &GatewayConfig,
        registrar: Registrar,
    ) -> Result<Self, SwitchError> {
        let GatewayConfig {
            mac,
            address,
            prefix,
            dhcp,
            forwards,
            max_connections,
        } = config;
        let identity = Identity {
            mac: *mac,
            address: *address,
            prefix: *prefix,
        };
        let invalid = |reason| SwitchError::Invalid {
            port: name.to_owned(),
            reason,
        };
        check(config, identity).map_err(invalid)?;
        let dhcp = match dhcp {
            Some(dhcp) => Some(DhcpServer::new(dhcp, identity).map_err(invalid)?),
            None => None,
        };
        let mut gateway = Gateway {
            name: name.to_owned(),
            identity,
            dhcp,
            listeners: BTreeMap::new(),
            stacks: BTreeMap::new(),
            guests: BTreeMap::new(),
            max_connections: *max_connections,
            queue: Vec::new(),
            moved: Vec::new(),
            accept_again: None,
            next: 0,
            registrar,
            accepted: 0,
            broken: 0,
        };
        for forward in forwards {
            gateway.add_forward(*forward)?;
        }
        Ok(gateway)
    }

    fn number(&mut self) -> u32 {
        loop {
            let number = self.next;
            self.next = self.next.wrapping_add(1);
            if !self.listeners.contains_key(&number) && !self.guests.contains_key(&number) {
                return number;
            }
        }
    }

    /// Listens on the host for a guest; returns where (port 0 asks for any).
    pub(crate) fn add_forward(
        &mut self,
        forward: ForwardConfig,
    ) -> Result<SocketAddr, SwitchError> {
        let guest = *forward.to.ip();
        if !self.identity.is_station(guest)
            || guest == self.identity.address
            || forward.to.port() == 0
        {
            return Err(SwitchError::Invalid {
                port: self.name.clone(),
                reason: format!("{} is no guest in its subnet", forward.to),
            });
        }
        let number = self.number();
        let opened = (|| {
            let socket = TcpListener::bind(forward.listen)?;
            socket.set_nonblocking(true)?;
            self.registrar.add(&socket, number, Interest::Read)?;
            let listen = socket.local_addr()?;
            Ok((socket, listen))
        })();
        let (socket, listen) = opened.map_err(SwitchError::io("listen at", forward.listen))?;
        let forward = ForwardConfig { listen, ..forward };
        self.listeners.insert(
            number,
            Listener {
                socket,
                forward,
                is_watched: true,
            },
        );
        let identity = self.identity;
        self.stacks
            .entry(guest)
            .or_insert_with(|| GuestStack::new(identity, guest));
        Ok(listen)
    }

    /// Stops listening; connections that came in there are reset.
    pub(crate) fn remove_forward(&mut self, listen: SocketAddr) -> Result<(), SwitchError> {
        let found = self
            .listeners
            .iter()
            .find(|(_, listener)| listener.forward.listen == listen);
        let number = found.map(|(number, _)| *number);
        let listener = number.and_then(|number| self.listeners.remove(&number));
        let listener = listener.ok_or_else(|| SwitchError::Unknown {
            what: "forward",
            name: listen.to_string(),
        })?;
        if let Some(stack) = self.stacks.get_mut(listener.forward.to.ip()) {
            stack.reset(listener.forward.listen);
        }
        Ok(())
    }

    /// What is forwarded now.
    pub(crate) fn forwards(&self) -> Vec<ForwardConfig> {
        self.listeners
            .values()
            .map(|listener| listener.forward)
            .collect()
    }

    /// For the control socket.
    pub(crate) fn status(&self) -> Value {
        json!({
            "address": self.identity.address,
            "connections": self.connections(),
            "accepted": self.accepted,
            "broken_stacks": self.broken,
            "leases": self.dhcp.as_ref().map(DhcpServer::leases),
        })
    }

    fn connections(&self) -> usize {
        self.stacks.values().map(GuestStack::connections).sum()
    }

    /// A frame from the switch.
    pub(crate) fn enqueue(&mut self, frame: &[u8]) -> Result<(), DropReason> {
        if self.queue.len() >= QUEUE {
            return Err(DropReason::QueueFull);
        }
        self.queue.push(frame.to_vec());
        Ok(())
    }

    /// A station is behind another port than before: what was sent to the old one may be lost.
    pub(crate) fn station_moved(&mut self, station: MacAddress) {
        if !self.moved.contains(&station) && self.moved.len() < QUEUE {
            self.moved.push(station);
        }
    }

    /// A listener's or a connection's descriptor became ready.
    pub(crate) fn ready(&mut self, number: u32, ready: Ready, now: Duration) {
        if self.listeners.contains_key(&number) {
            self.accept(number, now);
        } else if let Some(guest) = self.guests.get(&number).copied() {
            self.guarded(guest, |stack, registrar| {
                stack.host_ready(number, ready, registrar)
            });
        }
    }

    /// Lets a guest's stack work. The TCP/IP library panics on some segments that no honest guest
    /// sends; such a guest loses its own connections, and nobody else notices.
    fn guarded<R>(
        &mut self,
        guest: Ipv4Addr,
        work: impl FnOnce(&mut GuestStack, &Registrar) -> R,
    ) -> Option<R> {
        let (stack, registrar) = (self.stacks.get_mut(&guest)?, &self.registrar);
        if let Ok(result) = catch_unwind(AssertUnwindSafe(|| work(stack, registrar))) {
            return Some(result);
        }
        tracing::error!(%guest, "the stack of a guest failed: its connections are reset");
        self.broken += 1;
        stack.abandon();
        *stack = GuestStack::new(self.identity, guest);
        self.guests.retain(|_, owner| *owner != guest);
        None
    }

    fn accept(&mut self, number: u32, now: Duration) {
        for _ in 0..ACCEPTS {
            if self.connections() >= self.max_connections {
                break;
            }
            let Some(listener) = self.listeners.get(&number) else {
                return;
            };
            let forward = listener.forward;
            match listener.socket.accept() {
                Ok((stream, _)) => {
                    let connection = self.number();
                    let connected = self.guarded(*forward.to.ip(), |stack, registrar| {
                        stack.connect((connection, stream), &forward, registrar, now)
                    });
                    match connected.unwrap_or(Ok(())) {
                        Ok(()) => {
                            self.guests.insert(connection, *forward.to.ip());
                            self.accepted += 1;
                        }
                        Err(error) => tracing::debug!(%error, "failed to forward a connection"),
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection");
                    self.accept_again = Some(now + ACCEPT_PAUSE);
                    break;
                }
            }
        }
        self.watch_listeners(now);
    }

    /// Watches listeners only while there is room for connections.
    fn watch_listeners(&mut self, now: Duration) {
        if self.accept_again.is_some_and(|again| again <= now) {
            self.accept_again = None;
        }
        let open = self.accept_again.is_none() && self.connections() < self.max_connections;
        for (number, listener) in &mut self.listeners {
            if listener.is_watched != open {
                listener.is_watched = open;
                self.registrar
                    .modify(&listener.socket, *number, Interest::of(open, false));
            }
        }
    }

    fn take_in(&mut self, frame: Vec<u8>, now: Duration, out: &mut Vec<Vec<u8>>) {
        match Packet::parse(&frame, self.identity) {
            Some(Packet::Arp {
                sender,
                station,
                is_request,
            }) => {
                if let Some(stack) = self.stacks.get_mut(&sender) {
                    stack.learn(station, now);
                }
                if is_request {
                    out.push(responder::arp_reply(self.identity, station, sender));
                }
            }
            Some(Packet::Echo(request)) => {
                out.push(responder::echo_reply(self.identity, &frame, &request))
            }
            Some(Packet::Dhcp(payload)) => {
                let station = responder::source(&frame);
                if let Some(dhcp) = &mut self.dhcp {
                    out.extend(dhcp.answer(now, station, &payload));
                }
            }
            Some(Packet::Tcp(sender, segment)) => {
                if let Some(stack) = self.stacks.get_mut(&sender) {
                    stack.enqueue(frame, segment, now);
                }
            }
            None => {}
        }
    }

    /// Does what frames, connections and timers ask for; appends the frames that leave to `out`.
    pub(crate) fn poll(&mut self, now: Duration, out: &mut Vec<Vec<u8>>) {
        for frame in std::mem::take(&mut self.queue) {
            self.take_in(frame, now, out);
        }
        let moved = std::mem::take(&mut self.moved);
        let guests: Vec<Ipv4Addr> = self.stacks.keys().copied().collect();
        for guest in guests {
            let closed = self.guarded(guest, |stack, registrar| {
                let mut closed = stack.poll(now, registrar, out);
                if stack
                    .station()
                    .is_some_and(|station| moved.contains(&station))
                {
                    closed.extend(stack.retransmit_now(now, registrar, out));
                }
                closed
            });
            for number in closed.unwrap_or_default() {
                self.guests.remove(&number);
            }
        }
        let listened: Vec<Ipv4Addr> = self
            .listeners
            .values()
            .map(|listener| *listener.forward.to.ip())
            .collect();
        self.stacks
            .retain(|guest, stack| !stack.is_empty() || listened.contains(guest));
        self.watch_listeners(now);
    }

    /// How long the gateway has nothing to do by itself.
    pub(crate) fn timeout(&mut self, now: Duration) -> Option<Duration> {
        if !self.queue.is_empty() || !self.moved.is_empty() {
            return Some(Duration::ZERO);
        }
        let again = self.accept_again.map(|again| again.saturating_sub(now));
        let stacks = self
            .stacks
            .values_mut()
            .filter_map(|stack| stack.timeout(now));
        stacks.chain(again).min()
    }
}
