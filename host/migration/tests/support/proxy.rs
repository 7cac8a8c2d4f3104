//! Stands between source and destination and does harm at one frame of their conversation.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dunlin_migration::protocol::{Header, Kind, Preamble, Purpose};
use dunlin_migration::transport::{DescriptorTransport, Transport, TransportError};

/// Which way a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToDestination,
    ToSource,
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harm {
    /// The connection ends before it.
    Cut,
    /// The connection ends in its middle.
    CutWithin,
    /// It passes, and the connection ends.
    CutBehind,
    /// From it on nothing moves any more, in both directions.
    Stall,
    /// A bit of its header flips.
    Header,
    /// A bit of its payload flips; of its header when it has no payload.
    Payload,
    /// It comes twice.
    Twice,
    /// It is left out.
    Lost,
}

/// Which connection, and what on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A frame of the control connection.
    Frame(Kind),
    /// A piece of what a page lane carries: as much as was read at once.
    Lane(u16),
}

/// Harm at one place of the first session: the one that comes after `skip` others of the kind.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    pub way: Way,
    pub place: Place,
    pub skip: u64,
    pub harm: Harm,
}

/// What the proxy does when it comes to the frame.
pub type Action = Box<dyn FnOnce() + Send>;

struct Shared {
    door: PathBuf,
    fault: Option<Fault>,
    action: Mutex<Option<Action>>,
    hit: AtomicBool,
    sessions: AtomicU64,
    gate: AtomicBool,
    /// Kept open until the proxy goes away: a stalled connection does not end.
    stalled: Mutex<Vec<UnixStream>>,
}

/// Listens beside the destination's socket.
pub struct Proxy {
    shared: Arc<Shared>,
    pub door: PathBuf,
}

impl Proxy {
    pub fn new(directory: &Path, destination: PathBuf, fault: Option<Fault>) -> Self {
        Self::with_action(directory, destination, fault, None)
    }

    /// Runs `action` at the frame of `fault`, before the harm.
    pub fn with_action(
        directory: &Path,
        destination: PathBuf,
        fault: Option<Fault>,
        action: Option<Action>,
    ) -> Self {
        let door = directory.join("proxy");
        let listener = UnixListener::bind(&door).unwrap();
        let shared = Arc::new(Shared {
            door: destination,
            fault,
            action: Mutex::new(action),
            hit: AtomicBool::new(false),
            sessions: AtomicU64::new(0),
            gate: AtomicBool::new(false),
            stalled: Mutex::new(Vec::new()),
        });
        let theirs = Arc::clone(&shared);
        // Ends with the listener's last connection, or the test process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(source) = stream else { break };
                if theirs.gate.load(Ordering::SeqCst) {
                    break;
                }
                theirs.connect(source);
            }
        });
        Self { shared, door }
    }

    /// Did the conversation come as far as the fault?
    pub fn hit(&self) -> bool {
        self.shared.hit.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.gate.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.door);
        for stream in self.shared.stalled.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    fn connect(self: &Arc<Self>, mut source: UnixStream) {
        let mut preamble = [0; 64];
        if source.read_exact(&mut preamble).is_err() {
            return;
        }
        let said = Preamble::decode(&preamble).expect("the source speaks the protocol");
        if matches!(said.purpose, Purpose::Move | Purpose::HandOver) {
            self.sessions.fetch_add(1, Ordering::SeqCst);
        }
        let lane = (said.purpose == Purpose::Lane).then_some(said.lane);
        let first = self.sessions.load(Ordering::SeqCst) == 1;
        let fault = self.fault.filter(|fault| {
            first
                && match fault.place {
                    Place::Frame(_) => {
                        matches!(said.purpose, Purpose::Move | Purpose::HandOver)
                    }
                    Place::Lane(number) => lane == Some(number),
                }
        });
        // A dead destination is a connection that ends at once.
        let Ok(mut destination) = UnixStream::connect(&self.door) else {
            return;
        };
        if destination.write_all(&preamble).is_err() {
            return;
        }
        let stalled = Arc::new(AtomicBool::new(false));
        for (from, to, way) in [
            (&source, &destination, Way::ToDestination),
            (&destination, &source, Way::ToSource),
        ] {
            let direction = Direction {
                shared: Arc::clone(self),
                way,
                from: End::new(from),
                to: End::new(to),
                fault: fault.filter(|fault| fault.way == way),
                stalled: Arc::clone(&stalled),
                pages: lane.is_some(),
            };
            std::thread::spawn(move || direction.run());
        }
    }
}

/// One end of a connection; descriptors go along.
struct End {
    stream: UnixStream,
    transport: DescriptorTransport,
}

impl End {
    fn new(stream: &UnixStream) -> Self {
        let stream = stream.try_clone().unwrap();
        let transport = DescriptorTransport::new(stream.try_clone().unwrap(), "proxied").unwrap();
        Self { stream, transport }
    }

    /// As long as a test may take.
    fn patience() -> Instant {
        Instant::now() + Duration::from_secs(600)
    }

