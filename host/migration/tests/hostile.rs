//! What a peer may say: garbage, silence, lies. None of it panics, blocks or starts a guest.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dunlin_lane::{PageSender, Placement, StreamLane, StreamSender};
use dunlin_migration::protocol::message::{
    Attempt, Configuration, Lanes, Region, RoundBegin, RoundEnd, States,
};
use dunlin_migration::protocol::{
    Header, Kind, Message, Preamble, ProtocolError, Purpose, Token, lane, runs,
};
use dunlin_migration::transport::{
    Listener, PeerProcess, SocketTransport, TcpConnector, UnixConnector,
};
use dunlin_migration::{DestinationMachine, MigrationError, MigrationOptions, Source, Whereabouts};
use proptest::prelude::*;
use support::proxy::{Fault, Harm, Place, Proxy, Way};
use support::{Conduct, Load, SourceSide, UnixPlace, options, wait_on};

/// A peer that says what the test wants.
struct Liar {
    stream: UnixStream,
    sequence: u64,
    token: Token,
    lane: Option<StreamSender>,
}

impl Liar {
    fn connect(place: &UnixPlace) -> Self {
        let mut stream = UnixStream::connect(place.door()).unwrap();
        let token = Token::random().unwrap();
        let preamble = Preamble::connection(Purpose::Move, token);
        stream.write_all(&preamble.encode()).unwrap();
        let mut answer = [0; 64];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(Preamble::decode(&answer).unwrap(), preamble);
        Self {
            stream,
            sequence: 0,
            token,
            lane: None,
        }
    }

    /// As `connect`, and the destination has built a machine of 1 MiB.
    fn configured(place: &UnixPlace) -> Self {
        let mut liar = Self::connect(place);
        liar.say(&configuration(1 << 20, 1 << 20));
        // `Ready` says that lanes may come.
        let mut ready = [0; 24];
        liar.stream.read_exact(&mut ready).unwrap();
        let header = Header::decode(&ready, 0).unwrap();
        let mut body = vec![0; header.length as usize];
        liar.stream.read_exact(&mut body).unwrap();
        liar
    }

    /// As `configured`, and a page lane is open.
    fn with_lane(place: &UnixPlace) -> Self {
        let mut liar = Self::configured(place);
        liar.open_lane(place, 0);
        liar.say(&Message::Lanes(Lanes { count: 1 }));
        liar
    }

    fn open_lane(&mut self, place: &UnixPlace, lane: u16) {
        let mut stream = UnixStream::connect(place.door()).unwrap();
        let preamble = Preamble {
            lane,
            ..Preamble::connection(Purpose::Lane, self.token)
        };
        stream.write_all(&preamble.encode()).unwrap();
        let _ = stream.read_exact(&mut [0; 64]);
        let transport = SocketTransport::unix(stream, "the liar").unwrap();
        self.lane = Some(StreamSender::new(
            Box::new(transport),
            StreamLane::default(),
        ));
    }

    /// Says something on the lane.
    fn page_message(&mut self, message: &[u8]) {
        let soon = Instant::now() + Duration::from_secs(5);
        let _ = self.lane.as_mut().unwrap().send(message, soon);
    }

    /// Writes pages by the lane.
    fn page_write(&mut self, target: u64, pages: usize) {
        let soon = Instant::now() + Duration::from_secs(5);
        let lane = self.lane.as_mut().unwrap();
        let mut buffer = lane.buffer(soon).unwrap();
        buffer.extend(pages * 4096).unwrap().fill(1);
        let length = (pages * 4096) as u32;
        let _ = lane.write(buffer, &[Placement { target, length }], soon);
    }

    /// The destination may have hung up already: that is an answer, too.
    fn frame(&mut self, kind: Kind, payload: &[u8]) {
        let header = Header {
            length: payload.len() as u32,
            kind,
            sequence: self.sequence,
            payload_crc: crc32fast::hash(payload),
        };
        self.sequence += 1;
        let _ = self.stream.write_all(&header.encode());
        let _ = self.stream.write_all(payload);
    }

    fn say(&mut self, message: &Message) {
        self.frame(message.kind(), &message.encode());
    }

    /// Everything that the destination says until it hangs up, as text.
    fn last_words(mut self) -> String {
        let mut words = Vec::new();
        let _ = self.stream.read_to_end(&mut words);
        String::from_utf8_lossy(&words).into_owned()
    }
}

