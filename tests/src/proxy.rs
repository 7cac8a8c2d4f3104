//! Stands between two hosts and does harm at one place of their conversation.
//!
//! ```text
//!  source ──tcp──► Proxy ──tcp──► destination      each connection: two threads, one a way
//! ```
//!
//! Control connections are followed frame by frame, as far as the protocol lets anybody: a
//! preamble of 64 bytes, then
//! headers that begin with the length of the payload and the frame's kind. All others are counted
//! in bytes.
//! Harm is done once.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const PREAMBLE: usize = 64;
/// Where the preamble says what the connection is for, and the purpose of a control connection.
const PURPOSE: std::ops::Range<usize> = 10..12;
const MOVE: [u8; 2] = [1, 0];
const HEADER: usize = 24;
/// Longer frames there are not; what claims to be is no frame.
const LONGEST_FRAME: u32 = 128 << 20;

/// How long [`Harm::Hold`] holds something: longer than the peers of a soak have patience.
pub const HELD: Duration = Duration::from_millis(1500);

/// Which way something goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From the source.
    ToDestination,
    /// From the destination.
    ToSource,
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// The connection ends before it.
    Cut,
    /// The connection ends in its middle.
    CutWithin,
    /// It passes, and the connection ends.
    CutBehind,
    /// From it on nothing moves any more on this connection, in both directions.
    Stall,
    /// It comes late, and everything behind it: after [`HELD`].
    Hold,
    /// A bit of its header flips.
    Header,
    /// A bit of its payload flips; of its header when it has no payload.
    Payload,
    /// The source's process is killed, and then it passes.
    KillSource,
    /// It passes, and the destination's process is killed.
    KillDestination,
}

impl Harm {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Cut,
        Self::CutWithin,
        Self::CutBehind,
        Self::Stall,
        Self::Hold,
        Self::Header,
        Self::Payload,
        Self::KillSource,
        Self::KillDestination,
    ];

    /// Does what it strikes arrive, whole?
    fn lets_pass(self) -> bool {
        matches!(
            self,
            Self::CutBehind | Self::Hold | Self::KillSource | Self::KillDestination
        )
    }
}

/// Where it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// At the frame of this kind that comes after `skip` others of that kind this way.
    Frame {
        /// Which way it goes.
        way: Way,
        /// The number of its kind.
        kind: u16,
        /// How many pass before.
        skip: u64,
    },
    /// At a byte of another connection: the one after `skip` others.
    Byte {
        /// How many connections come before.
        skip: usize,
        /// Which way it goes.
        way: Way,
        /// How many bytes pass before.
        offset: u64,
    },
}

/// Harm at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub point: Point,
    /// What.
    pub harm: Harm,
}

/// What passed.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// Frames of control connections that came, by way and kind.
    pub frames: BTreeMap<(Way, u16), u64>,
    /// Those of them that were handed on unharmed.
    pub passed: BTreeMap<(Way, u16), u64>,
    /// Bytes of other connections, to the destination and to the source.
    pub others: Vec<[u64; 2]>,
}

/// What the proxy calls to kill a process: it is given [`Harm::KillSource`] or
/// [`Harm::KillDestination`].
pub type Kill = Box<dyn Fn(Harm) + Send + Sync>;

/// Listens in the destination's place.
pub struct Proxy {
    address: SocketAddrV4,
    shared: Arc<Shared>,
}

