//! One forwarded connection: a TCP connection of the host spliced to one of the guest's stack.
//!
//! Bytes move only when the other side has room, so each side's window slows down the other one.
//! The ends are told apart: an end of one side becomes an end of the other, a reset a reset.
//!
//! ```text
//!  host ends ──▶ FIN to the guest      guest ends ──▶ shutdown of the host's write side
//!  host resets or fails ──▶ RST        guest resets, or never answers ──▶ reset
//! ```

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State};

use crate::poll::{Interest, Ready, Registrar};
use crate::socket_option::reset_on_close;

/// How long a guest may take to accept.
const CONNECT_TIME: Duration = Duration::from_secs(20);

/// How long a guest may leave bytes without acknowledgement, as it does while it is paused.
const SILENCE: Duration = Duration::from_secs(15 * 60);

/// The same when the host's side has ended, so that nobody may be waiting any more.
const SILENCE_AFTER_END: Duration = Duration::from_secs(60);

/// What a turn of a connection came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Idle,
    /// The stack has something to do.
    Busy,
    /// Both sides are done.
    Over,
}

/// Which connection it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    /// Of the host's descriptor.
    pub(super) number: u32,
    /// From which the gateway calls the guest.
    pub(super) gateway_port: u16,
    /// Where the host listens.
    pub(super) listen: SocketAddr,
}

#[derive(Debug)]
pub(super) struct Connection {
    /// Gone when the host's side is done; the stack may still be closing.
    host: Option<TcpStream>,
    socket: SocketHandle,
    number: u32,
    gateway_port: u16,
    listen: SocketAddr,
    opened: Duration,
    heard: Duration,
    is_readable: bool,
    is_writable: bool,
    /// `None` when the descriptor is no longer watched: both directions ended or failed, so it
    /// would be ready for ever.
    watched: Option<Interest>,
    has_host_ended: bool,
    has_guest_ended: bool,
    is_host_shut: bool,
    was_established: bool,
    is_reset: bool,
}

impl Connection {
    pub(super) fn new(
        host: TcpStream,
        socket: SocketHandle,
        call: Call,
        registrar: &Registrar,
        now: Duration,
    ) -> io::Result<Self> {
        let Call {
            number,
            gateway_port,
            listen,
        } = call;
        host.set_nonblocking(true)?;
        host.set_nodelay(true)?;
        // Reading starts when the guest has accepted.
        registrar.add(&host, number, Interest::Nothing)?;
        Ok(Connection {
            host: Some(host),
            socket,
            number,
            gateway_port,
            listen,
            opened: now,
            heard: now,
            is_readable: true,
            is_writable: true,
            watched: Some(Interest::Nothing),
            has_host_ended: false,
            has_guest_ended: false,
            is_host_shut: false,
            was_established: false,
            is_reset: false,
        })
    }

    pub(super) fn socket(&self) -> SocketHandle {
        self.socket
    }

    pub(super) fn gateway_port(&self) -> u16 {
        self.gateway_port
    }

    pub(super) fn listen(&self) -> SocketAddr {
        self.listen
    }

    pub(super) fn has_host(&self) -> bool {
        self.host.is_some()
    }

    pub(super) fn guest_heard(&mut self, now: Duration) {
        self.heard = now;
    }

    /// When the connection is given up unless something happens.
    pub(super) fn deadline(&self) -> Option<Duration> {
        (!self.was_established && self.has_host()).then_some(self.opened + CONNECT_TIME)
    }

    /// Ends both sides at once.
    pub(super) fn reset(&mut self, socket: &mut Socket<'_>) {
        socket.abort();
        self.is_reset = true;
        self.reset_host();
    }

    /// Ends the host's side at once.
    pub(super) fn reset_host(&mut self) {
        if let Some(host) = self.host.take() {
            // Without it the host's peer sees an orderly end: worse, but an end.
            let _unsupported = reset_on_close(host.as_fd());
        }
    }

    pub(super) fn host_ready(
        &mut self,
        ready: Ready,
        socket: &mut Socket<'_>,
        registrar: &Registrar,
    ) {
        let Some(host) = &self.host else { return };
        self.is_readable |= ready.readable || ready.broken;
        self.is_writable |= ready.writable || ready.broken;
        if !ready.broken {
            return;
        }
        match host.take_error() {
            Ok(None) => {
                // Both directions ended: the rest is read without being told of it.
                registrar.remove(host);
                self.watched = None;
            }
            Ok(Some(_)) | Err(_) => self.reset(socket),
        }
    }