fn configuration(claimed: u64, built: u64) -> Message {
    Message::Configuration(Configuration {
        machine: built.to_le_bytes().to_vec(),
        ram_bytes: claimed,
        regions: vec![Region {
            start: 0,
            size: claimed,
            offset: 0,
        }],
        verification: 0,
        lanes: 1,
    })
}

/// After all that, an honest guest can still come.
fn still_works(place: UnixPlace) {
    assert_eq!(place.waiting.starts(), 0);
    let mut machine = SourceSide::running(Load::SMALL);
    Source::new(options())
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    let arrival = place.waiting.arrival();
    arrival.machine.assert_runs_whole();
}

#[test]
fn garbage_silence_and_half_open_peers_do_not_hold_up_a_guest() {
    let listener = Listener::tcp(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = listener.tcp_address().unwrap();
    let waiting = wait_on(listener, Conduct::default());
    // Silent ones stay open for the whole test.
    let _silent: Vec<_> = (0..8)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    for n in 0..4u8 {
        let mut garbage = TcpStream::connect(address).unwrap();
        let _ = garbage.write_all(&vec![n; 5000]);
    }
    let mut half = TcpStream::connect(address).unwrap();
    half.write_all(b"DUNLIN").unwrap();
    let mut machine = SourceSide::running(Load::SMALL);
    Source::new(options())
        .run(&mut machine, &mut TcpConnector::new(address))
        .unwrap();
    waiting.arrival().machine.assert_runs_whole();
}

#[test]
fn another_version_is_answered_with_ours() {
    let place = UnixPlace::new(Conduct::default());
    let mut stream = UnixStream::connect(place.door()).unwrap();
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(b"DUNLIN\x1aM");
    bytes[8] = 77;
    stream.write_all(&bytes).unwrap();
    stream.read_exact(&mut bytes).unwrap();
    Preamble::decode(&bytes).unwrap();
    still_works(place);
}

#[test]
fn a_destination_of_another_version_is_named_with_both_versions() {
    let directory = tempfile::tempdir().unwrap();
    let door = directory.path().join("door");
    let listener = UnixListener::bind(&door).unwrap();
    let old = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = [0; 64];
        stream.read_exact(&mut bytes).unwrap();
        bytes[8] = 9;
        stream.write_all(&bytes).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let mut machine = SourceSide::running(Load::SMALL);
    let failure = Source::new(options())
        .run(&mut machine, &mut UnixConnector::new(door))
        .unwrap_err();
    assert!(matches!(
        failure.error,
        MigrationError::Protocol(ProtocolError::Version { theirs: 9, ours: 2 })
    ));
    machine.assert_runs_whole();
    old.join().unwrap();
}

#[test]
fn lies_are_refused_with_a_reason_and_start_nothing() {
    let place = UnixPlace::new(Conduct::default());
    let attempt = |attempt| Attempt { attempt };
    let begin = |round, pages| Message::RoundBegin(RoundBegin { round, pages });
    let pages_message = |first: u64, count: u32| {
        let run = runs::Run {
            first: dunlin_guest::PageIndex(first),
            count,
        };
        let mut message = Vec::new();
        lane::encode_pages(0, &[run], &[], 0, &mut message);
        message
    };
    let end = |pages, lanes| {
        Message::RoundEnd(RoundEnd {
            round: 0,
            pages,
            lanes,
            ..RoundEnd::default()
        })
    };
    let mark = |pages| {
        let counts = lane::Counts {
            pages,
            ..lane::Counts::default()
        };
        let mut message = Vec::new();
        lane::encode_mark(0, counts, &mut message);
        message
    };
    type Lie<'a> = Box<dyn Fn(&mut Liar) + 'a>;
    let lies: Vec<(&str, Lie<'_>)> = vec![
        ("Commit", Box::new(|l| l.say(&Message::Commit(attempt(1))))),
        (
            "States",
            Box::new(|l| l.say(&Message::States(States::default()))),
        ),
        (
            "Configuration",
            Box::new(|l| l.say(&configuration(1 << 20, 1 << 20))),
        ),
        (
            "Running",
            Box::new(|l| l.say(&Message::Running(Default::default()))),
        ),
        ("no round", Box::new(|l| l.say(&end(0, 1)))),
        ("RoundBegin", Box::new(|l| l.say(&begin(3, 1)))),
        (
            "more pages than RAM",
            Box::new(|l| l.say(&begin(0, u64::MAX))),
        ),
        (
            "run of 1 pages from page 256",
            Box::new(|l| l.page_message(&pages_message(256, 1))),
        ),
        (
            "pages with content, at most",
            Box::new(|l| l.page_message(&pages_message(0, 200))),
        ),
        (
            "outside of what was granted",
            Box::new(|l| l.page_write(1 << 20, 1)),
        ),
        (
            "outside of what was granted",
            Box::new(|l| l.page_write((1 << 20) - 4096, 2)),
        ),
        (
            "unknown kind",
            Box::new(|l| l.page_message(&[9, 0, 0, 0, 0, 0, 0, 0])),
        ),
        ("has not the length", Box::new(|l| l.page_message(&[]))),
        (
            "of 1 at most",
            Box::new(|l| {
                l.say(&begin(0, 1));
                l.page_message(&pages_message(0, 2));
                l.page_message(&mark(2));
                l.say(&end(2, 1));
            }),
        ),
        (
            "were announced",
            Box::new(|l| {
                l.say(&begin(0, 9));
                l.page_message(&pages_message(0, 2));
                l.page_message(&mark(2));
                l.say(&end(1, 1));
            }),
        ),
        (
            "other numbers than its lane",
            Box::new(|l| l.page_message(&mark(2))),
        ),
        (
            "on 2 lanes",
            Box::new(|l| {
                l.say(&begin(0, 1));
                l.say(&end(0, 2));
            }),
        ),
        (
            "SwitchOver",
            Box::new(|l| l.say(&Message::SwitchOver(attempt(7)))),
        ),
        (
            "SwitchOver",
            Box::new(|l| {
                l.say(&Message::SwitchOver(attempt(1)));
                l.say(&Message::SwitchOver(attempt(2)));
            }),
        ),
        (
            "Commit",
            Box::new(|l| {
                l.say(&Message::SwitchOver(attempt(1)));
                l.say(&Message::Commit(attempt(1)));
            }),
        ),
        (
            "restore",
            Box::new(|l| {
                l.say(&Message::SwitchOver(attempt(1)));
                let states = States {
                    attempt: 1,
                    ..States::default()
                };
                l.say(&Message::States(states));
            }),
        ),
        (
            "does not decode",
            Box::new(|l| l.frame(Kind::Back, &[0xff; 30])),
        ),
    ];
    for (reason, lie) in lies {
        let mut liar = Liar::with_lane(&place);
        lie(&mut liar);
        let words = liar.last_words();
        assert!(words.contains(reason), "{reason:?} not in {words:?}");
    }
    for count in [0, 2, u32::MAX] {
        let mut liar = Liar::configured(&place);
        liar.open_lane(&place, 0);
        liar.say(&Message::Lanes(Lanes { count }));
        let words = liar.last_words();
        assert!(words.contains("page lanes, 1 to 1"), "{words:?}");
    }
    for (reason, configuration) in [
        ("at most", configuration(u64::MAX, 1 << 20)),
        ("does not lie", configuration(2 << 20, 1 << 20)),
        ("reserve", configuration(1 << 20, 1)),
    ] {
        let mut liar = Liar::connect(&place);
        liar.say(&configuration);
        let words = liar.last_words();
        assert!(words.contains(reason), "{reason:?} not in {words:?}");
    }
    still_works(place);
}

#[test]
fn a_claimed_length_takes_no_memory_until_the_bytes_arrive() {
    let place = UnixPlace::new(Conduct::default());
    let before = resident_bytes();
    let mut liar = Liar::connect(&place);
    let header = Header {
        length: 64 << 20,
        kind: Kind::Configuration,
        sequence: 0,
        payload_crc: 0,
    };
    liar.stream.write_all(&header.encode()).unwrap();
    // More than a socket holds, so that part of it has been read when this returns.
    liar.stream.write_all(&vec![0; 4 << 20]).unwrap();
    assert!(resident_bytes() < before + (32 << 20));
    drop(liar);
    still_works(place);
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn a_destination_that_talks_nonsense_costs_the_source_nothing() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(40));
    let machine = std::cell::RefCell::new(SourceSide::running(Load::SMALL));
    let bytes = proptest::collection::vec(any::<u8>(), 0..300);
    let whole_frames = proptest::collection::vec(
        (
            proptest::sample::select(Kind::ALL),
            proptest::collection::vec(any::<u8>(), 0..20),
        ),
        0..6,
    );
    runner
        .run(&(whole_frames, bytes), |(frames, bytes)| {
            let directory = tempfile::tempdir().unwrap();
            let door = directory.path().join("door");
            let listener = UnixListener::bind(&door).unwrap();
            let fool = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut preamble = [0; 64];
                stream.read_exact(&mut preamble).unwrap();
                stream.write_all(&preamble).unwrap();
                let mut liar = Liar {
                    stream,
                    sequence: 0,
                    token: Token::random().unwrap(),
                    lane: None,
                };
                for (kind, payload) in frames {
                    liar.frame(kind, &payload);
                }
                let _ = liar.stream.write_all(&bytes);
            });
            let mut machine = machine.borrow_mut();
            let failure = Source::new(options())
                .run(&mut *machine, &mut UnixConnector::new(door))
                .unwrap_err();
            assert_eq!(failure.guest, Whereabouts::RunsHere);
            fool.join().unwrap();
            Ok(())
        })
        .unwrap();
    machine.borrow().assert_runs_whole();
}

