//! A device's end of a switch port over a unix datagram socket, one Ethernet frame a datagram.
//!
//! ```text
//!   bound, Down ──connect──▶ Up ──send refused, or the switch's socket was replaced──▶ Down
//! ```
//!
//! The socket is bound to a path of its own, by which the switch answers, and connected to the
//! switch's path: so nobody else's datagrams get in, and the kernel tells when the switch has
//! room again. A switch that starts again has a new socket at the old path. The port looks once a
//! second whether that happened, connects again, and, if it has spoken before, sends an empty
//! datagram from which the switch learns where to answer.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use crate::announce::announcement;
use crate::datagram::{self, BATCH, Outgoing, ReceiveBatch};
use crate::poll::{Interest, PeriodicTimer, Poller, Ready};
use crate::socket_option;
use crate::{Frame, MAX_FRAME, MacAddress, Port, PortError};

/// Bytes of destination, source and type.
const MIN_FRAME: usize = 14;

/// How often the port looks whether the switch's socket is still the one it is connected to.
const UPKEEP: Duration = Duration::from_secs(1);

const SOCKET: u64 = 0;
const TIMER: u64 = 1;

/// Tells apart the sockets that were bound to one path one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Incarnation {
    device: u64,
    inode: u64,
    /// Inode numbers are used again at once on some file systems.
    changed: (i64, i64),
}

