//! The switch's end of a `unix` port.
//!
//! The socket is never connected, so that a device can be replaced by another at once. What the
//! kernel lets wait differs: a device that is connected to this socket (Dunlin's) is limited by
//! this socket's send buffer, one that is not (QEMU) by a queue of some ten datagrams of its own.
//! Only a socket connected to such a device learns when it has room: the waiter below.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use crate::datagram::{self, BATCH, Incoming, Outgoing, SocketName};
use crate::forward::DropReason;
use crate::poll::{Interest, Registrar};
use crate::queue::FrameQueue;
use crate::unix_port::{bind_datagram, is_full};
use crate::{SwitchError, UnixConfig};

pub(super) const SOCKET: u32 = 0;
const WAITER: u32 = 1;

/// Why nothing is sent at the moment.
#[derive(Debug)]
enum Blocked {
    No,
    /// The send buffer is full: the socket is watched for writing.
    Buffer,
    /// The device's queue is full: this socket, connected to it, is watched for writing.
    Device(UnixDatagram),
}

#[derive(Debug)]
pub(super) struct UnixEnd {
    socket: UnixDatagram,
    path: PathBuf,
    /// The device's socket; learned unless it is configured.
    device: Option<SocketName>,
    is_configured: bool,
    queue: FrameQueue,
    blocked: Blocked,
    registrar: Registrar,
}

impl UnixEnd {
    pub(super) fn new(config: &UnixConfig, registrar: Registrar) -> Result<Self, SwitchError> {
        let path = config.path.display();
        let device = match &config.peer {
            Some(peer) => {
                Some(SocketName::unix(peer).map_err(SwitchError::io("use path", peer.display()))?)
            }
            None => None,
        };
        let socket = bind_datagram(&config.path).map_err(SwitchError::io("bind", path))?;
        let end = UnixEnd {
            socket,
            path: config.path.clone(),
            is_configured: device.is_some(),
            device,
            queue: FrameQueue::default(),
            blocked: Blocked::No,
            registrar,
        };
        let watched = end.registrar.add(&end.socket, SOCKET, Interest::Read);
        watched.map_err(SwitchError::io("watch", config.path.display()))?;
        Ok(end)
    }

    /// Where the device is, as far as the switch knows.
    pub(super) fn device(&self) -> Option<PathBuf> {
        self.device.as_ref().and_then(SocketName::unix_path)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Learns where the device is. True when that has changed, so that waiting frames can leave.
    pub(super) fn hear(&mut self, incoming: &Incoming<'_>) -> bool {
        if self.is_configured || self.device.as_ref() == Some(incoming.sender) {
            return false;
        }
        if incoming.sender.unix_path().is_none() {
            return false;
        }
        self.device = Some(*incoming.sender);
        self.unblock();
        true
    }

    pub(super) fn enqueue(&mut self, frame: &[u8]) -> Result<(), DropReason> {
        if self.device.is_none() {
            return Err(DropReason::PeerGone);
        }
        if self.queue.push(0, frame) {
            Ok(())
        } else {
            Err(DropReason::QueueFull)
        }
    }

    /// There is room again.
    pub(super) fn unblock(&mut self) {
        match std::mem::replace(&mut self.blocked, Blocked::No) {
            Blocked::No => {}
            Blocked::Buffer => self.registrar.modify(&self.socket, SOCKET, Interest::Read),
            // Closing it ends the watch.
            Blocked::Device(waiter) => drop(waiter),
        }
    }

    fn block(&mut self, device: &SocketName) {
        self.blocked = match self.watch_device(device) {
            Ok(waiter) => Blocked::Device(waiter),
            // It is connected to our socket and refuses others, so its queue is not the limit.
            Err(_refused) => {
                self.registrar.modify(&self.socket, SOCKET, Interest::Both);
                Blocked::Buffer
            }
        };
    }

    fn watch_device(&self, device: &SocketName) -> io::Result<UnixDatagram> {
        let path = device.unix_path().ok_or(io::ErrorKind::NotFound)?;
        let waiter = UnixDatagram::unbound()?;
        waiter.connect(path)?;
        self.registrar.add(&waiter, WAITER, Interest::Write)?;
        Ok(waiter)
    }

    /// Sends what it can. `lost` is told of each frame that cannot be sent at all.
    pub(super) fn flush(&mut self, mut lost: impl FnMut(usize, DropReason)) {
        while matches!(self.blocked, Blocked::No) && !self.queue.is_empty() {
            let Some(device) = self.device else {
                self.lose_all(&mut lost);
                return;
            };
            let mut messages = [Outgoing::EMPTY; BATCH];
            let mut count = 0;
            for (message, (_, frame)) in messages.iter_mut().zip(self.queue.iter()) {
                *message = Outgoing {
                    parts: [frame, &[]],
                    to: Some(&device),
                };
                count += 1;
            }
            match datagram::send_batch(self.socket.as_fd(), &messages[..count]) {
                Ok(sent) => {
                    for _ in 0..sent {
                        self.queue.pop();
                    }
                }
                Err(error) if is_full(&error) => self.block(&device),
                Err(error) => {
                    tracing::debug!(device = ?device, %error, "a port's device is gone");
                    if !self.is_configured {
                        self.device = None;
                    }
                    self.lose_all(&mut lost);
                }
            }
        }
    }

    fn lose_all(&mut self, lost: &mut impl FnMut(usize, DropReason)) {
        while let Some((_, length)) = self.queue.pop() {
            lost(length, DropReason::PeerGone);
        }
    }
}

impl Drop for UnixEnd {
    fn drop(&mut self) {
        remove_socket(&self.path);
    }
}

/// Removes the file of a socket that is about to be closed.
pub(super) fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::debug!(path = %path.display(), %error, "failed to remove a socket");
    }
}
