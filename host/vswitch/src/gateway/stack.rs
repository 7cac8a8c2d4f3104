//! A TCP/IP stack for the connections to one guest.
//!
//! smoltcp waits at least one second before it sends lost bytes again (RFC 6298 asks for that on
//! the Internet). On a switch between processes that would make a blackout of a few milliseconds
//! one of a second, so the stack's clock runs [`CLOCK_RATE`] times as fast as the host's: all its
//! times are shorter by this factor (retransmission from 50 ms, ARP again after 50 ms, TIME-WAIT
//! for half a second). When the guest moves, the clock jumps to the moment at which lost bytes
//! are due: they leave with the first frame that shows the new place.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

use super::Identity;
use super::connection::{Call, Connection, Outcome};
use super::responder::{Segment, arp_frame};
use crate::poll::{Ready, Registrar};
use crate::{ForwardConfig, MacAddress};

/// How much faster than the host's the stack's clock runs.
const CLOCK_RATE: u64 = 20;

/// Bytes each way that a connection holds.
const BUFFER: usize = 64 << 10;

/// Frames that leave in one poll, so that queues behind can follow.
const BURST: usize = 128;

/// Ethernet header and 1500 bytes.
const MTU: usize = 1514;

/// Turns of "the stack, then the connections" in one poll.
const TURNS: usize = 8;

/// Retransmissions brought forward by one move.
const JUMPS: usize = 64;

/// First of the ports from which the gateway calls guests.
const FIRST_PORT: u16 = 49152;

/// How long a guest that was heard is believed to be where it was, as on any host. The stack
/// itself would forget it [`CLOCK_RATE`] times sooner and fill the network with questions.
const STATION_LIFETIME: Duration = Duration::from_secs(60);

/// How often the stack is reminded.
const REMINDER: Duration = Duration::from_secs(1);

/// Questions for a guest's station that may leave at once; after that one a second.
const QUESTIONS: u32 = 10;

/// The stack's side of the switch port.
#[derive(Debug, Default)]
struct Wire {
    incoming: VecDeque<Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
}

struct Arrived(Vec<u8>);
struct Leaving<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.push(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Arrived, Leaving<'_>)> {
        if self.outgoing.len() >= BURST {
            return None;
        }
        Some((
            Arrived(self.incoming.pop_front()?),
            Leaving(&mut self.outgoing),
        ))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Leaving<'_>> {
        (self.outgoing.len() < BURST).then_some(Leaving(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

fn is_arp(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x08, 0x06])
}

/// See the module.
pub(super) struct GuestStack {
    identity: Identity,
    guest: Ipv4Addr,
    station: Option<MacAddress>,
    heard: Duration,
    reminded: Duration,
    questions: u32,
    asked: Duration,
    interface: Interface,
    sockets: SocketSet<'static>,
    wire: Wire,
    connections: BTreeMap<u32, Connection>,
    /// By how much the clock has been put forward, in its own time.
    jumped: smoltcp::time::Duration,
    next_port: u16,
}

impl std::fmt::Debug for GuestStack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestStack")
            .field("guest", &self.guest)
            .field("connections", &self.connections.len())
            .finish_non_exhaustive()
    }
}