impl Incarnation {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        Ok(Incarnation {
            device: metadata.dev(),
            inode: metadata.ino(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

/// What a port's end has carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UnixPortCounters {
    /// Frames handed to the switch.
    pub sent: u64,
    /// Frames that came from the switch.
    pub received: u64,
    /// Frames dropped because of their length, in either direction.
    pub dropped_length: u64,
    /// Times that the port connected again to a switch.
    pub reconnects: u64,
}

/// A device's end of a `unix` port of the switch. Send what a VM's network device sends into it.
#[derive(Debug)]
pub struct UnixPort {
    socket: Arc<UnixDatagram>,
    poller: Poller,
    timer: PeriodicTimer,
    local: PathBuf,
    /// Another process goes on with the socket and its path.
    given_away: Arc<AtomicBool>,
    switch: PathBuf,
    /// The switch's socket that this one is connected to.
    connected: Option<Incarnation>,
    /// The switch had no room: the socket is watched for writing too.
    blocked: bool,
    /// The switch has been told where this port is, so a new one has to be told as well.
    spoken: bool,
    announcement: Option<MacAddress>,
    batch: ReceiveBatch,
    /// Reused between looks.
    events: Vec<Ready>,
    counters: UnixPortCounters,
}

/// Reaches a port's socket while the port belongs to a device, to hand it to another process.
#[derive(Debug, Clone)]
pub struct PortSocket {
    socket: Arc<UnixDatagram>,
    local: PathBuf,
    given_away: Arc<AtomicBool>,
}

impl PortSocket {
    /// The socket, bound and connected. Frames that wait in it wait for whoever has a copy.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Where it is bound.
    #[must_use]
    pub fn local(&self) -> &Path {
        &self.local
    }

    /// Another process goes on with the socket: its path stays when this port is dropped.
    pub fn give_away(&self) {
        self.given_away.store(true, Ordering::Release);
    }

    /// Undoes [`PortSocket::give_away`]: the path is removed with this port.
    pub fn take_back(&self) {
        self.given_away.store(false, Ordering::Release);
    }
}

impl UnixPort {
    /// Binds a socket of its own, `NAME-PID-N.port` in `directory`, and connects it to the
    /// switch's socket at `switch`. Sends nothing: a VM that waits for its turn stays silent.
    ///
    /// The switch need not run yet: [`UnixPort::is_connected`] tells, and the port connects as
    /// soon as it does.
    ///
    /// # Errors
    /// [`PortError`] when the port's own socket cannot be made or bound.
    pub fn open(name: &str, directory: &Path, switch: &Path) -> Result<Self, PortError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let local = directory.join(format!("{name}-{}-{number}.port", std::process::id()));
        Self::open_at(&local, switch)
    }

    /// As [`UnixPort::open`], with the path of the port's own socket given. A socket that a
    /// process left there is replaced.
    ///
    /// # Errors
    /// [`PortError`] when the port's own socket cannot be made or bound.
    pub fn open_at(local: &Path, switch: &Path) -> Result<Self, PortError> {
        let failed = |action| {
            let port = local.display().to_string();
            move |source| PortError::Io {
                action,
                port,
                source,
            }
        };
        let socket = bind_datagram(local).map_err(failed("bind"))?;
        let mut port = Self::with_socket(socket, local, switch).map_err(failed("watch"))?;
        if let Err(error) = port.connect() {
            tracing::debug!(switch = %port.switch.display(), %error, "switch not there yet");
        }
        Ok(port)
    }

    /// Goes on with the socket of a port of another process, which is bound to a path in `directory`
    /// and may be connected. No frame is lost: what waits in the socket waits for this port. Until
    /// [`PortSocket::take_back`] its path stays when this port is dropped.
    ///
    /// # Errors
    /// [`PortError`] when it is no such socket, or cannot be watched.
    pub fn adopt(socket: UnixDatagram, directory: &Path, switch: &Path) -> Result<Self, PortError> {
        let failed = |action| {
            let port = switch.display().to_string();
            move |source| PortError::Io {
                action,
                port,
                source,
            }
        };
        let bound = socket.local_addr().map_err(failed("adopt"))?;
        let local = bound.as_pathname();
        let Some(local) = local.filter(|path| path.parent() == Some(directory)) else {
            let reason = "the socket that came is not bound where the port's should be";
            let error = io::Error::new(io::ErrorKind::InvalidInput, reason);
            return Err(failed("adopt")(error));
        };
        socket.set_nonblocking(true).map_err(failed("adopt"))?;
        let mut port = Self::with_socket(socket, local, switch).map_err(failed("watch"))?;
        port.given_away.store(true, Ordering::Release);
        // To the same socket of the switch it changes nothing, and to a new one it is due.
        match Incarnation::of(switch).and_then(|now| port.socket.connect(switch).map(|()| now)) {
            Ok(incarnation) => port.connected = Some(incarnation),
            Err(error) => {
                tracing::debug!(switch = %port.switch.display(), %error, "switch not there now");
            }
        }
        // The other process has spoken for it.
        port.spoken = true;
        Ok(port)
    }

    fn with_socket(socket: UnixDatagram, local: &Path, switch: &Path) -> io::Result<Self> {
        let (poller, timer) = watch(&socket)?;
        Ok(UnixPort {
            socket: Arc::new(socket),
            given_away: Arc::default(),
            poller,
            timer,
            local: local.to_owned(),
            switch: switch.to_owned(),
            connected: None,
            blocked: false,
            spoken: false,
            announcement: None,
            batch: ReceiveBatch::new(MAX_FRAME),
            events: Vec::new(),
            counters: UnixPortCounters::default(),
        })
    }

    /// Its socket, for another process.
    #[must_use]
    pub fn socket(&self) -> PortSocket {
        PortSocket {
            socket: Arc::clone(&self.socket),
            local: self.local.clone(),
            given_away: Arc::clone(&self.given_away),
        }
    }

    /// Path of the port's own socket: what a switch port calls its peer.
    #[must_use]
    pub fn local(&self) -> &Path {
        &self.local
    }

    /// True when a switch had its socket at the path at the last look.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected.is_some()
    }

    /// What this end has carried.
    #[must_use]
    pub fn counters(&self) -> UnixPortCounters {
        self.counters
    }

    fn error(&self, action: &'static str, source: io::Error) -> PortError {
        PortError::Io {
            action,
            port: self.switch.display().to_string(),
            source,
        }
    }

    fn connect(&mut self) -> io::Result<()> {
        self.connected = None;
        let incarnation = Incarnation::of(&self.switch)?;
        self.socket.connect(&self.switch)?;
        self.connected = Some(incarnation);
        if self.spoken {
            self.counters.reconnects += 1;
            // Full or gone again: the next frame tells the switch as well.
            let _told = self.socket.send(&[]);
        }
        Ok(())
    }

    /// Once a second: is the socket at the switch's path still the one we are connected to?
    fn upkeep(&mut self) {
        if !self.timer.take() {
            return;
        }
        let current = Incarnation::of(&self.switch).ok();
        if (current.is_none() || current != self.connected)
            && let Err(error) = self.connect()
        {
            tracing::trace!(switch = %self.switch.display(), %error, "switch not there");
        }
    }

    fn watch_writing(&mut self, blocked: bool) {
        if self.blocked == blocked {
            return;
        }
        let interest = if blocked {
            Interest::Both
        } else {
            Interest::Read
        };
        match self
            .poller
            .modify(self.socket.as_raw_fd(), SOCKET, interest)
        {
            Ok(()) => self.blocked = blocked,
            Err(error) => tracing::warn!(%error, "failed to watch a port's socket"),
        }
    }

    /// Ends the watch for writing when it has fired: the caller is awake and tries again.
    fn end_wake_up(&mut self) {
        if !self.blocked {
            return;
        }
        let looked = self.poller.wait(&mut self.events, Some(Duration::ZERO));
        let has_fired = self
            .events
            .iter()
            .any(|event| event.token == SOCKET && event.writable);
        if has_fired || looked.is_err() {
            self.watch_writing(false);
        }
    }

    /// Sends from the front of `messages`; connects once more when the switch was replaced.
    fn send_some(&mut self, messages: &[Outgoing<'_>]) -> io::Result<usize> {
        if self.connected.is_none() {
            self.connect()?;
        }
        match datagram::send_batch(self.socket.as_fd(), messages) {
            Err(error) if is_gone(&error) => {
                self.connect()?;
                datagram::send_batch(self.socket.as_fd(), messages)
            }
            other => other,
        }
    }

    fn send_announcement(&mut self) -> io::Result<()> {
        let Some(mac) = self.announcement else {
            return Ok(());
        };
        let frame = announcement(mac);
        self.send_some(&[Outgoing {
            parts: [&frame.bytes, &[]],
            to: None,
        }])?;
        self.announcement = None;
        self.spoken = true;
        self.counters.sent += 1;
        Ok(())
    }
}

/// True when the error says that the socket on the other side is no more.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotFound
    )
}

