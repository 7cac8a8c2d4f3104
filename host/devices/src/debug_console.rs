//! The debug console: a port that takes bytes and leads them to a socket or file of the host.
//!
//! ```text
//!  guest ──OUT 0xe9──► pending (64 KiB) ──► socket or file     tried at once, on the vCPU's thread
//!                         │    ▲
//!                         └────┴─ drain thread, while the reader is slower than the guest
//! ```
//!
//! It is what other machines call `isa-debugcon`: every byte written to port [`PORT`] comes out, every read
//! gives [`PRESENCE`], which tells a guest that the port is there. Nothing waits: a byte goes out
//! in the write that brought it, so that its time of arrival tells when the guest ran. When the
//! reader is slow, bytes wait in a bounded buffer, and what does not fit is dropped and counted;
//! a reader that is gone loses everything from then on. The guest never notices.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use dunlin_guest::{RestoreError, SavedState};

use crate::bus::{Bus, BusDevice, RangeError};
use crate::component::{Component, Reach};
use crate::lock;

/// The port.
pub const PORT: u64 = 0xe9;
/// What a read of the port gives.
pub const PRESENCE: u8 = 0xe9;
/// Bytes that wait for a slow reader.
const PENDING: usize = 64 << 10;
/// How long the drain thread waits for room before it looks whether it is still wanted.
const PATIENCE: Duration = Duration::from_millis(100);

const KIND: &str = "debug-console";
const VERSION: u32 = 1;

/// Where the bytes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DebugOutput {
    /// A unix stream socket on which somebody listens.
    Socket(PathBuf),
    /// A file; what is there stays, bytes are appended.
    File(PathBuf),
}

/// Why the bytes cannot go there.
#[derive(Debug, thiserror::Error)]
pub enum DebugConsoleError {
    /// Nobody listens.
    #[error("failed to connect the debug console to \"{}\"", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The file does not open.
    #[error("failed to open \"{}\" for the debug console", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host gave no thread.
    #[error("failed to start the debug console's thread")]
    Thread(#[source] io::Error),
}

/// The device.
#[derive(Debug)]
pub struct DebugConsole {
    shared: Arc<Shared>,
    drain: Option<JoinHandle<()>>,
}

/// Saved state of [`DebugConsole`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct DebugConsoleState {
    /// Bytes that were dropped so far.
    #[prost(uint64, tag = "1")]
    pub dropped: u64,
    /// Bytes that wait for the reader, when the guest goes on in another process of this host.
    #[prost(bytes = "vec", tag = "2")]
    pub pending: Vec<u8>,
}

#[derive(Debug)]
struct Shared {
    output: Output,
    state: Mutex<State>,
    /// Notified when bytes begin to wait, and at the end.
    waiting: Condvar,
}

#[derive(Debug)]
enum Output {
    Socket(UnixStream),
    File(File),
}

#[derive(Debug, Default)]
struct State {
    pending: VecDeque<u8>,
    dropped: u64,
    /// Nobody reads any more.
    gone: bool,
    ended: bool,
    /// Paused for another process of this host, which sends what waits.
    held: bool,
}

