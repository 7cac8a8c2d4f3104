//! How fast one page lane is, against a plain write and read loop over the same kind of socket
//! into the same kind of memory:
//!
//! ```text
//! cargo run --release -p dunlin-lane --example throughput -- [MiB] [runs] [buffer KiB]
//! ```
//!
//! The ways take turns; medians and ratios are printed, of time and of processor time. `lane` sends
//! what lies in the buffers, `copied` fills them from memory first, as a migration does.

#[path = "../tests/authority/mod.rs"]
mod authority;

use std::io::{IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use authority::Authority;
use dunlin_lane::stream::{SocketTransport, TlsIdentity, TlsName, TlsTransport, Transport};
use dunlin_lane::{
    PageReceiver, PageSender, Placement, StreamLane, StreamReceiver, StreamSender, Ticket, Window,
};

/// What one run took.
#[derive(Clone, Copy, Default)]
struct Cost {
    seconds: f64,
    sender: f64,
    receiver: f64,
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Raw,
    Lane,
    Copied,
    Tls,
    TlsCopied,
}

impl Way {
    fn copies(self) -> bool {
        matches!(self, Self::Copied | Self::TlsCopied)
    }

    fn is_secure(self) -> bool {
        matches!(self, Self::Tls | Self::TlsCopied)
    }
}

struct Case {
    source: Arc<Vec<u8>>,
    target: Arc<Vec<u8>>,
    lane: StreamLane,
    identity: TlsIdentity,
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| {
        let number: usize = text.parse().expect("arguments are numbers");
        number
    });
    let mebibytes = arguments.next().unwrap_or(1024);
    let runs = arguments.next().unwrap_or(7);
    let mut lane = StreamLane::default();
    if let Some(kibibytes) = arguments.next() {
        lane.buffer_bytes = kibibytes << 10;
    }
    let case = Case {
        source: Arc::new(noise(mebibytes << 20)),
        target: Arc::new(vec![1; mebibytes << 20]),
        lane,
        identity: Authority::new().identity(&["127.0.0.1"]),
    };
    let ways = [
        ("raw", Way::Raw),
        ("lane", Way::Lane),
        ("copied", Way::Copied),
        ("tls", Way::Tls),
        ("tls+copy", Way::TlsCopied),
    ];
    let mut costs = vec![Vec::new(); ways.len()];
    for _ in 0..runs {
        for (costs, (_, way)) in costs.iter_mut().zip(ways) {
            costs.push(run(&case, way));
        }
    }
    let raw = median(&costs[0]);
    println!("way       MiB/s  of raw  sender s/GiB  receiver s/GiB  cpu of raw");
    for (costs, (name, _)) in costs.iter().zip(ways) {
        let cost = median(costs);
        let gibibytes = mebibytes as f64 / 1024.0;
        println!(
            "{name:8} {:6.0} {:7.3} {:13.3} {:15.3} {:11.3}",
            mebibytes as f64 / cost.seconds,
            raw.seconds / cost.seconds,
            cost.sender / gibibytes,
            cost.receiver / gibibytes,
            (cost.sender + cost.receiver) / (raw.sender + raw.receiver),
        );
    }
}

fn run(case: &Case, way: Way) -> Cost {
    let (mut out, mut into) = sockets();
    if way.is_secure() {
        (out, into) = secured(out, into, &case.identity);
    }
    let source = Arc::clone(&case.source);
    let lane = case.lane;
    let begin = Instant::now();
    let sender = std::thread::spawn(move || {
        let before = cpu_seconds();
        match way {
            Way::Raw => send_raw(out, &source, lane.buffer_bytes),
            _ => send_lane(out, &source, lane, way),
        }
        cpu_seconds() - before
    });
    let before = cpu_seconds();
    match way {
        Way::Raw => receive_raw(into, &case.target),
        _ => receive_lane(into, &case.target, lane),
    }
    let receiver = cpu_seconds() - before;
    let seconds = begin.elapsed().as_secs_f64();
    let sender = sender.join().expect("the sender works");
    if way.copies() {
        assert!(case.source == case.target, "the bytes arrived as they were");
    }
    Cost {
        seconds,
        sender,
        receiver,
    }
}