/// True when the other side has no room at the moment.
pub(crate) fn is_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// A non-blocking socket bound to `path`. A socket that nobody holds any more is replaced.
pub(crate) fn bind_datagram(path: &Path) -> io::Result<UnixDatagram> {
    if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        let refused = UnixDatagram::unbound()?.connect(path).err();
        if refused.is_none_or(|error| error.kind() != io::ErrorKind::ConnectionRefused) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        std::fs::remove_file(path)?;
    }
    let socket = UnixDatagram::bind(path)?;
    socket.set_nonblocking(true)?;
    socket_option::enlarge_buffers(socket.as_fd())?;
    Ok(socket)
}

fn watch(socket: &UnixDatagram) -> io::Result<(Poller, PeriodicTimer)> {
    let poller = Poller::new()?;
    let timer = PeriodicTimer::new(UPKEEP)?;
    poller.add(socket.as_raw_fd(), SOCKET, Interest::Read)?;
    poller.add(timer.as_raw_fd(), TIMER, Interest::Read)?;
    Ok((poller, timer))
}

impl Port for UnixPort {
    fn send(&mut self, frames: &[Frame]) -> Result<usize, PortError> {
        let mut taken = 0;
        while taken < frames.len() {
            // The frames up to the next one of a wrong length go out in one call.
            let fits = |frame: &&Frame| (MIN_FRAME..=MAX_FRAME).contains(&frame.bytes.len());
            let mut messages = [Outgoing::EMPTY; BATCH];
            let mut count = 0;
            for (message, frame) in messages
                .iter_mut()
                .zip(frames[taken..].iter().take_while(fits))
            {
                message.parts[0] = &frame.bytes;
                count += 1;
            }
            if count == 0 {
                self.counters.dropped_length += 1;
                taken += 1;
                continue;
            }
            let sent = match self.send_announcement() {
                Ok(()) => self.send_some(&messages[..count]),
                Err(error) => Err(error),
            };
            match sent {
                Ok(sent) => {
                    self.spoken = true;
                    self.counters.sent += sent as u64;
                    taken += sent;
                }
                Err(error) if is_full(&error) => {
                    self.watch_writing(true);
                    return Ok(taken);
                }
                // What left before is reported first; the error comes again with the next call.
                Err(_) if taken > 0 => return Ok(taken),
                Err(error) => return Err(self.error("send to", error)),
            }
        }
        if !frames.is_empty() && self.announcement.is_none() {
            self.watch_writing(false);
        }
        Ok(taken)
    }

