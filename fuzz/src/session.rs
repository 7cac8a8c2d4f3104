//! What a peer may say to a destination, live: on its control connection and on page lanes.
//!
//! An input is a script, one step after the other:
//!
//! | first byte, modulo 10 | step |
//! |---|---|
//! | 0 | a frame: kind, length (1 byte), content |
//! | 1 | the next message of a good move |
//! | 2 | a page lane is opened: its number |
//! | 3 | bytes on the last lane, as they are: length, content |
//! | 4 | a message on the last lane: length, content |
//! | 5 | pages on the last lane: where to (2 bytes, in pages), how many |
//! | 6 | bytes on the control connection, as they are: length, content |
//! | 7 | the lane's mark of the round, which follows from what was sent |
//! | 8 | the connections of a post-copy, and which pages are missing: bits of the first (1 byte) |
//! | 9 | a message on the urgent lane of the post-copy: length, content |
//!
//! The destination is a real one, over unix sockets. Shared by the fuzz target and the test that
//! runs its
//! regression corpus.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dunlin_guest::PageIndex;
use dunlin_lane::{PageSender, Placement, StreamLane, StreamSender};
use dunlin_migration::protocol::message::{
    Attempt, Configuration, Lanes, Missing, Region, RoundBegin, RoundEnd, States,
};
use dunlin_migration::protocol::runs::Run;
use dunlin_migration::protocol::{Header, Kind, Message, Preamble, Purpose, Token, lane};
use dunlin_migration::transport::{Listener, SocketTransport};
use dunlin_migration::{CancelToken, Destination, DestinationOptions, Userfaultfd};

use super::saved::{Machine, RAM};

/// For everything: nothing is far away.
const PATIENCE: Duration = Duration::from_millis(50);

/// For the destination's threads to end, where leaks are looked for.
const ENDED: Duration = Duration::from_secs(2);
/// Whoever plays a script waits until the destination's threads have ended: for a process that has no
/// others, and in which leaks are looked for.
pub static WAITS: AtomicBool = AtomicBool::new(false);

/// Plays a script to a destination that listens in `folder`; returns what that said on the control
/// connection.
pub fn play(script: &[u8], folder: &Path) -> Vec<u8> {
    let threads = threads();
    let door = folder.join("door");
    let listener = Listener::unix(&door).expect("the folder is there");
    let cancel = CancelToken::new();
    let options = DestinationOptions {
        max_ram: RAM,
        idle_timeout: PATIENCE,
        preamble_timeout: PATIENCE,
        reconnect_window: PATIENCE,
        max_lanes: 2,
        faults: faults(),
        cancel: cancel.clone(),
    };
    let destination = std::thread::spawn(move || {
        let arrival = Destination::new(listener, options).accept(|_| Ok(Machine::new()));
        if let Ok(arrival) = arrival {
            if let Some(following) = arrival.following {
                following.end("the script is over");
            }
            arrival.witness.stop();
        }
    });
    let heard = Peer::connect(&door).map(|mut peer| peer.play(script));
    cancel.cancel();
    destination
        .join()
        .expect("whatever a peer says, the destination does not panic");
    let _gone = std::fs::remove_file(&door);
    // What a thread that is about to end still has is no leak.
    let patience = Instant::now() + ENDED;
    while WAITS.load(Ordering::Relaxed) && self::threads() > threads && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(1));
    }
    heard.unwrap_or_default()
}

/// Threads of this process.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

struct Peer<'a> {
    door: &'a Path,
    token: Token,
    control: UnixStream,
    sequence: u64,
    lane: Option<UnixStream>,
    sender: Option<StreamSender>,
    good: usize,
    counts: lane::Counts,
    /// Sets of connections of a post-copy, and what there is of the last.
    generation: u32,
    post_copy: Vec<UnixStream>,
    urgent: Option<StreamSender>,
}

/// Serves faults, where the host permits it.
fn faults() -> Result<Arc<Userfaultfd>, String> {
    static FAULTS: OnceLock<Result<Arc<Userfaultfd>, String>> = OnceLock::new();
    let open = || {
        Userfaultfd::open()
            .map(Arc::new)
            .map_err(|error| error.to_string())
    };
    FAULTS.get_or_init(open).clone()
}