#[test]
fn random_frames_at_a_destination_start_nothing() {
    let place = UnixPlace::new(Conduct::default());
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(100));
    let frames = proptest::collection::vec(
        (
            proptest::sample::select(Kind::ALL),
            proptest::collection::vec(any::<u8>(), 0..40),
        ),
        1..8,
    );
    runner
        .run(&frames, |frames| {
            let mut liar = Liar::with_lane(&place);
            for (kind, payload) in frames {
                liar.frame(kind, &payload);
            }
            let _ = liar.stream.shutdown(std::net::Shutdown::Write);
            liar.last_words();
            Ok(())
        })
        .unwrap();
    still_works(place);
}

/// A destination in a process of its own, which can really be killed.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const DOOR: &str = "DUNLIN_TEST_DOOR";

/// Not a test of its own: the body of the process below.
#[test]
fn child_destination() {
    let Some(door) = std::env::var_os(DOOR) else {
        return;
    };
    let listener = Listener::unix(std::path::Path::new(&door)).unwrap();
    println!("listening");
    let arrival = wait_on(listener, Conduct::default()).arrival();
    // Runs until it is killed, or the test lets go of its input.
    let _ = std::io::stdin().read(&mut [0]);
    assert!(arrival.machine.memory().size() > 0);
    arrival.witness.stop();
}

