//! Hand-overs within one host: RAM is shared, and exactly one side runs, whatever breaks.

#![expect(
    clippy::unwrap_used,
    reason = "a failed step fails the test, in helpers too"
)]

mod support;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_migration::handover::{
    Claimed, Guest, HandOverArrival, HandOverFailure, HandOverOptions, HandOverReport, hand_over,
};
use dunlin_migration::protocol::Kind;
use dunlin_migration::transport::{
    Connector, Fencing, Listener, TcpConnector, TransportError, UnixConnector,
};
use dunlin_migration::{
    CancelToken, Destination, DestinationMachine, DestinationOptions, MigrationError, Outcome,
    SourceMachine,
};
use support::proxy::{Fault, Harm, Place, Proxy, Way};
use support::{Conduct, DestinationSide, Load, SourceSide};

const LOAD: Load = Load {
    ram: 2 << 20,
    working_set: 200,
    pages_per_second: 4000.0,
};

/// A process that waits for the guest, on a thread.
struct NewProcess {
    directory: tempfile::TempDir,
    conduct: Arc<Conduct>,
    cancel: CancelToken,
    thread: JoinHandle<Result<HandOverArrival<DestinationSide>, MigrationError>>,
}

impl NewProcess {
    fn new(conduct: Conduct) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = Listener::unix_with_descriptors(&directory.path().join("door")).unwrap();
        let conduct = Arc::new(conduct);
        let cancel = CancelToken::new();
        let options = DestinationOptions {
            idle_timeout: Duration::from_millis(1500),
            preamble_timeout: Duration::from_millis(1000),
            cancel: cancel.clone(),
            ..DestinationOptions::default()
        };
        let theirs = Arc::clone(&conduct);
        let thread = std::thread::spawn(move || {
            Destination::new(listener, options).accept_hand_over(|configuration, descriptors| {
                DestinationSide::adopt(configuration, descriptors, Arc::clone(&theirs))
            })
        });
        Self {
            directory,
            conduct,
            cancel,
            thread,
        }
    }

    fn door(&self) -> PathBuf {
        self.directory.path().join("door")
    }

    fn connector(&self) -> Box<dyn Connector> {
        Box::new(UnixConnector::new(self.door()).with_descriptors())
    }

    fn starts(&self) -> usize {
        self.conduct.starts.load(Ordering::SeqCst)
    }

    fn arrival(self) -> HandOverArrival<DestinationSide> {
        self.thread.join().unwrap().unwrap()
    }

    fn end(self) {
        self.cancel.cancel();
        assert!(self.thread.join().unwrap().is_err());
    }
}

fn options() -> HandOverOptions {
    HandOverOptions {
        downtime_limit: Duration::from_secs(5),
        idle_timeout: Duration::from_millis(1500),
        inquiry_timeout: Duration::from_secs(5),
        ..HandOverOptions::default()
    }
}

fn run(
    machine: &mut SourceSide,
    connector: &mut dyn Connector,
    options: &HandOverOptions,
) -> Result<HandOverReport, Box<HandOverFailure>> {
    hand_over(machine, connector, options, CancelToken::new())
}

#[test]
fn a_guest_goes_on_in_the_same_memory_and_nothing_is_copied() {
    let new = NewProcess::new(Conduct::default());
    let mut machine = SourceSide::running(LOAD);
    let report = run(&mut machine, &mut *new.connector(), &options()).unwrap();
    assert_eq!(report.outcome, Outcome::Moved);
    assert_eq!(report.descriptors, ["ram", "right", "extra"]);
    assert!(report.switch_over.unwrap().state_bytes < LOAD.ram / 4);
    let counted = machine.guest.counter();
    let conduct = Arc::clone(&new.conduct);
    let arrival = new.arrival();
    assert_eq!(*conduct.descriptors.lock().unwrap(), ["extra"]);
    assert_eq!(arrival.leftovers.unwrap().body, b"history");
    arrival.machine.guest().wait_for_progress(10);
    assert!(arrival.machine.guest().counter() > counted);
    arrival.machine.assert_runs_whole();
    assert!(!machine.guest.is_running());
    // What the new machine writes, the old mapping shows: it is one memory.
    arrival.machine.guest().stop();
    let hash = |memory: &dunlin_guest::Memory| {
        let mut page = [0; 4096];
        (0..memory.pages()).fold(0u64, |hash, index| {
            memory.read_page(dunlin_guest::PageIndex(index), &mut page);
            (hash.rotate_left(7)) ^ u64::from(crc32fast::hash(&page))
        })
    };
    assert_eq!(
        hash(machine.memory()),
        hash(DestinationMachine::memory(&arrival.machine))
    );
    arrival.witness.wait();
}