    fn receive(&mut self, into: &mut Vec<Frame>, limit: usize) -> Result<usize, PortError> {
        self.end_wake_up();
        self.upkeep();
        if self.announcement.is_some()
            && let Err(error) = self.send_announcement()
            && is_full(&error)
        {
            self.watch_writing(true);
        }
        let mut total = 0;
        while total < limit {
            let wanted = (limit - total).min(BATCH);
            let count = match self.batch.receive(self.socket.as_fd(), wanted) {
                Ok(count) => count,
                // The switch went away: upkeep connects again, and nothing waits until then.
                Err(error) if is_gone(&error) => 0,
                Err(error) => return Err(self.error("receive from", error)),
            };
            for incoming in self.batch.datagrams() {
                if incoming.truncated || (1..MIN_FRAME).contains(&incoming.bytes.len()) {
                    self.counters.dropped_length += 1;
                } else if !incoming.bytes.is_empty() {
                    into.push(Frame {
                        bytes: incoming.bytes.to_vec(),
                    });
                    total += 1;
                }
            }
            if count < wanted {
                break;
            }
        }
        self.counters.received += total as u64;
        Ok(total)
    }

    fn readiness(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    fn announce(&mut self, mac: MacAddress) -> Result<(), PortError> {
        self.announcement = Some(mac);
        match self.send_announcement() {
            Ok(()) => Ok(()),
            Err(error) if is_full(&error) => {
                self.watch_writing(true);
                Ok(())
            }
            Err(error) => Err(self.error("announce on", error)),
        }
    }
}

impl Drop for UnixPort {
    fn drop(&mut self) {
        if !self.given_away.load(Ordering::Acquire)
            && let Err(error) = std::fs::remove_file(&self.local)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(path = %self.local.display(), %error, "failed to remove a port's socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(fill: u8, length: usize) -> Frame {
        Frame {
            bytes: vec![fill; length],
        }
    }

    fn is_readable(port: &UnixPort) -> bool {
        let outer = Poller::new().unwrap();
        outer
            .add(port.readiness().as_raw_fd(), 7, Interest::Read)
            .unwrap();
        let mut ready = Vec::new();
        outer.wait(&mut ready, Some(Duration::ZERO)).unwrap();
        !ready.is_empty()
    }

    #[test]
    fn frames_pass_both_ways_and_the_path_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let switch = bind_datagram(&path).unwrap();
        let mut port = UnixPort::open("vm", directory.path(), &path).unwrap();
        assert!(port.is_connected());
        assert!(!is_readable(&port));
        assert_eq!(port.send(&[frame(1, 60), frame(2, 1514)]).unwrap(), 2);
        let mut buffer = [0; 2048];
        let (length, sender) = switch.recv_from(&mut buffer).unwrap();
        assert_eq!((length, buffer[0]), (60, 1));
        assert_eq!(sender.as_pathname().unwrap(), port.local());
        assert_eq!(switch.recv(&mut buffer).unwrap(), 1514);

        switch.send_to(&[9; 100], port.local()).unwrap();
        assert!(is_readable(&port));
        let mut frames = Vec::new();
        assert_eq!(port.receive(&mut frames, 10).unwrap(), 1);
        assert_eq!(frames, [frame(9, 100)]);
        assert!(!is_readable(&port));

        let local = port.local().to_owned();
        drop(port);
        assert!(!local.exists());
    }

    #[test]
    fn frames_of_a_wrong_length_are_taken_and_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let switch = bind_datagram(&path).unwrap();
        let mut port = UnixPort::open("vm", directory.path(), &path).unwrap();
        let batch = [
            frame(0, 13),
            frame(1, 60),
            frame(2, MAX_FRAME + 1),
            frame(3, MAX_FRAME),
        ];
        assert_eq!(port.send(&batch).unwrap(), 4);
        let mut buffer = [0; 2048];
        assert_eq!(switch.recv(&mut buffer).unwrap(), 60);
        assert_eq!(switch.recv(&mut buffer).unwrap(), MAX_FRAME);
        switch.send_to(&[5; MAX_FRAME + 1], port.local()).unwrap();
        switch.send_to(&[5; 3], port.local()).unwrap();
        switch.send_to(&[], port.local()).unwrap();
        let mut frames = Vec::new();
        assert_eq!(port.receive(&mut frames, 10).unwrap(), 0);
        assert_eq!(port.counters().dropped_length, 4);
    }