impl DebugConsole {
    /// A device whose bytes go to `output`.
    ///
    /// # Errors
    /// [`DebugConsoleError`] when nobody listens there or the file does not open.
    pub fn open(output: &DebugOutput) -> Result<Arc<Self>, DebugConsoleError> {
        match output {
            DebugOutput::Socket(path) => {
                let connected = UnixStream::connect(path).and_then(|socket| {
                    socket.set_nonblocking(true)?;
                    Ok(socket)
                });
                let socket = connected.map_err(|source| DebugConsoleError::Connect {
                    path: path.clone(),
                    source,
                })?;
                Self::start(Output::Socket(socket))
            }
            DebugOutput::File(path) => {
                let opened = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path);
                let file = opened.map_err(|source| DebugConsoleError::Open {
                    path: path.clone(),
                    source,
                })?;
                Self::start(Output::File(file))
            }
        }
    }

    /// A device over the descriptor that another process's device for `output` had.
    ///
    /// # Errors
    /// [`DebugConsoleError::Thread`] when the host gives no thread.
    pub fn adopt(
        output: &DebugOutput,
        descriptor: OwnedFd,
    ) -> Result<Arc<Self>, DebugConsoleError> {
        Self::start(match output {
            DebugOutput::Socket(_) => Output::Socket(descriptor.into()),
            DebugOutput::File(_) => Output::File(descriptor.into()),
        })
    }

    /// The descriptor that bytes go to.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.shared.output.as_fd()
    }

    fn start(output: Output) -> Result<Arc<Self>, DebugConsoleError> {
        let shared = Arc::new(Shared {
            output,
            state: Mutex::default(),
            waiting: Condvar::new(),
        });
        let drained = Arc::clone(&shared);
        let drain = std::thread::Builder::new()
            .name("debug-console".into())
            .spawn(move || drained.drain())
            .map_err(DebugConsoleError::Thread)?;
        Ok(Arc::new(Self {
            shared,
            drain: Some(drain),
        }))
    }

    /// Puts the port on the port bus.
    ///
    /// # Errors
    /// [`RangeError`] when another device has the port.
    pub fn attach(self: &Arc<Self>, ports: &Bus) -> Result<(), RangeError> {
        ports.insert(PORT, 1, Arc::clone(self) as _)
    }
}

impl Drop for DebugConsole {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.shared.waiting.notify_one();
        if let Some(drain) = self.drain.take() {
            // A panic there has cost bytes only.
            let _panicked = drain.join();
        }
    }
}

impl Shared {
    fn put(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        let room = PENDING - state.pending.len();
        let kept = bytes.len().min(room);
        state.pending.extend(&bytes[..kept]);
        state.dropped += (bytes.len() - kept) as u64;
        self.flush(&mut state);
        if !state.pending.is_empty() {
            self.waiting.notify_one();
        }
    }

    /// Writes what goes out without waiting.
    fn flush(&self, state: &mut State) {
        while !state.gone && !state.pending.is_empty() {
            let (front, _back) = state.pending.as_slices();
            let written = match &self.output {
                Output::Socket(socket) => (&*socket).write(front),
                Output::File(file) => (&*file).write(front),
            };
            match written {
                Ok(count @ 1..) => drop(state.pending.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => {
                    tracing::info!("nobody reads the debug console any more");
                    state.gone = true;
                }
            }
        }
        if state.gone {
            state.dropped += state.pending.len() as u64;
            state.pending.clear();
        }
    }

    /// Sends what waits for the reader, until the device ends.
    fn drain(&self) {
        loop {
            let idle = |state: &mut State| (state.pending.is_empty() || state.held) && !state.ended;
            let waited = self.waiting.wait_while(lock(&self.state), idle);
            if waited.unwrap_or_else(PoisonError::into_inner).ended {
                return;
            }
            wait_for_room(self.output.as_fd());
            let mut state = lock(&self.state);
            if !state.held {
                self.flush(&mut state);
            }
        }
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Socket(socket) => socket.as_fd(),
            Self::File(file) => file.as_fd(),
        }
    }
}

/// Waits until a write would go through, or [`PATIENCE`] is over.
fn wait_for_room(output: BorrowedFd<'_>) {
    let mut descriptor = libc::pollfd {
        fd: output.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    let patience = PATIENCE.as_millis() as libc::c_int;
    // SAFETY: `descriptor` is one valid entry, which lives for the call.
    #[expect(unsafe_code, reason = "std does not wait for a descriptor")]
    unsafe {
        // Whatever it says, the write that follows tells the truth.
        libc::poll(&raw mut descriptor, 1, patience);
    }
}

impl BusDevice for DebugConsole {
    fn label(&self) -> String {
        "debug-console".into()
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENCE);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        self.shared.put(data);
    }
}

impl Component for DebugConsole {
    fn name(&self) -> String {
        KIND.into()
    }

    /// Nothing to stop. Bytes that wait leave this host by themselves when the guest leaves it; to
    /// another process of this host they go with the device.
    fn pause(&self, reach: Reach) {
        let mut state = lock(&self.shared.state);
        self.shared.flush(&mut state);
        state.held = reach == Reach::ThisHost;
    }

    fn resume(&self) {
        lock(&self.shared.state).held = false;
        self.shared.waiting.notify_one();
    }