fn sockets() -> (Box<dyn Transport>, Box<dyn Transport>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    let out = TcpStream::connect(address).expect("a connection");
    let (into, _) = listener.accept().expect("a connection");
    let transport = |stream| Box::new(SocketTransport::tcp(stream).expect("options"));
    (transport(out), transport(into))
}

fn secured(
    out: Box<dyn Transport>,
    into: Box<dyn Transport>,
    identity: &TlsIdentity,
) -> (Box<dyn Transport>, Box<dyn Transport>) {
    let name = TlsName::address(Ipv4Addr::LOCALHOST.into());
    let mut out = TlsTransport::client(out, identity, name).expect("a client");
    let mut into = TlsTransport::server(into, identity).expect("a server");
    std::thread::scope(|scope| {
        scope.spawn(|| out.handshake(deadline()).expect("a handshake"));
        into.handshake(deadline()).expect("a handshake");
    });
    (Box::new(out), Box::new(into))
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn send_raw(mut out: Box<dyn Transport>, source: &[u8], chunk: usize) {
    let hot = &source[..chunk];
    for chunk in source.chunks(chunk) {
        let mut rest = &hot[..chunk.len()];
        while !rest.is_empty() {
            let count = out.write(&[IoSlice::new(rest)], deadline());
            rest = &rest[count.expect("the peer reads")..];
        }
    }
}

fn receive_raw(mut into: Box<dyn Transport>, target: &Arc<Vec<u8>>) {
    let address = target.as_ptr().cast_mut();
    // SAFETY: nothing else looks at the target while a run is on.
    #[expect(unsafe_code, reason = "the example owns the memory")]
    let mut rest = unsafe { std::slice::from_raw_parts_mut(address, target.len()) };
    while !rest.is_empty() {
        let part = rest.len().min(4 << 20);
        let count = into.read(&mut [IoSliceMut::new(&mut rest[..part])], deadline());
        rest = &mut rest[count.expect("the peer writes")..];
    }
}

fn send_lane(out: Box<dyn Transport>, source: &[u8], lane: StreamLane, way: Way) {
    let mut sender = StreamSender::new(out, lane);
    let mut at = 0;
    for chunk in source.chunks(lane.buffer_bytes) {
        let mut buffer = sender.buffer(deadline()).expect("a buffer");
        let room = buffer.extend(chunk.len()).expect("room");
        if way.copies() {
            room.copy_from_slice(chunk);
        }
        // As a migration does, one entry for each run of pages.
        let places: Vec<_> = (0..chunk.len())
            .step_by(64 << 10)
            .map(|offset| Placement {
                target: at + offset as u64,
                length: (chunk.len() - offset).min(64 << 10) as u32,
            })
            .collect();
        at += chunk.len() as u64;
        sender.write(buffer, &places, deadline()).expect("a lane");
    }
    sender.send(b"end", deadline()).expect("a lane");
    sender.complete(Ticket::ALL, deadline()).expect("a lane");
}

fn receive_lane(into: Box<dyn Transport>, target: &Arc<Vec<u8>>, lane: StreamLane) {
    let mut receiver = StreamReceiver::new(into, lane);
    let start = NonNull::new(target.as_ptr().cast_mut()).expect("memory");
    // SAFETY: the vector is kept, and nothing else looks at it while a run is on.
    #[expect(unsafe_code, reason = "the example owns the memory")]
    let window =
        unsafe { Window::new(0..target.len() as u64, start, Arc::<Vec<u8>>::clone(target)) };
    receiver.grant(window, deadline()).expect("a lane");
    let mut message = Vec::new();
    receiver.receive(&mut message, deadline()).expect("a lane");
    assert_eq!(message, b"end");
}

fn median(costs: &[Cost]) -> Cost {
    let of = |field: fn(&Cost) -> f64| {
        let mut values: Vec<f64> = costs.iter().map(field).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Cost {
        seconds: of(|cost| cost.seconds),
        sender: of(|cost| cost.sender),
        receiver: of(|cost| cost.receiver),
    }
}

/// Processor time of this thread.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the timespec lives across the call.
    #[expect(unsafe_code, reason = "std has no processor time of a thread")]
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0, "the clock can be read");
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0; length];
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    bytes
}