/// Hands over through a proxy that does `fault`, and checks that exactly one side runs the guest.
/// `None` when the conversation ended before the fault, else whether the guest was handed over.
fn survives(fault: Fault) -> Option<bool> {
    let new = NewProcess::new(Conduct::default());
    let proxy = Proxy::new(new.directory.path(), new.door(), Some(fault));
    let mut machine = SourceSide::running(LOAD);
    let mut connector = UnixConnector::new(&proxy.door).with_descriptors();
    let impatient = HandOverOptions {
        downtime_limit: Duration::from_millis(400),
        idle_timeout: Duration::from_millis(250),
        connect_timeout: Duration::from_millis(500),
        tries: 3,
        ..options()
    };
    let result = run(&mut machine, &mut connector, &impatient);
    let handed_over = match result {
        Ok(report) => {
            assert_eq!(report.outcome, Outcome::Moved);
            assert_eq!(new.starts(), 1, "{fault:?}");
            assert!(!machine.guest.is_running());
            true
        }
        Err(failure) => {
            let guest = &failure.guest;
            assert_eq!(*guest, Guest::RunsHere, "{fault:?}: {failure:?}");
            assert_eq!(new.starts(), 0, "{fault:?}");
            machine.assert_runs_whole();
            false
        }
    };
    if handed_over {
        let arrival = new.arrival();
        arrival.machine.assert_runs_whole();
        arrival.witness.stop();
    } else {
        new.end();
        // What failed leaves nothing behind: the next one succeeds.
        let next = NewProcess::new(Conduct::default());
        run(&mut machine, &mut *next.connector(), &options()).unwrap();
        next.arrival().machine.assert_runs_whole();
    }
    // The last words may still be on their way.
    let begun = Instant::now();
    let last = matches!(fault.place, Place::Frame(Kind::Settled | Kind::Leftovers));
    while last && fault.skip == 0 && !proxy.hit() {
        assert!(begun.elapsed() < Duration::from_secs(5), "no last word");
        std::thread::yield_now();
    }
    proxy.hit().then_some(handed_over)
}

const TO_NEW: &[Kind] = &[
    Kind::Configuration,
    Kind::Descriptors,
    Kind::SwitchOver,
    Kind::States,
    Kind::Commit,
    Kind::Leftovers,
    Kind::Settled,
];

const TO_OLD: &[Kind] = &[Kind::Ready, Kind::Prepared, Kind::Running];

fn every_message(harm: Harm) {
    for (way, kinds) in [(Way::ToDestination, TO_NEW), (Way::ToSource, TO_OLD)] {
        for &kind in kinds {
            let fault = Fault {
                way,
                place: Place::Frame(kind),
                skip: 0,
                harm,
            };
            let outcome = survives(fault);
            eprintln!("{way:?} {harm:?} {kind:?}: handed over {outcome:?}");
            assert!(outcome.is_some(), "{kind:?} was never harmed");
        }
    }
}

macro_rules! harms {
    ($($name:ident: $harm:ident),* $(,)?) => { $(
        #[test]
        fn $name() {
            every_message(Harm::$harm);
        }
    )* };
}

harms! {
    a_cut_at_every_message_leaves_one_running_guest: Cut,
    a_cut_within_every_message_leaves_one_running_guest: CutWithin,
    a_cut_behind_every_message_leaves_one_running_guest: CutBehind,
    a_stall_at_every_message_leaves_one_running_guest: Stall,
    a_flipped_bit_in_every_header_leaves_one_running_guest: Header,
    a_flipped_bit_in_every_payload_leaves_one_running_guest: Payload,
    a_repetition_of_every_message_leaves_one_running_guest: Twice,
    a_loss_of_every_message_leaves_one_running_guest: Lost,
}

#[test]
fn a_machine_that_writes_memory_while_it_is_restored_is_not_given_the_guest() {
    let new = NewProcess::new(Conduct {
        scribbling: true,
        ..Conduct::default()
    });
    let mut machine = SourceSide::running(LOAD);
    let failure = run(&mut machine, &mut *new.connector(), &options()).unwrap_err();
    assert_eq!(failure.guest, Guest::RunsHere);
    let text = std::error::Error::source(&*failure).unwrap().to_string();
    assert!(
        text.contains("1 pages of its memory were written"),
        "{text}"
    );
    assert!(machine.guest.is_running());
    assert!(new.thread.join().unwrap().is_err());
}

#[test]
fn a_pause_that_would_be_too_long_is_taken_back_and_tried_again() {
    let gate = CancelToken::new();
    let new = NewProcess::new(Conduct {
        restore_gate: Some(gate.clone()),
        // The guest runs on while the first restore still looks at its memory.
        trusting: true,
        ..Conduct::default()
    });
    let mut machine = SourceSide::running(LOAD);
    let pauses = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&pauses);
    machine.at_pause = Box::new(move || {
        seen.lock().unwrap().push(Instant::now());
        let gate = gate.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            gate.cancel();
        });
    });
    let short = HandOverOptions {
        downtime_limit: Duration::from_millis(100),
        tries: 200,
        ..options()
    };
    let report = run(&mut machine, &mut *new.connector(), &short).unwrap();
    assert!(!report.aborted_pauses_ms.is_empty(), "{report:?}");
    // In between the guest ran: until the first states were restored, and four times as long as it
    // had stood still.
    let pauses = pauses.lock().unwrap();
    let between = pauses[1] - pauses[0];
    assert!(between > Duration::from_millis(650), "{between:?}");
    new.arrival().machine.assert_runs_whole();
}

