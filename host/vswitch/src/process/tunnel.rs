//! A `tunnel` port: one UDP socket, and a lane for each other switch. Each lane is a port of
//! the forwarding core, so that stations are learned behind the switch where they are.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use crate::datagram::{self, BATCH, Incoming, Outgoing, SocketName};
use crate::forward::DropReason;
use crate::poll::{Interest, Registrar};
use crate::queue::FrameQueue;
use crate::unix_port::is_full;
use crate::{SwitchError, TunnelConfig, socket_option, vxlan};

pub(super) const SOCKET: u32 = 0;

/// Network identifiers have 24 bits.
const VNI_LIMIT: u32 = 1 << 24;

#[derive(Debug)]
pub(super) struct TunnelEnd {
    socket: UdpSocket,
    vni: u32,
    header: [u8; vxlan::HEADER],
    remotes: Vec<(SocketAddr, SocketName)>,
    queue: FrameQueue,
    is_blocked: bool,
    /// Packets from nobody that is configured.
    strays: u64,
    registrar: Registrar,
}

/// What a packet brought.
pub(super) enum Arrival<'a> {
    Frame(usize, &'a [u8]),
    /// From a known switch, but to be dropped.
    Rejected(usize, DropReason),
    Stray,
}

fn check(config: &TunnelConfig) -> Result<(), &'static str> {
    if config.vni >= VNI_LIMIT {
        return Err("the network identifier has more than 24 bits");
    }
    if config.remotes.is_empty() {
        return Err("a tunnel needs a remote");
    }
    for (index, remote) in config.remotes.iter().enumerate() {
        if remote.0.is_ipv4() != config.local.0.is_ipv4() {
            return Err("local and remote addresses are of different families");
        }
        if *remote == config.local || config.remotes[..index].contains(remote) {
            return Err("a remote is given twice, or is this switch itself");
        }
    }
    Ok(())
}

impl TunnelEnd {
    pub(super) fn new(
        name: &str,
        config: &TunnelConfig,
        registrar: Registrar,
    ) -> Result<Self, SwitchError> {
        check(config).map_err(|reason| SwitchError::Invalid {
            port: name.to_owned(),
            reason: reason.to_owned(),
        })?;
        let local = config.local.0;
        let socket = UdpSocket::bind(local).map_err(SwitchError::io("bind tunnel to", local))?;
        let prepared = (|| {
            socket.set_nonblocking(true)?;
            socket_option::enlarge_buffers(socket.as_fd())?;
            socket_option::allow_fragments(socket.as_fd(), local.is_ipv4())?;
            registrar.add(&socket, SOCKET, Interest::Read)
        })();
        prepared.map_err(SwitchError::io("prepare tunnel at", local))?;
        let remotes = config.remotes.iter();
        Ok(TunnelEnd {
            socket,
            vni: config.vni,
            header: vxlan::header(config.vni),
            remotes: remotes
                .map(|remote| (remote.0, SocketName::internet(remote.0)))
                .collect(),
            queue: FrameQueue::default(),
            is_blocked: false,
            strays: 0,
            registrar,
        })
    }

    /// The other switches, in the order of lanes.
    pub(super) fn remotes(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.remotes.iter().map(|(address, _)| *address)
    }

    pub(super) fn strays(&self) -> u64 {
        self.strays
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn arrival<'a>(&mut self, incoming: &Incoming<'a>) -> Arrival<'a> {
        let Some(lane) = incoming
            .sender
            .internet_address()
            .and_then(|from| self.lane(from))
        else {
            self.strays += 1;
            return Arrival::Stray;
        };
        if incoming.truncated {
            return Arrival::Rejected(lane, DropReason::TooLong);
        }
        match vxlan::frame(incoming.bytes, self.vni) {
            Some(frame) => Arrival::Frame(lane, frame),
            None => Arrival::Rejected(lane, DropReason::Encapsulation),
        }
    }

    /// A switch may send from any port (RFC 7348 asks for that), so its address alone counts
    /// unless it is shared.
    fn lane(&self, from: SocketAddr) -> Option<usize> {
        let exact = self.remotes.iter().position(|(remote, _)| *remote == from);
        exact.or_else(|| {
            let mut same = self
                .remotes
                .iter()
                .enumerate()
                .filter(|(_, (remote, _))| remote.ip() == from.ip());
            match (same.next(), same.next()) {
                (Some((lane, _)), None) => Some(lane),
                _ => None,
            }
        })
    }

    pub(super) fn enqueue(&mut self, lane: usize, frame: &[u8]) -> Result<(), DropReason> {
        if self.queue.push(lane, frame) {
            Ok(())
        } else {
            Err(DropReason::QueueFull)
        }
    }

    /// There is room again.
    pub(super) fn unblock(&mut self) {
        if std::mem::take(&mut self.is_blocked) {
            self.registrar.modify(&self.socket, SOCKET, Interest::Read);
        }
    }

    /// Sends what it can. `lost` is told lane and length of each frame that cannot be sent.
    pub(super) fn flush(&mut self, mut lost: impl FnMut(usize, usize, DropReason)) {
        while !self.is_blocked && !self.queue.is_empty() {
            let mut messages = [Outgoing::EMPTY; BATCH];
            let mut count = 0;
            for (message, (lane, frame)) in messages.iter_mut().zip(self.queue.iter()) {
                let to = self.remotes.get(lane).map(|(_, name)| name);
                *message = Outgoing {
                    parts: [&self.header, frame],
                    to,
                };
                count += 1;
            }
            match datagram::send_batch(self.socket.as_fd(), &messages[..count]) {
                Ok(sent) => {
                    for _ in 0..sent {
                        self.queue.pop();
                    }
                }
                Err(error) if is_full(&error) => {
                    self.is_blocked = true;
                    self.registrar.modify(&self.socket, SOCKET, Interest::Both);
                }
                // Of this one only: the next may go to another switch.
                Err(error) => {
                    tracing::debug!(%error, "a tunnel's remote cannot be reached");
                    if let Some((lane, length)) = self.queue.pop() {
                        lost(lane, length, DropReason::PeerGone);
                    }
                }
            }
        }
    }
}