    #[test]
    fn a_full_switch_refuses_frames_and_readiness_says_when_to_try_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let switch = bind_datagram(&path).unwrap();
        let mut port = UnixPort::open("vm", directory.path(), &path).unwrap();
        let batch = vec![frame(1, 1514); 10_000];
        let mut frames = Vec::new();
        let taken = port.send(&batch).unwrap();
        assert!(taken < batch.len());
        assert_eq!(port.send(&batch).unwrap(), 0);
        assert!(
            !is_readable(&port),
            "nothing to do while the switch is full"
        );
        let mut buffer = [0; 2048];
        for _ in 0..taken {
            switch.recv(&mut buffer).unwrap();
        }
        assert!(is_readable(&port));
        assert_eq!(port.receive(&mut frames, 1).unwrap(), 0);
        assert!(!is_readable(&port), "a wake-up is told once");
        assert!(port.send(&batch).unwrap() > 0);
    }

    #[test]
    fn a_port_speaks_again_to_a_switch_that_starts_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let mut port = UnixPort::open("vm", directory.path(), &path).unwrap();
        assert!(!port.is_connected());
        assert!(port.send(&[frame(1, 60)]).is_err());
        for round in 0..3 {
            let switch = bind_datagram(&path).unwrap();
            assert_eq!(port.send(&[frame(round, 60)]).unwrap(), 1);
            let mut buffer = [0; 2048];
            let mut length = switch.recv(&mut buffer).unwrap();
            if round > 0 {
                assert_eq!(length, 0, "the empty datagram comes first");
                length = switch.recv(&mut buffer).unwrap();
            }
            assert_eq!((length, buffer[0]), (60, round));
        }
    }

    #[test]
    fn a_silent_port_finds_the_new_switch_by_itself() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let first = bind_datagram(&path).unwrap();
        let mut port = UnixPort::open("vm", directory.path(), &path).unwrap();
        port.send(&[frame(1, 60)]).unwrap();
        drop(first);
        let second = bind_datagram(&path).unwrap();
        // The wait is on the port's own descriptor, which the upkeep timer makes readable.
        let outer = Poller::new().unwrap();
        outer
            .add(port.readiness().as_raw_fd(), 0, Interest::Read)
            .unwrap();
        let mut ready = Vec::new();
        outer
            .wait(&mut ready, Some(Duration::from_secs(10)))
            .unwrap();
        assert!(!ready.is_empty());
        assert_eq!(port.receive(&mut Vec::new(), 1).unwrap(), 0);
        let mut buffer = [0; 64];
        let (length, sender) = second.recv_from(&mut buffer).unwrap();
        assert_eq!(length, 0);
        assert_eq!(sender.as_pathname().unwrap(), port.local());
        second.send_to(&[1; 60], port.local()).unwrap();
        assert_eq!(port.receive(&mut Vec::new(), 1).unwrap(), 1);
    }

    #[test]
    fn an_announcement_is_a_reverse_arp_broadcast() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let switch = bind_datagram(&path).unwrap();
        let mut port = UnixPort::open("vm", directory.path(), &path).unwrap();
        let mac = MacAddress([2, 0, 0, 0, 0, 5]);
        port.announce(mac).unwrap();
        let mut buffer = [0; 128];
        assert_eq!(switch.recv(&mut buffer).unwrap(), 60);
        assert_eq!(buffer[..6], [0xff; 6]);
        assert_eq!(buffer[6..12], mac.0);
        assert_eq!(buffer[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    }

    #[test]
    fn an_adopted_socket_loses_no_frame_and_keeps_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let switch = bind_datagram(&path).unwrap();
        let old = UnixPort::open("vm", directory.path(), &path).unwrap();
        let local = old.local().to_owned();
        switch.send_to(&[1; 60], &local).unwrap();
        let socket = old.socket();
        let copy = socket.descriptor().try_clone_to_owned().unwrap();
        let mut new = UnixPort::adopt(copy.into(), directory.path(), &path).unwrap();
        socket.give_away();
        drop(old);
        switch.send_to(&[2; 60], &local).unwrap();
        let mut frames = Vec::new();
        assert_eq!(new.receive(&mut frames, 10).unwrap(), 2);
        assert_eq!(frames, [frame(1, 60), frame(2, 60)]);
        assert_eq!(new.send(&[frame(3, 60)]).unwrap(), 1);
        let mut buffer = [0; 64];
        assert_eq!(switch.recv(&mut buffer).unwrap(), 60);
        // Not given the guest after all: the path is the old process's.
        drop(new);
        assert!(local.exists());
    }

    #[test]
    fn another_socket_than_the_ports_is_not_adopted() {
        let directory = tempfile::tempdir().unwrap();
        let other = bind_datagram(&directory.path().join("other")).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let switch = directory.path().join("switch");
        let error = UnixPort::adopt(other, elsewhere.path(), &switch).unwrap_err();
        assert!(std::error::Error::source(&error).is_some());
    }
}
