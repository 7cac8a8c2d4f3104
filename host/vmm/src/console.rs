//! The guest's console: a bounded history, any number of readers, and a way in.
//!
//! ```text
//!   vCPU thread ──► history (ring) ◄── reader 1 (position) ──► socket
//!        wakes          │          ◄── reader 2 (position) ──► socket
//!                       └ oldest bytes are dropped; a reader that is too slow skips them
//!   socket ──► Serial::push_input or ConsoleInput::push, waiting for room
//! ```
//!
//! The guest has two ports to it, the serial one (`ttyS0`) and virtio-console (`hvc0`). Output of
//! both is one stream; input goes to the port that wrote last, and before any output to the one
//! that the kernel's command line makes `/dev/console`.
//!
//! The guest never waits for a reader: writing is a copy under a lock that readers hold for a copy.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use dunlin_devices::serial::{Console, Serial};
use dunlin_devices::virtio::console::ConsoleInput;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

/// Bytes of output that are kept for readers that come later.
const HISTORY: usize = 256 << 10;

#[derive(Debug, Default)]
struct State {
    history: VecDeque<u8>,
    /// Bytes ever written; the history ends there.
    written: u64,
    /// No output will follow.
    closed: bool,
    /// Readers that have not yet had everything.
    readers: usize,
    ports: Option<Ports>,
    /// The port that input goes to.
    active: ActivePort,
    /// Input waits: the guest may go on in another process.
    held: bool,
    /// Readers that are giving input to a port right now.
    pushing: usize,
}

/// The guest's ends of the console.
#[derive(Debug, Clone)]
pub(crate) struct Ports {
    /// `ttyS0`.
    pub(crate) serial: Arc<Serial>,
    /// `hvc0`.
    pub(crate) paravirtual: ConsoleInput,
}

/// Which port input goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum ActivePort {
    /// The serial port.
    #[default]
    Serial,
    /// virtio-console.
    Paravirtual,
}

impl ActivePort {
    /// The port that a kernel with this command line makes `/dev/console`: the last that it names.
    pub(crate) fn of_command_line(command_line: &str) -> Self {
        let mut named = command_line
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("console="));
        match named.next_back() {
            Some(name) if name.starts_with("hvc") => Self::Paravirtual,
            _ => Self::Serial,
        }
    }
}

impl Ports {
    /// Offers input to a port; returns how many bytes it took.
    fn push(&self, port: ActivePort, bytes: &[u8]) -> usize {
        match port {
            ActivePort::Serial => self.serial.push_input(bytes),
            ActivePort::Paravirtual => self.paravirtual.push(bytes),
        }
    }
}

/// Where virtio-console writes.
#[derive(Debug)]
pub(crate) struct ParavirtualOutput(pub(crate) Arc<ConsoleHub>);

impl Console for ParavirtualOutput {
    fn write(&self, bytes: &[u8]) {
        self.0.output(ActivePort::Paravirtual, bytes);
    }

    fn input_ready(&self) {
        self.0.room.notify_waiters();
    }
}

/// The console's end outside of the guest.
#[derive(Debug, Default)]
pub(crate) struct ConsoleHub {
    state: Mutex<State>,
    news: Notify,
    room: Notify,
    /// Notified when a reader comes, and when the last push that a hold waits for is done.
    watched: Condvar,
}

impl ConsoleHub {
    /// A console without history.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is valid after each statement that changes it.
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// From now on input goes to these ports, at first to `active`; after a reboot to others.
    pub(crate) fn connect(&self, ports: Ports, active: ActivePort) {
        let mut state = self.lock();
        state.ports = Some(ports);
        state.active = active;
        drop(state);
        self.room.notify_waiters();
    }

    fn output(&self, port: ActivePort, bytes: &[u8]) {
        let mut state = self.lock();
        state.active = port;
        state.history.extend(bytes);
        let excess = state.history.len().saturating_sub(HISTORY);
        state.history.drain(..excess);
        state.written += bytes.len() as u64;
        drop(state);
        self.news.notify_waiters();
    }