    fn read(&mut self, into: &mut [u8]) -> Result<usize, TransportError> {
        self.transport
            .read(&mut [IoSliceMut::new(into)], Self::patience())
    }

    fn read_exact(&mut self, mut into: &mut [u8]) -> Result<(), TransportError> {
        while !into.is_empty() {
            let count = self.read(into)?;
            into = &mut into[count..];
        }
        Ok(())
    }

    fn write_all(&mut self, mut from: &[u8]) -> Result<(), TransportError> {
        while !from.is_empty() {
            let count = self
                .transport
                .write(&[IoSlice::new(from)], Self::patience())?;
            from = &from[count..];
        }
        Ok(())
    }

    /// Descriptors that came in go out with the next byte.
    fn pass_descriptors(&mut self, to: &mut Self) -> Result<(), TransportError> {
        let descriptors = self.transport.detach();
        if descriptors.is_empty() {
            return Ok(());
        }
        to.transport.attach(descriptors)
    }
}

struct Direction {
    shared: Arc<Shared>,
    way: Way,
    from: End,
    to: End,
    fault: Option<Fault>,
    stalled: Arc<AtomicBool>,
    /// Is it a page lane, whose bytes are none of our business?
    pages: bool,
}

impl Direction {
    fn run(mut self) {
        let stays_open = self.forward().unwrap_or(false);
        if stays_open {
            let mut kept = self.shared.stalled.lock().unwrap();
            kept.push(self.from.stream);
            kept.push(self.to.stream);
        } else if !self.stalled.load(Ordering::SeqCst) {
            let _ = self.from.stream.shutdown(Shutdown::Both);
            let _ = self.to.stream.shutdown(Shutdown::Both);
        }
    }

    /// Forwards until the end; true when the connection stays open without a word.
    fn forward(&mut self) -> Result<bool, TransportError> {
        if self.to_source_begins() {
            let mut preamble = [0; 64];
            self.from.read_exact(&mut preamble)?;
            self.to.write_all(&preamble)?;
        }
        let mut seen = 0;
        for number in 0.. {
            let (piece, head, kind) = self.next_piece(number)?;
            if self.stalled.load(Ordering::SeqCst) {
                return Ok(true);
            }
            let meant = self.fault.filter(|fault| match fault.place {
                Place::Frame(wanted) => kind == Some(wanted),
                Place::Lane(_) => true,
            });
            seen += u64::from(meant.is_some());
            let Some(Fault { harm, .. }) = meant.filter(|fault| fault.skip + 1 == seen) else {
                self.to.write_all(&piece)?;
                continue;
            };
            self.shared.hit.store(true, Ordering::SeqCst);
            if let Some(action) = self.shared.action.lock().unwrap().take() {
                action();
            }
            if let Some(stays_open) = self.harm(harm, piece, head)? {
                return Ok(stays_open);
            }
        }
        Ok(false)
    }

    /// The other way's preamble was read before the connection was made.
    fn to_source_begins(&self) -> bool {
        self.way == Way::ToSource
    }

    /// The next frame, or what a lane has to give; how long its head is, and its kind.
    fn next_piece(
        &mut self,
        number: u64,
    ) -> Result<(Vec<u8>, usize, Option<Kind>), TransportError> {
        if self.pages {
            let mut piece = vec![0; 16 << 10];
            let count = self.from.read(&mut piece)?;
            piece.truncate(count);
            return Ok((piece, 0, None));
        }
        let mut head = [0; 24];
        self.from.read_exact(&mut head)?;
        let header = Header::decode(&head, number).expect("both ends speak the protocol");
        let mut frame = head.to_vec();
        frame.resize(24 + header.length as usize, 0);
        self.from.read_exact(&mut frame[24..])?;
        self.from.pass_descriptors(&mut self.to)?;
        Ok((frame, 24, Some(header.kind)))
    }

    /// Does harm to a piece; whether the connection stays open, when it is over.
    fn harm(
        &mut self,
        harm: Harm,
        mut piece: Vec<u8>,
        head: usize,
    ) -> Result<Option<bool>, TransportError> {
        let middle = piece.len() / 2;
        match harm {
            Harm::Cut => return Ok(Some(false)),
            Harm::CutWithin => {
                self.to.write_all(&piece[..middle])?;
                return Ok(Some(false));
            }
            Harm::CutBehind => {
                self.to.write_all(&piece)?;
                return Ok(Some(false));
            }
            Harm::Stall => {
                self.stalled.store(true, Ordering::SeqCst);
                return Ok(Some(true));
            }
            Harm::Header => piece[9.min(middle)] ^= 0x10,
            Harm::Payload => {
                let at = if piece.len() > head {
                    (head + piece.len()) / 2
                } else {
                    21
                };
                piece[at] ^= 0x04;
            }
            Harm::Twice => self.to.write_all(&piece)?,
            Harm::Lost => return Ok(None),
        }
        self.to.write_all(&piece)?;
        Ok(None)
    }
}