impl GuestStack {
    pub(super) fn new(identity: Identity, guest: Ipv4Addr) -> Self {
        let mut wire = Wire::default();
        let address = HardwareAddress::Ethernet(EthernetAddress(identity.mac.0));
        let mut config = Config::new(address);
        // Sequence numbers must not be guessed; the standard library's hash keys are random.
        config.random_seed = RandomState::new().hash_one(u32::from(guest));
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let own = IpCidr::new(IpAddress::Ipv4(identity.address), identity.prefix);
            addresses
                .push(own)
                .expect("a new interface has room for one address");
        });
        GuestStack {
            identity,
            guest,
            station: None,
            heard: Duration::ZERO,
            reminded: Duration::ZERO,
            questions: QUESTIONS,
            asked: Duration::ZERO,
            interface,
            sockets: SocketSet::new(Vec::new()),
            wire,
            connections: BTreeMap::new(),
            jumped: smoltcp::time::Duration::ZERO,
            next_port: FIRST_PORT,
        }
    }

    fn clock(&self, now: Duration) -> Instant {
        let micros = i64::try_from(now.as_micros()).unwrap_or(i64::MAX / 2);
        Instant::from_micros(micros.saturating_mul(CLOCK_RATE.cast_signed())) + self.jumped
    }

    /// Connections whose host side is open.
    pub(super) fn connections(&self) -> usize {
        self.connections
            .values()
            .filter(|connection| connection.has_host())
            .count()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    pub(super) fn station(&self) -> Option<MacAddress> {
        self.station
    }

    /// The guest has said which station it is.
    pub(super) fn learn(&mut self, station: MacAddress, now: Duration) {
        self.station = Some(station);
        self.heard = now;
        self.remind(now);
    }

    /// Tells the stack where the guest is, as if the guest had.
    fn remind(&mut self, now: Duration) {
        let Some(station) = self.station else { return };
        self.reminded = now;
        let own = (self.identity.mac, self.identity.address);
        self.wire
            .incoming
            .push_back(arp_frame((station, self.guest), own));
    }

    /// Hands over what the stack sent, without questions beyond their rate.
    fn release(&mut self, now: Duration, out: &mut Vec<Vec<u8>>) {
        let seconds = u32::try_from(now.saturating_sub(self.asked).as_secs()).unwrap_or(u32::MAX);
        self.questions = self.questions.saturating_add(seconds).min(QUESTIONS);
        self.asked += Duration::from_secs(u64::from(seconds));
        for frame in self.wire.outgoing.drain(..) {
            if is_arp(&frame) {
                let Some(left) = self.questions.checked_sub(1) else {
                    continue;
                };
                self.questions = left;
            }
            out.push(frame);
        }
    }

    /// A frame with a TCP segment from the guest.
    pub(super) fn enqueue(&mut self, frame: Vec<u8>, segment: Segment, now: Duration) {
        // A SYN of its own for a connection that we open: guests do not do that, and smoltcp
        // 0.14.0 panics when it comes before our SYN has left.
        let is_ours = |connection: &Connection| connection.gateway_port() == segment.gateway_port;
        if segment.is_bare_syn && self.connections.values().any(is_ours) {
            return;
        }
        self.heard = now;
        for connection in self.connections.values_mut() {
            connection.guest_heard(now);
        }
        self.wire.incoming.push_back(frame);
    }

    fn free_port(&mut self) -> u16 {
        // There are far fewer connections than ports.
        loop {
            let port = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if self
                .connections
                .values()
                .all(|connection| connection.gateway_port() != port)
            {
                return port;
            }
        }
    }

    /// Leads a connection of the host, with descriptor `number`, to the guest.
    pub(super) fn connect(
        &mut self,
        (number, host): (u32, TcpStream),
        forward: &ForwardConfig,
        registrar: &Registrar,
        now: Duration,
    ) -> io::Result<()> {
        let port = self.free_port();
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        // Small requests must not wait for the acknowledgement of others, nor the guest for ours.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let called = socket.connect(
            self.interface.context(),
            (self.guest, forward.to.port()),
            port,
        );
        called.map_err(|error| io::Error::other(error.to_string()))?;
        let handle = self.sockets.add(socket);
        let call = Call {
            number,
            gateway_port: port,
            listen: forward.listen,
        };
        match Connection::new(host, handle, call, registrar, now) {
            Ok(connection) => drop(self.connections.insert(number, connection)),
            Err(error) => {
                self.sockets.remove(handle);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Resets the host's side of all connections, without touching the stack.
    pub(super) fn abandon(&mut self) {
        for connection in self.connections.values_mut() {
            connection.reset_host();
        }
    }

    /// Resets the connections that came in at `listen`.
    pub(super) fn reset(&mut self, listen: SocketAddr) {
        for connection in self.connections.values_mut() {
            if connection.listen() == listen {
                connection.reset(self.sockets.get_mut(connection.socket()));
            }
        }
    }

    /// The host side of a connection became ready.
    pub(super) fn host_ready(&mut self, number: u32, ready: Ready, registrar: &Registrar) {
        if let Some(connection) = self.connections.get_mut(&number) {
            let socket = self.sockets.get_mut(connection.socket());
            connection.host_ready(ready, socket, registrar);
        }
    }

    /// Lets stack and connections work until nothing is left to do or a burst has left; returns
    /// the numbers of connections that are over.
    pub(super) fn poll(
        &mut self,
        now: Duration,
        registrar: &Registrar,
        out: &mut Vec<Vec<u8>>,
    ) -> Vec<u32> {
        let mut closed = Vec::new();
        let is_believed = now.saturating_sub(self.heard) < STATION_LIFETIME;
        if is_believed && now.saturating_sub(self.reminded) >= REMINDER {
            self.remind(now);
        }
        for _turn in 0..TURNS {
            let clock = self.clock(now);
            // Bytes from the host first, so that they leave in this turn.
            let mut is_busy = self.pump(now, registrar, &mut closed);
            let polled = self
                .interface
                .poll(clock, &mut self.wire, &mut self.sockets);
            is_busy |= polled == PollResult::SocketStateChanged;
            if !is_busy || self.wire.outgoing.len() >= BURST {
                break;
            }
        }
        self.pump(now, registrar, &mut closed);
        self.release(now, out);
        closed
    }

    /// True when a connection did something that the stack should see.
    fn pump(&mut self, now: Duration, registrar: &Registrar, closed: &mut Vec<u32>) -> bool {
        let mut is_busy = false;
        let sockets = &mut self.sockets;
        self.connections.retain(|number, connection| {
            let socket = sockets.get_mut(connection.socket());
            match connection.pump(socket, registrar, now) {
                Outcome::Idle => true,
                Outcome::Busy => {
                    is_busy = true;
                    true
                }
                Outcome::Over => {
                    sockets.remove(connection.socket());
                    closed.push(*number);
                    false
                }
            }
        });
        is_busy
    }

    /// The guest is somewhere else: sends again at once what has not been acknowledged.
    pub(super) fn retransmit_now(
        &mut self,
        now: Duration,
        registrar: &Registrar,
        out: &mut Vec<Vec<u8>>,
    ) -> Vec<u32> {
        let mut closed = Vec::new();
        let waiting = self.connections.values().filter(|connection| {
            let socket: &tcp::Socket<'_> = self.sockets.get(connection.socket());
            socket.send_queue() > 0 || socket.state() == tcp::State::SynSent
        });
        for _connection in 0..waiting.count().min(JUMPS) {
            let Some(due) = self.interface.poll_delay(self.clock(now), &self.sockets) else {
                break;
            };
            self.jumped += due;
            // The jump must not make the stack forget where the guest is.
            self.remind(now);
            closed.extend(self.poll(now, registrar, out));
        }
        closed
    }

    /// How long nothing is due.
    pub(super) fn timeout(&mut self, now: Duration) -> Option<Duration> {
        if !self.wire.incoming.is_empty() {
            return Some(Duration::ZERO);
        }
        let clock = self.clock(now);
        let stack = self.interface.poll_delay(clock, &self.sockets);
        let stack =
            stack.map(|delay| Duration::from_micros(delay.total_micros().div_ceil(CLOCK_RATE)));
        let connections = self
            .connections
            .values()
            .filter_map(|connection| connection.deadline());
        stack
            .into_iter()
            .chain(connections.map(|deadline| deadline.saturating_sub(now)))
            .min()
    }
}