    /// No output will follow: readers end once they have had all.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.ports = None;
        drop(state);
        self.news.notify_waiters();
        self.room.notify_waiters();
    }

    /// No input reaches the guest from the return on, until [`ConsoleHub::release`]: what would be
    /// typed into a machine whose state is saved already would be lost.
    pub(crate) fn hold(&self) {
        let mut state = self.lock();
        state.held = true;
        // A push is a copy: this does not wait for anybody outside.
        let _poisoned = self.watched.wait_while(state, |state| state.pushing > 0);
    }

    /// Undoes [`ConsoleHub::hold`].
    pub(crate) fn release(&self) {
        self.lock().held = false;
        self.room.notify_waiters();
    }

    /// The history, for a process that goes on with the guest.
    pub(crate) fn history(&self) -> Vec<u8> {
        self.lock().history.iter().copied().collect()
    }

    /// Puts what another process's console had before this one's. Before the first reader.
    pub(crate) fn inherit(&self, history: &[u8]) {
        let mut state = self.lock();
        let kept = &history[history.len().saturating_sub(HISTORY - state.history.len())..];
        for &byte in kept.iter().rev() {
            state.history.push_front(byte);
        }
        state.written += kept.len() as u64;
    }

    /// Waits until somebody reads, for `limit` at most.
    pub(crate) fn wait_for_reader(&self, limit: Duration) {
        let unwatched = |state: &mut State| state.readers == 0 && !state.closed;
        // Nobody came in time, or a reader's thread panicked: the guest starts all the same.
        let _outcome = self
            .watched
            .wait_timeout_while(self.lock(), limit, unwatched);
    }

    /// Have all readers had everything?
    pub(crate) fn is_drained(&self) -> bool {
        self.lock().readers == 0
    }

    /// Serves one reader until it leaves or the console is closed.
    pub(crate) async fn serve(self: Arc<Self>, stream: UnixStream) {
        let (input, output) = stream.into_split();
        self.lock().readers += 1;
        self.watched.notify_all();
        // Typing ends before reading does: a reader that closes its writing half still reads.
        let typing = tokio::spawn(Arc::clone(&self).take_input(input));
        self.send_output(output).await;
        typing.abort();
        self.lock().readers -= 1;
    }

    /// What follows `position`, at most one buffer's worth; `None` at the end.
    fn after(&self, position: u64, buffer: &mut Vec<u8>) -> Option<u64> {
        let state = self.lock();
        let oldest = state.written - state.history.len() as u64;
        let from = (position.max(oldest) - oldest) as usize;
        buffer.clear();
        buffer.extend(state.history.range(from..).take(16 << 10));
        if buffer.is_empty() && state.closed {
            return None;
        }
        Some(oldest + from as u64 + buffer.len() as u64)
    }

    async fn send_output(&self, mut output: OwnedWriteHalf) {
        let mut position = 0;
        let mut buffer = Vec::new();
        loop {
            let news = self.news.notified();
            tokio::pin!(news);
            // Registered before looking, so that nothing written in between is missed.
            news.as_mut().enable();
            match self.after(position, &mut buffer) {
                None => return,
                Some(next) => position = next,
            }
            if buffer.is_empty() {
                tokio::select! {
                    () = news => {}
                    gone = output.writable() => {
                        // Writable is the usual state: only an error tells that nobody reads.
                        if gone.is_err() {
                            return;
                        }
                        tokio::select! {
                            () = self.news.notified() => {}
                            () = tokio::time::sleep(Duration::from_millis(500)) => {}
                        }
                    }
                }
            } else if output.write_all(&buffer).await.is_err() {
                return;
            }
        }
    }

    /// Gives input to the guest; how much it took. `None` when the console is closed.
    fn give_input(&self, bytes: &[u8]) -> Option<usize> {
        // Not under our lock: the port calls back.
        let (ports, active) = {
            let mut state = self.lock();
            if state.closed {
                return None;
            }
            let Some(ports) = state.ports.clone().filter(|_| !state.held) else {
                return Some(0);
            };
            state.pushing += 1;
            (ports, state.active)
        };
        let taken = ports.push(active, bytes);
        let mut state = self.lock();
        state.pushing -= 1;
        if state.held && state.pushing == 0 {
            self.watched.notify_all();
        }
        Some(taken)
    }

    async fn take_input(self: Arc<Self>, mut input: OwnedReadHalf) {
        let mut buffer = [0; 1024];
        loop {
            let Ok(count @ 1..) = input.read(&mut buffer).await else {
                return;
            };
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let room = self.room.notified();
                tokio::pin!(room);
                room.as_mut().enable();
                let Some(taken) = self.give_input(rest) else {
                    return;
                };
                rest = &rest[taken..];
                if taken == 0 {
                    room.await;
                }
            }
        }
    }
}