    fn save(&self) -> SavedState {
        let State {
            pending,
            dropped,
            gone: _,
            ended: _,
            held,
        } = &*lock(&self.shared.state);
        let state = DebugConsoleState {
            dropped: *dropped,
            pending: (pending.iter().copied()).filter(|_| *held).collect(),
        };
        SavedState::encode(&self.name(), KIND, VERSION, &state)
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        let DebugConsoleState { dropped, pending } = state.decode(KIND, VERSION)?;
        if pending.len() > PENDING {
            return Err(state.invalid(format!("{} bytes wait", pending.len())));
        }
        let mut own = lock(&self.shared.state);
        own.dropped = dropped;
        own.pending = pending.into();
        own.held = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn connected() -> (Arc<DebugConsole>, Bus, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let device = DebugConsole::start(Output::Socket(ours)).unwrap();
        let ports = Bus::new();
        device.attach(&ports).unwrap();
        (device, ports, theirs)
    }

    #[test]
    fn bytes_come_out_in_order_and_a_read_tells_that_the_port_is_there() {
        let (_device, ports, mut reader) = connected();
        for byte in b"hello" {
            assert!(ports.write(PORT, &[*byte]));
        }
        let mut got = [0; 5];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        let mut answer = [0];
        assert!(ports.read(PORT, &mut answer));
        assert_eq!(answer, [PRESENCE]);
    }

    #[test]
    fn a_slow_reader_gets_everything_that_fits_without_another_write() {
        let (device, ports, mut reader) = connected();
        // More single bytes than a socket takes before it is full.
        for index in 0..20_000u32 {
            ports.write(PORT, &[index as u8]);
        }
        assert_eq!(lock(&device.shared.state).dropped, 0);
        let mut got = vec![0; 20_000];
        reader.read_exact(&mut got).unwrap();
        assert!(got.iter().enumerate().all(|(i, &byte)| byte == i as u8));
    }

    #[test]
    fn a_reader_that_never_reads_costs_counted_bytes_and_no_waiting() {
        let (device, _ports, reader) = connected();
        for _ in 0..100 {
            device.write(0, &[0; 64 << 10]);
        }
        let dropped = lock(&device.shared.state).dropped;
        assert!(dropped > 50 * (64 << 10), "{dropped}");
        drop(reader);
        device.write(0, &[1]);
        assert!(lock(&device.shared.state).gone);
        let saved = device.save();
        let (other, ..) = connected();
        other.restore(&saved).unwrap();
        assert_eq!(other.save(), saved);
        assert!(lock(&other.shared.state).dropped > dropped);
    }

    #[test]
    fn a_file_is_appended_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        for text in ["one ", "two"] {
            let device = DebugConsole::open(&DebugOutput::File(path.clone())).unwrap();
            device.write(0, text.as_bytes());
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"one two");
    }

    #[test]
    fn a_socket_without_a_listener_is_named() {
        let path = PathBuf::from("/nonexistent/socket");
        let error = DebugConsole::open(&DebugOutput::Socket(path)).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/socket"), "{error}");
    }

    #[test]
    fn bytes_that_wait_go_to_another_process_of_this_host_once_and_in_order() {
        let (ours, mut reader) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let descriptor = OwnedFd::from(ours.try_clone().unwrap());
        let first = DebugConsole::start(Output::Socket(ours)).unwrap();
        let mut sent = Vec::new();
        // Until the socket is full and bytes wait.
        while lock(&first.shared.state).pending.is_empty() {
            let piece = [sent.len() as u8; 512];
            first.write(0, &piece);
            sent.extend(piece);
        }
        first.pause(Reach::ThisHost);
        let output = DebugOutput::Socket("/unused".into());
        let second = DebugConsole::adopt(&output, descriptor).unwrap();
        second.restore(&first.save()).unwrap();
        let mut got = vec![0; sent.len() + 3];
        let reading = std::thread::spawn(move || {
            reader.read_exact(&mut got).unwrap();
            got
        });
        second.resume();
        second.write(0, b"end");
        sent.extend(b"end");
        assert_eq!(reading.join().unwrap(), sent);
        drop(first);
    }
}