struct Shared {
    target: SocketAddrV4,
    fault: Option<Fault>,
    kill: Kill,
    hit: AtomicBool,
    closed: AtomicBool,
    trace: Mutex<Trace>,
    /// Kept open until the proxy goes away: a stalled connection does not end.
    stalled: Mutex<Vec<TcpStream>>,
    /// All that were made, for those who want to cut them.
    made: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    /// A proxy on an address of its own before `target`.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn new(target: SocketAddrV4, fault: Option<Fault>, kill: Kill) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            target,
            fault,
            kill,
            hit: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            trace: Mutex::default(),
            stalled: Mutex::default(),
            made: Mutex::default(),
        });
        let theirs = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("proxy-door".into())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    // When the destination is gone, so is this door: who knocks is refused, as
                    // there.
                    if theirs.closed.load(Ordering::SeqCst) || theirs.connect(stream).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port),
            shared,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddrV4 {
        self.address
    }

    /// Cuts all connections that there are now.
    pub fn cut(&self) {
        for stream in lock(&self.shared.made).drain(..) {
            // One that has ended cannot be cut, and need not be.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Did the conversation come as far as the fault?
    pub fn hit(&self) -> bool {
        self.shared.hit.load(Ordering::SeqCst)
    }

    /// What passed so far.
    pub fn trace(&self) -> Trace {
        lock(&self.shared.trace).clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.close(self.address);
        for stream in lock(&self.shared.stalled).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn close(&self, address: SocketAddrV4) {
        self.closed.store(true, Ordering::SeqCst);
        // Wakes the thread at the door.
        let _ = TcpStream::connect_timeout(&address.into(), Duration::from_secs(1));
    }

    fn connect(self: &Arc<Self>, source: TcpStream) -> std::io::Result<()> {
        let destination = TcpStream::connect(self.target)?;
        let connection = Arc::new(Connection {
            shared: Arc::clone(self),
            source,
            destination,
            stalled: AtomicBool::new(false),
            number: Mutex::new(None),
        });
        for stream in [&connection.source, &connection.destination] {
            stream.set_nodelay(true)?;
            lock(&self.made).push(stream.try_clone()?);
        }
        for way in [Way::ToDestination, Way::ToSource] {
            let connection = Arc::clone(&connection);
            std::thread::spawn(move || connection.run(way));
        }
        Ok(())
    }

    /// The harm to do at this frame, if it is the one.
    fn at_frame(&self, at: Way, frame: u16) -> Option<Harm> {
        let mut trace = lock(&self.trace);
        let count = trace.frames.entry((at, frame)).or_default();
        *count += 1;
        let count = *count;
        drop(trace);
        let fault = self.fault?;
        match fault.point {
            Point::Frame { way, kind, skip } => {
                let here = way == at && kind == frame && count == skip + 1;
                (here && !self.hit.swap(true, Ordering::SeqCst)).then_some(fault.harm)
            }
            Point::Byte { .. } => None,
        }
    }

    /// A frame is handed on.
    fn passes(&self, way: Way, frame: u16) {
        *lock(&self.trace).passed.entry((way, frame)).or_default() += 1;
    }

    /// The harm to do within these bytes, and where in them.
    fn at_bytes(&self, connection: usize, at: Way, length: usize) -> Option<(Harm, usize)> {
        let mut trace = lock(&self.trace);
        let count = &mut trace.others.get_mut(connection)?[at as usize];
        let before = *count;
        *count += length as u64;
        drop(trace);
        let fault = self.fault?;
        match fault.point {
            Point::Byte { skip, way, offset }
                if skip == connection && way == at && offset >= before =>
            {
                let within = usize::try_from(offset - before).ok()?;
                let here = within < length && !self.hit.swap(true, Ordering::SeqCst);
                here.then_some((fault.harm, within))
            }
            _ => None,
        }
    }
}

struct Connection {
    shared: Arc<Shared>,
    source: TcpStream,
    destination: TcpStream,
    stalled: AtomicBool,
    /// Its number among those that are counted in bytes.
    number: Mutex<Option<usize>>,
}

/// What becomes of a connection.
enum End {
    /// One side has said all; what goes the other way may go on.
    Said,
    /// It is at its end, both ways.
    Closed,
    /// It stays open without a word.
    Stalled,
}

impl Connection {
    fn run(&self, way: Way) {
        let end = self.forward(way).unwrap_or(End::Closed);
        if matches!(end, End::Said) {
            // Fails when the other side has gone, which its own thread notices.
            let _ = self.ends(way).1.shutdown(Shutdown::Write);
            return;
        }
        let stays = matches!(end, End::Stalled) || self.stalled.load(Ordering::SeqCst);
        for stream in [&self.source, &self.destination] {
            if !stays {
                let _ = stream.shutdown(Shutdown::Both);
            } else if let Ok(stream) = stream.try_clone() {
                lock(&self.shared.stalled).push(stream);
            }
        }
    }

    fn ends(&self, way: Way) -> (&TcpStream, &TcpStream) {
        match way {
            Way::ToDestination => (&self.source, &self.destination),
            Way::ToSource => (&self.destination, &self.source),
        }
    }

    fn forward(&self, way: Way) -> std::io::Result<End> {
        let (mut from, mut to) = self.ends(way);
        let mut preamble = [0; PREAMBLE];
        from.read_exact(&mut preamble)?;
        let control = preamble[PURPOSE] == MOVE;
        if !control {
            let mut number = lock(&self.number);
            if number.is_none() {
                let mut trace = lock(&self.shared.trace);
                trace.others.push([0; 2]);
                *number = Some(trace.others.len() - 1);
            }
        }
        to.write_all(&preamble)?;
        if control {
            self.frames(way)
        } else {
            let number = lock(&self.number).unwrap_or_default();
            self.bytes(way, number)
        }
    }

    /// Forwards frames until the end.
    fn frames(&self, way: Way) -> std::io::Result<End> {
        let (mut from, mut to) = self.ends(way);
        loop {
            let mut frame = vec![0; HEADER];
            if from.read(&mut frame[..1])? == 0 {
                return Ok(End::Said);
            }
            from.read_exact(&mut frame[1..])?;
            let length = u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]);
            let kind = u16::from_le_bytes([frame[4], frame[5]]);
            if length > LONGEST_FRAME {
                return Err(std::io::Error::other("the hosts speak another protocol"));
            }
            frame.resize(HEADER + length as usize, 0);
            from.read_exact(&mut frame[HEADER..])?;
            if self.stalled.load(Ordering::SeqCst) {
                return Ok(End::Stalled);
            }
            let harm = self.shared.at_frame(way, kind);
            if harm.is_none_or(Harm::lets_pass) {
                self.shared.passes(way, kind);
            }
            let Some(harm) = harm else {
                to.write_all(&frame)?;
                continue;
            };
            let at = match harm {
                Harm::Header => 9,
                Harm::Payload if frame.len() > HEADER => (HEADER + frame.len()) / 2,
                Harm::Payload => 21,
                _ => frame.len() / 2,
            };
            if let Some(end) = self.harm(harm, &mut frame, at, to)? {
                return Ok(end);
            }
        }
    }

    /// Forwards bytes until the end.
    fn bytes(&self, way: Way, number: usize) -> std::io::Result<End> {
        let (mut from, mut to) = self.ends(way);
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = from.read(&mut buffer)?;
            if count == 0 {
                return Ok(End::Said);
            }
            if self.stalled.load(Ordering::SeqCst) {
                return Ok(End::Stalled);
            }
            let part = &mut buffer[..count];
            let Some((harm, at)) = self.shared.at_bytes(number, way, count) else {
                to.write_all(part)?;
                continue;
            };
            if let Some(end) = self.harm(harm, part, at, to)? {
                return Ok(end);
            }
        }
    }

    /// Does harm to what comes next, at its byte `at`; goes on when that is no end.
    fn harm(
        &self,
        harm: Harm,
        part: &mut [u8],
        at: usize,
        mut to: &TcpStream,
    ) -> std::io::Result<Option<End>> {
        match harm {
            Harm::Cut => return Ok(Some(End::Closed)),
            Harm::CutWithin => {
                to.write_all(&part[..at])?;
                return Ok(Some(End::Closed));
            }
            Harm::CutBehind => {
                to.write_all(part)?;
                return Ok(Some(End::Closed));
            }
            Harm::Stall => {
                self.stalled.store(true, Ordering::SeqCst);
                return Ok(Some(End::Stalled));
            }
            Harm::Hold => {
                std::thread::sleep(HELD);
                to.write_all(part)?;
            }
            Harm::Header | Harm::Payload => {
                part[at] ^= 0x10;
                to.write_all(part)?;
            }
            Harm::KillSource => {
                (self.shared.kill)(harm);
                to.write_all(part)?;
            }
            Harm::KillDestination => {
                to.write_all(part)?;
                (self.shared.kill)(harm);
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says all of it, or as much as a proxy that cuts the connection takes.
    fn speak(stream: &mut TcpStream, words: &[u8]) {
        let said = stream.write_all(words);
        let _cut = said.and_then(|()| stream.shutdown(Shutdown::Write));
    }

    /// A conversation of one frame each way through a proxy; what arrives on each side.
    fn conversation(fault: Option<Fault>) -> (Vec<u8>, Vec<u8>, Trace) {
        let destination = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = destination.local_addr().unwrap().port();
        let target = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        let proxy = Proxy::new(target, fault, Box::new(|_| {})).unwrap();
        let mut words = vec![0; PREAMBLE + HEADER];
        words[10] = 1;
        (words[PREAMBLE], words[PREAMBLE + 4]) = (3, 7);
        words.extend(b"abc");
        let said = words.clone();
        let other = std::thread::spawn(move || {
            let (mut stream, _) = destination.accept().unwrap();
            speak(&mut stream, &said);
            let mut heard = Vec::new();
            let _ = stream.read_to_end(&mut heard);
            heard
        });
        let mut stream = TcpStream::connect(proxy.address()).unwrap();
        speak(&mut stream, &words);
        let mut heard = Vec::new();
        let _ = stream.read_to_end(&mut heard);
        (other.join().unwrap(), heard, proxy.trace())
    }

    fn fault(harm: Harm) -> Option<Fault> {
        let point = Point::Frame {
            way: Way::ToDestination,
            kind: 7,
            skip: 0,
        };
        Some(Fault { point, harm })
    }

    #[test]
    fn frames_are_counted_by_way_and_kind() {
        let (there, _, trace) = conversation(None);
        assert_eq!(there[PREAMBLE + HEADER..], *b"abc");
        assert_eq!(trace.frames[&(Way::ToDestination, 7)], 1);
        assert_eq!(trace.passed, trace.frames);
        let (.., trace) = conversation(fault(Harm::Cut));
        assert_eq!(trace.frames[&(Way::ToDestination, 7)], 1);
        assert!(!trace.passed.contains_key(&(Way::ToDestination, 7)));
    }

    #[test]
    fn harm_is_done_at_the_named_frame() {
        let (cut, ..) = conversation(fault(Harm::Cut));
        assert_eq!(cut.len(), PREAMBLE);
        let (within, ..) = conversation(fault(Harm::CutWithin));
        assert_eq!(within.len(), PREAMBLE + (HEADER + 3) / 2);
        let (flipped, ..) = conversation(fault(Harm::Payload));
        assert_eq!(flipped[PREAMBLE + HEADER..], *b"arc");
    }
}