fn spawn_destination(door: &std::path::Path) -> Process {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_destination", "--nocapture"])
        .env(DOOR, door)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut process = Process(child);
    let mut said = String::new();
    let output = process.0.stdout.as_mut().unwrap();
    let mut byte = [0];
    while !said.contains("listening") {
        assert_eq!(
            output.read(&mut byte).unwrap(),
            1,
            "the child ended: {said}"
        );
        said.push(byte[0] as char);
    }
    process
}

#[test]
fn a_destination_killed_at_any_message_leaves_a_whole_guest_at_the_source() {
    let to_destination = [
        Kind::Configuration,
        Kind::Lanes,
        Kind::KeepAlive,
        Kind::RoundBegin,
        Kind::RoundEnd,
        Kind::SwitchOver,
        Kind::States,
        Kind::Commit,
    ];
    let to_source = [Kind::Ready, Kind::Stored, Kind::Prepared, Kind::Running];
    let faults = to_destination
        .map(|kind| (Way::ToDestination, kind))
        .into_iter()
        .chain(to_source.map(|kind| (Way::ToSource, kind)));
    for (way, kind) in faults {
        let directory = tempfile::tempdir().unwrap();
        let door = directory.path().join("door");
        let mut process = spawn_destination(&door);
        let pid = process.0.id();
        let fault = Fault {
            way,
            place: Place::Frame(kind),
            skip: 0,
            harm: Harm::Cut,
        };
        let watched = PeerProcess::open(pid).unwrap();
        let kill = Box::new(move || {
            process.0.kill().unwrap();
            process.0.wait().unwrap();
        });
        let proxy = Proxy::with_action(directory.path(), door, Some(fault), Some(kill));
        let mut connector = UnixConnector::new(&proxy.door).with_process(watched);
        let mut machine = SourceSide::running(Load {
            ram: 1 << 20,
            ..Load::SMALL
        });
        let options = MigrationOptions {
            idle_timeout: Duration::from_secs(3),
            ..options()
        };
        let failure = Source::new(options)
            .run(&mut machine, &mut connector)
            .unwrap_err();
        assert!(proxy.hit(), "{kind:?}");
        assert_eq!(
            failure.guest,
            Whereabouts::RunsHere,
            "{kind:?}: {failure:?}"
        );
        machine.assert_runs_whole();
        let place = UnixPlace::new(Conduct::default());
        Source::new(support::options())
            .run(&mut machine, place.connector().as_mut())
            .unwrap();
        place.waiting.arrival().machine.assert_runs_whole();
    }
}