    /// Moves what can be moved.
    pub(super) fn pump(
        &mut self,
        socket: &mut Socket<'_>,
        registrar: &Registrar,
        now: Duration,
    ) -> Outcome {
        if self.host.is_none() {
            // A reset leaves with the poll after it.
            let is_done = socket.state() == State::Closed && !std::mem::take(&mut self.is_reset);
            return if is_done {
                Outcome::Over
            } else {
                Outcome::Idle
            };
        }
        self.note_state(socket);
        let is_unanswered = socket.send_queue() > 0
            || matches!(
                socket.state(),
                State::FinWait1 | State::LastAck | State::Closing
            );
        let patience = if self.has_host_ended {
            SILENCE_AFTER_END
        } else {
            SILENCE
        };
        let is_silent = is_unanswered && now.saturating_sub(self.heard) >= patience;
        let overdue = is_silent || self.deadline().is_some_and(|deadline| deadline <= now);
        if overdue {
            self.reset(socket);
            return Outcome::Busy;
        }
        let moved = self
            .pull_from_host(socket)
            .and_then(|from| Ok(self.push_to_host(socket)? | from));
        let Ok(is_busy) = moved else {
            self.reset(socket);
            return Outcome::Busy;
        };
        let is_closed = matches!(socket.state(), State::Closed | State::TimeWait);
        if is_closed && self.has_host_ended && self.is_host_shut {
            self.host = None;
            return Outcome::Busy;
        }
        if socket.state() == State::Closed && !(self.has_guest_ended && self.has_host_ended) {
            self.reset(socket);
            return Outcome::Busy;
        }
        self.watch(socket, registrar);
        if is_busy {
            Outcome::Busy
        } else {
            Outcome::Idle
        }
    }

    fn note_state(&mut self, socket: &Socket<'_>) {
        let state = socket.state();
        self.was_established |= !matches!(state, State::SynSent | State::Closed);
        self.has_guest_ended |= matches!(
            state,
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait
        );
    }

    fn pull_from_host(&mut self, socket: &mut Socket<'_>) -> io::Result<bool> {
        let Some(host) = &mut self.host else {
            return Ok(false);
        };
        let mut is_busy = false;
        while self.is_readable && !self.has_host_ended && socket.can_send() {
            let read = socket.send(|room| match host.read(room) {
                Ok(length) => (length, Ok(length)),
                Err(error) => (0, Err(error)),
            });
            match read {
                Ok(Ok(0)) => {
                    self.has_host_ended = true;
                    socket.close();
                    is_busy = true;
                }
                Ok(Ok(_)) => is_busy = true,
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.is_readable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_cannot_send) => break,
            }
        }
        Ok(is_busy)
    }

    fn push_to_host(&mut self, socket: &mut Socket<'_>) -> io::Result<bool> {
        let Some(host) = &mut self.host else {
            return Ok(false);
        };
        let mut is_busy = false;
        while self.is_writable && socket.can_recv() {
            let written = socket.recv(|bytes| match host.write(bytes) {
                Ok(length) => (length, Ok(())),
                Err(error) => (0, Err(error)),
            });
            match written {
                Ok(Ok(())) => is_busy = true,
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.is_writable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_finished) => break,
            }
        }
        if self.has_guest_ended && !socket.can_recv() && !self.is_host_shut {
            self.is_host_shut = true;
            match host.shutdown(Shutdown::Write) {
                // The host's peer has reset: reading will tell.
                Err(error) if error.kind() != ErrorKind::NotConnected => return Err(error),
                _ => {}
            }
        }
        Ok(is_busy)
    }

    fn watch(&mut self, socket: &Socket<'_>, registrar: &Registrar) {
        let (Some(host), Some(watched)) = (&self.host, self.watched) else {
            return;
        };
        let read = !self.is_readable && !self.has_host_ended && socket.can_send();
        let write = !self.is_writable && socket.can_recv();
        let interest = Interest::of(read, write);
        if interest != watched {
            registrar.modify(host, self.number, interest);
            self.watched = Some(interest);
        }
    }
}