impl<'a> Peer<'a> {
    fn connect(door: &'a Path) -> Option<Self> {
        let token = Token::from_bytes([7; 16]);
        let control = greet(door, Preamble::connection(Purpose::Move, token))?;
        Some(Self {
            door,
            token,
            control,
            sequence: 0,
            lane: None,
            sender: None,
            good: 0,
            counts: lane::Counts::default(),
            generation: 0,
            post_copy: Vec::new(),
            urgent: None,
        })
    }

    fn play(&mut self, mut script: &[u8]) -> Vec<u8> {
        while let [step, rest @ ..] = script {
            script = match step % 10 {
                0 => self.frame(rest),
                1 => self.good_message(rest),
                2 => self.open_lane(rest),
                3 => self.lane_bytes(rest),
                4 => self.lane_message(rest),
                5 => self.lane_pages(rest),
                6 => {
                    let (bytes, next) = counted(rest);
                    let _ = self.control.write_all(bytes);
                    next
                }
                7 => self.mark(rest),
                8 => self.leave(rest),
                _ => self.urgent_message(rest),
            };
        }
        // The destination hangs up, or finds that nothing more comes.
        let _ = self.control.shutdown(Shutdown::Write);
        let mut heard = Vec::new();
        let _ = self.control.read_to_end(&mut heard);
        heard
    }