impl Console for ConsoleHub {
    fn write(&self, bytes: &[u8]) {
        ConsoleHub::output(self, ActivePort::Serial, bytes);
    }

    fn input_ready(&self) {
        self.room.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn a_late_reader_gets_the_history_and_what_follows() {
        runtime().block_on(async {
            let hub = ConsoleHub::new();
            hub.write(b"before ");
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let serving = tokio::spawn(Arc::clone(&hub).serve(ours));
            let mut first = [0; 7];
            theirs.read_exact(&mut first).await.unwrap();
            hub.write(b"after");
            hub.close();
            let mut rest = Vec::new();
            theirs.read_to_end(&mut rest).await.unwrap();
            assert_eq!((&first[..], &rest[..]), (&b"before "[..], &b"after"[..]));
            serving.await.unwrap();
            assert!(hub.is_drained());
        });
    }

    #[test]
    fn a_console_goes_on_with_the_history_of_another_process() {
        let (old, new) = (ConsoleHub::new(), ConsoleHub::new());
        old.write(b"before ");
        new.write(b"after");
        new.inherit(&old.history());
        assert_eq!(new.history(), b"before after");
        let mut buffer = Vec::new();
        assert_eq!(new.after(0, &mut buffer), Some(12));
        assert_eq!(buffer, b"before after");
        new.inherit(&[b'x'; HISTORY]);
        assert_eq!(new.lock().history.len(), HISTORY);
        assert!(new.history().ends_with(b"xbefore after"));
    }

    #[test]
    fn input_starts_at_the_console_that_the_kernel_makes_its_own() {
        let of = ActivePort::of_command_line;
        assert_eq!(of("quiet"), ActivePort::Serial);
        assert_eq!(of("console=ttyS0 console=hvc0"), ActivePort::Paravirtual);
        assert_eq!(of("console=hvc0 console=ttyS0,115200"), ActivePort::Serial);
    }

    #[test]
    fn input_follows_the_port_that_wrote_last() {
        let hub = ConsoleHub::new();
        ParavirtualOutput(Arc::clone(&hub)).write(b"# ");
        assert_eq!(hub.lock().active, ActivePort::Paravirtual);
        hub.write(b"kernel message");
        assert_eq!(hub.lock().active, ActivePort::Serial);
        assert_eq!(hub.lock().written, 16);
    }

    #[test]
    fn a_reader_that_does_not_read_never_blocks_the_guest() {
        runtime().block_on(async {
            let hub = ConsoleHub::new();
            let (ours, _never_read) = UnixStream::pair().unwrap();
            let _serving = tokio::spawn(Arc::clone(&hub).serve(ours));
            for _ in 0..100 {
                hub.write(&[b'x'; 64 << 10]);
                tokio::task::yield_now().await;
            }
            assert_eq!(hub.lock().history.len(), HISTORY);
        });
    }
}
