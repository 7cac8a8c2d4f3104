//! The guest's serial console: a bounded history, any number of readers, and a way in.
//!
//! ```text
//!   vCPU thread ──► history (ring) ◄── reader 1 (position) ──► socket
//!        wakes          │          ◄── reader 2 (position) ──► socket
//!                       └ oldest bytes are dropped; a reader that is too slow skips them
//!   socket ──► Serial::push_input, waiting for room
//! ```
//!
//! The guest never waits for a reader: writing is a copy under a lock that readers hold for a copy.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use dunlin_devices::serial::{Console, Serial};
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
    serial: Option<Arc<Serial>>,
}

/// The console's end outside of the guest.
#[derive(Debug, Default)]
pub(crate) struct ConsoleHub {
    state: Mutex<State>,
    output: Notify,
    room: Notify,
    /// Notified when a reader comes.
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

    /// From now on input goes to this port; after a reboot it is another one.
    pub(crate) fn connect(&self, serial: Arc<Serial>) {
        self.lock().serial = Some(serial);
        self.room.notify_waiters();
    }

    /// No output will follow: readers end once they have had all.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.serial = None;
        drop(state);
        self.output.notify_waiters();
        self.room.notify_waiters();
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
            let news = self.output.notified();
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
                            () = self.output.notified() => {}
                            () = tokio::time::sleep(Duration::from_millis(500)) => {}
                        }
                    }
                }
            } else if output.write_all(&buffer).await.is_err() {
                return;
            }
        }
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
                // Not under our lock: the port calls back.
                let (serial, closed) = {
                    let state = self.lock();
                    (state.serial.clone(), state.closed)
                };
                if closed {
                    return;
                }
                let taken = serial.map_or(0, |serial| serial.push_input(rest));
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
        let mut state = self.lock();
        state.history.extend(bytes);
        let excess = state.history.len().saturating_sub(HISTORY);
        state.history.drain(..excess);
        state.written += bytes.len() as u64;
        drop(state);
        self.output.notify_waiters();
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