    fn frame<'s>(&mut self, script: &'s [u8]) -> &'s [u8] {
        let Some((kind, rest)) = script.split_first() else {
            return script;
        };
        let (payload, next) = counted(rest);
        self.say(Kind::ALL[usize::from(*kind) % Kind::ALL.len()], payload);
        next
    }

    fn say(&mut self, kind: Kind, payload: &[u8]) {
        let header = Header {
            length: payload.len() as u32,
            kind,
            sequence: self.sequence,
            payload_crc: crc32fast::hash(payload),
        };
        self.sequence += 1;
        // It may have hung up: that is an answer, too.
        let _ = self.control.write_all(&header.encode());
        let _ = self.control.write_all(payload);
    }

    fn good_message<'s>(&mut self, script: &'s [u8]) -> &'s [u8] {
        let region = Region {
            start: 0,
            size: RAM,
            offset: 0,
        };
        let round = (self.good / 2) as u32;
        let message = match self.good {
            0 => Message::Configuration(Configuration {
                ram_bytes: RAM,
                regions: vec![region],
                lanes: 2,
                ..Configuration::default()
            }),
            1 => Message::Lanes(Lanes { count: 1 }),
            number if number % 2 == 0 => Message::RoundBegin(RoundBegin {
                round: round - 1,
                pages: RAM / 4096,
            }),
            _ => Message::RoundEnd(RoundEnd {
                round: round - 1,
                pages: self.counts.pages,
                zero_pages: 0,
                same_pages: 0,
                lanes: 1,
            }),
        };
        self.good += 1;
        self.say(message.kind(), &message.encode());
        script
    }

    fn open_lane<'s>(&mut self, script: &'s [u8]) -> &'s [u8] {
        let Some((number, next)) = script.split_first() else {
            return script;
        };
        let preamble = Preamble {
            lane: u16::from(*number),
            ..Preamble::connection(Purpose::Lane, self.token)
        };
        self.lane = greet(self.door, preamble);
        self.sender = self.lane.as_ref().and_then(sender);
        next
    }

    fn lane_bytes<'s>(&mut self, script: &'s [u8]) -> &'s [u8] {
        let (bytes, next) = counted(script);
        if let Some(lane) = &mut self.lane {
            let _ = lane.write_all(bytes);
        }
        next
    }

    fn lane_message<'s>(&mut self, script: &'s [u8]) -> &'s [u8] {
        let (bytes, next) = counted(script);
        if let Some(sender) = &mut self.sender {
            let _ = sender.send(bytes, Instant::now() + PATIENCE);
        }
        next
    }

    fn lane_pages<'s>(&mut self, script: &'s [u8]) -> &'s [u8] {
        let [low, high, count, next @ ..] = script else {
            return &[];
        };
        let target = u64::from(u16::from_le_bytes([*low, *high])) * 4096;
        let soon = Instant::now() + PATIENCE;
        let round = self.round();
        if let Some(sender) = &mut self.sender
            && let Ok(mut buffer) = sender.buffer(soon)
        {
            let length = usize::from(*count % 8) * 4096;
            if let Some(room) = buffer.extend(length) {
                room.fill(*low);
            }
            let length = length as u32;
            let _ = sender.write(buffer, &[Placement { target, length }], soon);
            let run = Run {
                first: PageIndex(target / 4096),
                count: u32::from(*count % 8),
            };
            let mut message = Vec::new();
            lane::encode_pages(round, &[run], &[], 0, &mut message);
            let _ = sender.send(&message, soon);
            self.counts.pages += u64::from(run.count);
        }
        next
    }

    /// The round that has begun.
    fn round(&self) -> u32 {
        (self.good / 2).saturating_sub(1) as u32
    }

    /// The guest is to change hands before its memory.
    fn leave<'s>(&mut self, script: &'s [u8]) -> &'s [u8] {
        let Some((bits, next)) = script.split_first() else {
            return script;
        };
        self.generation += 1;
        // Requests, the urgent lane, a bulk lane.
        let links = (1..=3).map_while(|number| {
            let preamble = Preamble {
                body_length: self.generation.into(),
                lane: number,
                ..Preamble::connection(Purpose::PostCopy, self.token)
            };
            greet(self.door, preamble)
        });
        self.post_copy = links.collect();
        self.urgent = self.post_copy.get(1).and_then(sender);
        let attempt = self.generation;
        let mut bitmap = vec![0; (RAM / 4096 / 8) as usize];
        if let Some(first) = bitmap.first_mut() {
            *first = *bits;
        }
        let messages = [
            Message::SwitchOver(Attempt { attempt }),
            Message::Missing(Missing {
                count: bits.count_ones().into(),
                bitmap,
                packed: false,
                attempt,
                generation: self.generation,
                bulk_lanes: 1,
            }),
            Message::States(States {
                attempt,
                ..States::default()
            }),
            Message::Commit(Attempt { attempt }),
        ];
        for message in messages {
            self.say(message.kind(), &message.encode());
        }
        next
    }

    fn urgent_message<'s>(&mut self, script: &'s [u8]) -> &'s [u8] {
        let (bytes, next) = counted(script);
        if let Some(urgent) = &mut self.urgent {
            let _ = urgent.send(bytes, Instant::now() + PATIENCE);
        }
        next
    }

    fn mark<'s>(&mut self, script: &'s [u8]) -> &'s [u8] {
        let mut message = Vec::new();
        lane::encode_mark(self.round(), self.counts, &mut message);
        if let Some(sender) = &mut self.sender {
            let _ = sender.send(&message, Instant::now() + PATIENCE);
        }
        script
    }
}

/// A page lane over a connection.
fn sender(stream: &UnixStream) -> Option<StreamSender> {
    let transport = SocketTransport::unix(stream.try_clone().ok()?, "the peer").ok()?;
    let transport = Box::new(transport);
    Some(StreamSender::new(transport, StreamLane::default()))
}

/// A connection with its preamble said and answered.
fn greet(door: &Path, preamble: Preamble) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(door).ok()?;
    stream.set_read_timeout(Some(2 * PATIENCE)).ok()?;
    stream.set_write_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(&preamble.encode()).ok()?;
    stream.read_exact(&mut [0; 64]).ok()?;
    Some(stream)
}

/// As many bytes as the first one says, and what follows.
fn counted(script: &[u8]) -> (&[u8], &[u8]) {
    match script.split_first() {
        Some((length, rest)) => rest.split_at(rest.len().min(usize::from(*length))),
        None => (&[], &[]),
    }
}
