//! Pairs of ends, and memory to write to.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use dunlin_lane::memory::{self, MemoryLane};
use dunlin_lane::stream::{SocketTransport, TlsIdentity, TlsName, TlsTransport, Transport};
use dunlin_lane::{
    LaneEvent, PageReceiver, PageSender, Placement, StreamLane, StreamReceiver, StreamSender,
    Ticket, Window, WindowRange,
};

use crate::authority::Authority;

/// Both ends of a lane.
pub(crate) struct Pair {
    pub(crate) sender: Box<dyn PageSender>,
    pub(crate) receiver: Box<dyn PageReceiver>,
}

/// Makes lanes of one kind; the seed says which of their orders is meant.
pub(crate) type Factory = fn(StreamLane, u64) -> Pair;

/// Sizes that make every limit easy to reach.
pub(crate) const SMALL: StreamLane = StreamLane {
    buffer_bytes: 64 << 10,
    buffers: 3,
    placements: 16,
    message_bytes: 20_000,
};

pub(crate) fn registering_memory(sizes: StreamLane, seed: u64) -> Pair {
    in_memory(MemoryLane {
        sizes,
        seed,
        ..MemoryLane::default()
    })
}

pub(crate) fn plain_memory(sizes: StreamLane, seed: u64) -> Pair {
    in_memory(MemoryLane {
        sizes,
        seed,
        registers: false,
        ..MemoryLane::default()
    })
}

pub(crate) fn in_memory(options: MemoryLane) -> Pair {
    let (sender, receiver) = memory::pair(options);
    Pair {
        sender: Box::new(sender),
        receiver: Box::new(receiver),
    }
}

pub(crate) fn unix(sizes: StreamLane, _seed: u64) -> Pair {
    let (out, into) = unix_streams();
    over(out, into, sizes)
}

pub(crate) fn tcp(sizes: StreamLane, _seed: u64) -> Pair {
    let (out, into) = tcp_streams();
    over(out, into, sizes)
}

pub(crate) fn tls(sizes: StreamLane, _seed: u64) -> Pair {
    let (out, into) = tcp_streams();
    over_tls(out, into, sizes)
}

/// A lane over TLS, whose handshake is done.
pub(crate) fn over_tls(
    out: Box<dyn Transport>,
    into: Box<dyn Transport>,
    sizes: StreamLane,
) -> Pair {
    static IDENTITY: OnceLock<TlsIdentity> = OnceLock::new();
    let identity = IDENTITY.get_or_init(|| Authority::new().identity(&["127.0.0.1"]));
    let name = TlsName::address(Ipv4Addr::LOCALHOST.into());
    let mut out = TlsTransport::client(out, identity, name).unwrap();
    let mut into = TlsTransport::server(into, identity).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| out.handshake(soon()).unwrap());
        into.handshake(soon()).unwrap();
    });
    over(Box::new(out), Box::new(into), sizes)
}

pub(crate) fn over(out: Box<dyn Transport>, into: Box<dyn Transport>, sizes: StreamLane) -> Pair {
    Pair {
        sender: Box::new(StreamSender::new(out, sizes)),
        receiver: Box::new(StreamReceiver::new(into, sizes)),
    }
}

pub(crate) fn unix_streams() -> (Box<dyn Transport>, Box<dyn Transport>) {
    let (out, into) = UnixStream::pair().unwrap();
    let transport = |stream| Box::new(SocketTransport::unix(stream, "the other end").unwrap());
    (transport(out), transport(into))
}

pub(crate) fn tcp_sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (out, listener.accept().unwrap().0)
}

pub(crate) fn tcp_streams() -> (Box<dyn Transport>, Box<dyn Transport>) {
    let (out, into) = tcp_sockets();
    let transport = |stream| Box::new(SocketTransport::tcp(stream).unwrap());
    (transport(out), transport(into))
}

/// Far enough away that nothing but a defect reaches it.
pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Memory of a receiver.
pub(crate) struct Region {
    bytes: Arc<Vec<AtomicU8>>,
}

impl Region {
    pub(crate) fn new(length: usize) -> Self {
        let bytes = (0..length).map(|_| AtomicU8::new(0)).collect();
        Self {
            bytes: Arc::new(bytes),
        }
    }

    /// The part `range` of it, under the same numbers.
    pub(crate) fn window(&self, range: WindowRange) -> Window {
        let part = &self.bytes[range.start as usize..range.end as usize];
        let start = NonNull::new(part.as_ptr().cast_mut().cast()).unwrap();
        // SAFETY: the bytes are kept by the window, lie at `start`, and may change under shared
        // references, since they are atomic.
        #[expect(unsafe_code, reason = "the region vouches for its memory")]
        unsafe {
            Window::new(range, start, Arc::<Vec<AtomicU8>>::clone(&self.bytes))
        }
    }

    pub(crate) fn fill(&self, range: WindowRange, byte: u8) {
        for place in &self.bytes[range.start as usize..range.end as usize] {
            place.store(byte, Ordering::Release);
        }
    }

    pub(crate) fn get(&self, range: WindowRange) -> Vec<u8> {
        let part = &self.bytes[range.start as usize..range.end as usize];
        part.iter().map(|b| b.load(Ordering::Acquire)).collect()
    }

    pub(crate) fn is(&self, range: WindowRange, byte: u8) -> bool {
        self.get(range).iter().all(|&other| other == byte)
    }
}

impl Pair {
    /// Grants `range` of `region` as the kind of lane wants it.
    pub(crate) fn grant(&mut self, region: &Region, range: WindowRange) {
        self.sender.announce(range.clone(), soon()).unwrap();
        if self.receiver.traits().registers {
            let event = self.receiver.receive(&mut Vec::new(), soon()).unwrap();
            assert_eq!(event, LaneEvent::Announced(range.clone()));
        }
        let window = region.window(range.clone());
        self.receiver.grant(window, soon()).unwrap();
        self.sender.await_grant(range, soon()).unwrap();
    }

    pub(crate) fn message(&mut self) -> Vec<u8> {
        receive(&mut *self.receiver)
    }
}

pub(crate) fn receive(receiver: &mut dyn PageReceiver) -> Vec<u8> {
    let mut message = b"stale".to_vec();
    let event = receiver.receive(&mut message, soon()).unwrap();
    assert_eq!(event, LaneEvent::Message);
    message
}

pub(crate) fn at(target: u64, length: u32) -> Placement {
    Placement { target, length }
}

/// Writes `length` times `byte` to `target`.
pub(crate) fn write(
    sender: &mut dyn PageSender,
    target: u64,
    length: u32,
    byte: u8,
) -> Result<Ticket, dunlin_lane::LaneError> {
    let mut buffer = sender.buffer(soon())?;
    buffer.extend(length as usize).unwrap().fill(byte);
    sender.write(buffer, &[at(target, length)], soon())
}