#[test]
fn pauses_that_are_always_too_long_end_with_the_guest_at_home() {
    let new = NewProcess::new(Conduct {
        trusting: true,
        ..Conduct::default()
    });
    let mut machine = SourceSide::running(LOAD);
    let short = HandOverOptions {
        downtime_limit: Duration::ZERO,
        tries: 2,
        ..options()
    };
    let failure = run(&mut machine, &mut *new.connector(), &short).unwrap_err();
    assert!(
        matches!(failure.error, MigrationError::PauseTooLong { tries: 2, .. }),
        "{failure:?}"
    );
    machine.assert_runs_whole();
    assert!(new.thread.join().unwrap().is_err());
}

#[test]
fn a_new_process_that_has_the_guest_and_says_nothing_leaves_it_in_doubt() {
    struct Process(Option<bool>);
    impl Fencing for Process {
        fn peer_is_dead(&self) -> Option<bool> {
            self.0
        }
    }
    let gate = CancelToken::new();
    let new = NewProcess::new(Conduct {
        start_gate: Some(gate.clone()),
        ..Conduct::default()
    });
    let mut machine = SourceSide::running(LOAD);
    let impatient = HandOverOptions {
        idle_timeout: Duration::from_millis(300),
        inquiry_timeout: Duration::from_millis(300),
        ..options()
    };
    let failure = run(&mut machine, &mut *new.connector(), &impatient).unwrap_err();
    assert!(matches!(failure.guest, Guest::InDoubt(_)), "{failure:?}");
    assert!(!machine.guest.is_running());
    let right = failure.right.unwrap();
    assert_eq!(right.claim(&Process(Some(false))), Claimed::There);
    gate.cancel();
    let arrival = new.arrival();
    arrival.machine.assert_runs_whole();
    assert_eq!(right.claim(&Process(Some(false))), Claimed::There);
    assert_eq!(right.claim(&Process(Some(true))), Claimed::Gone);
    arrival.witness.stop();
}

#[test]
fn a_new_process_that_never_gets_ready_in_time_is_not_given_the_guest() {
    let gate = CancelToken::new();
    let new = NewProcess::new(Conduct {
        restore_gate: Some(gate.clone()),
        ..Conduct::default()
    });
    let mut machine = SourceSide::running(LOAD);
    let short = HandOverOptions {
        downtime_limit: Duration::from_millis(20),
        idle_timeout: Duration::from_millis(300),
        tries: 2,
        ..options()
    };
    let failure = run(&mut machine, &mut *new.connector(), &short).unwrap_err();
    assert!(
        matches!(
            failure.error,
            MigrationError::Transport(TransportError::TimedOut { .. })
        ),
        "{failure:?}"
    );
    assert_eq!(failure.guest, Guest::RunsHere);
    machine.assert_runs_whole();
    gate.cancel();
    assert!(new.thread.join().unwrap().is_err());
}

#[test]
fn a_machine_that_does_not_start_gives_the_guest_back_whole() {
    let new = NewProcess::new(Conduct::default());
    new.conduct.refuse_start.store(true, Ordering::SeqCst);
    let mut machine = SourceSide::running(LOAD);
    let failure = run(&mut machine, &mut *new.connector(), &options()).unwrap_err();
    assert_eq!(failure.guest, Guest::RunsHere, "{failure:?}");
    machine.assert_runs_whole();
    assert!(new.thread.join().unwrap().is_err());
}

#[test]
fn a_stream_without_descriptors_hands_nothing_over() {
    let listener = Listener::tcp(([127, 0, 0, 1], 0).into()).unwrap();
    let mut connector = TcpConnector::new(listener.tcp_address().unwrap());
    let cancel = CancelToken::new();
    let options_there = DestinationOptions {
        cancel: cancel.clone(),
        ..DestinationOptions::default()
    };
    let thread = std::thread::spawn(move || {
        Destination::new(listener, options_there)
            .accept_hand_over(|_, _| DestinationSide::build(&[], Arc::default()))
            .map(drop)
    });
    let mut machine = SourceSide::running(LOAD);
    let failure = run(&mut machine, &mut connector, &options()).unwrap_err();
    assert_eq!(failure.guest, Guest::RunsHere);
    machine.assert_runs_whole();
    cancel.cancel();
    assert!(thread.join().unwrap().is_err());
}
