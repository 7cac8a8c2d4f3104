//! A fake guest: smoltcp over the device's end of a port.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{EthernetAddress, IpCidr};

use crate::poll::{Interest, Poller};
use crate::{Frame, MacAddress, Port, UnixPort};

pub(super) fn wait_readable(fd: &impl AsRawFd, patience: Duration) {
    let poller = Poller::new().unwrap();
    poller.add(fd.as_raw_fd(), 0, Interest::Read).unwrap();
    poller.wait(&mut Vec::new(), Some(patience)).unwrap();
}

#[derive(Default)]
pub(super) struct Wire {
    arrived: VecDeque<Vec<u8>>,
    leaving: Vec<Frame>,
}

pub(super) struct Rx(Vec<u8>);
pub(super) struct Tx<'a>(&'a mut Vec<Frame>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut bytes = vec![0; length];
        let result = f(&mut bytes);
        self.0.push(Frame { bytes });
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Rx, Tx<'_>)> {
        Some((Rx(self.arrived.pop_front()?), Tx(&mut self.leaving)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Tx<'_>> {
        (self.leaving.len() < 64).then_some(Tx(&mut self.leaving))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

pub(super) struct Guest {
    pub(super) port: UnixPort,
    pub(super) interface: Interface,
    pub(super) sockets: SocketSet<'static>,
    wire: Wire,
    started: Instant,
}

impl Guest {
    pub(super) fn new(port: UnixPort, mac: MacAddress, address: Option<Ipv4Addr>) -> Guest {
        let mut wire = Wire::default();
        let config = Config::new(EthernetAddress(mac.0).into());
        let mut interface = Interface::new(config, &mut wire, smoltcp::time::Instant::ZERO);
        if let Some(address) = address {
            interface.update_ip_addrs(|all| all.push(IpCidr::new(address.into(), 24)).unwrap());
        }
        Guest {
            port,
            interface,
            sockets: SocketSet::new(vec![]),
            wire,
            started: Instant::now(),
        }
    }

    pub(super) fn now(&self) -> smoltcp::time::Instant {
        let micros = self.started.elapsed().as_micros();
        smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap())
    }

    /// A listening socket.
    pub(super) fn listen(&mut self, port: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 64 << 10]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.listen(port).unwrap();
        self.sockets.add(socket)
    }

    pub(super) fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Receives, works and sends once.
    pub(super) fn step(&mut self) {
        let mut frames = Vec::new();
        self.port.receive(&mut frames, 256).unwrap();
        self.wire
            .arrived
            .extend(frames.into_iter().map(|frame| frame.bytes));
        let now = self.now();
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        let taken = self.port.send(&self.wire.leaving).unwrap();
        self.wire.leaving.drain(..taken);
    }

    /// Works until `done` says so; false when that takes longer than `patience`.
    pub(super) fn run(
        &mut self,
        patience: Duration,
        mut done: impl FnMut(&mut Guest) -> bool,
    ) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            self.step();
            if done(self) {
                self.step();
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            self.wait();
        }
    }

    /// Waits for a frame or a timer, a few milliseconds at most.
    fn wait(&mut self) {
        let now = self.now();
        let due = self.interface.poll_delay(now, &self.sockets);
        let due = due.map_or(5_000, |due| due.total_micros()).min(5_000);
        if due > 0 {
            wait_readable(&self.port.readiness(), Duration::from_micros(due));
        }
    }

    /// Serves until `stop`, calling `serve` for each socket after each step.
    pub(super) fn serve(
        &mut self,
        stop: &AtomicBool,
        mut serve: impl FnMut(&mut tcp::Socket<'static>),
    ) {
        while !stop.load(Ordering::Relaxed) {
            self.step();
            for (_, socket) in self.sockets.iter_mut() {
                if let smoltcp::socket::Socket::Tcp(socket) = socket {
                    serve(socket);
                }
            }
            self.step();
            self.wait();
        }
    }
}

/// Sends back what comes, closes when the other side does, and listens again.
pub(super) fn echo(port: u16) -> impl FnMut(&mut tcp::Socket<'static>) {
    move |socket| {
        while socket.can_recv() && socket.can_send() {
            let room = socket.send_capacity() - socket.send_queue();
            let bytes = socket.recv(|bytes| {
                let length = bytes.len().min(room);
                (length, bytes[..length].to_vec())
            });
            let sent = socket.send_slice(&bytes.unwrap()).unwrap();
            if room == 0 || sent == 0 {
                break;
            }
        }
        if socket.state() == tcp::State::CloseWait && !socket.can_recv() {
            socket.close();
        }
        if !socket.is_open() {
            socket.listen(port).unwrap();
        }
    }
}
