//! A guest with two processors, both running and writing, moves in this process from one
//! lifecycle to a machine of any engine.

mod saving;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_api::handover::HandOverRequest;
use dunlin_api::launch::Overrides;
use dunlin_api::migration::{
    Endpoint, MigrateRequest, MigrationPhase, MigrationStatus, Outcome, Verify,
};
use dunlin_api::place::RuntimeDirectory;
use dunlin_api::{EngineChoice, VmConfig};
use dunlin_guest::{Memory, PAGE_SIZE, PageSet, SavedState};
use dunlin_guest_kvmtest::pair;
use dunlin_hypervisor::probe::{EngineRequest, choose};
use dunlin_migration::handover::HandOverArrival;
use dunlin_migration::transport::Listener;
use dunlin_migration::{
    Arrival, Destination, DestinationMachine, DestinationOptions, MigrationError, Slowdown,
};
use dunlin_x86::cpuid::X86_64_V1;
use tokio::sync::oneshot;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::console::ConsoleHub;
use crate::files::{OpenFiles, ProcessFiles};
use crate::interface::Doors;
use crate::lifecycle::{Lifecycle, Mailbox, Message, Phase, Reply, Surroundings};
use crate::machine::events::MachineEvents;
use crate::machine::{DiskLocks, Machine};

/// Longest wait for anything: the machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);

/// The engines that this host offers. What is missing is said.
fn engines() -> Vec<EngineChoice> {
    match choose(EngineRequest::Kvm, &X86_64_V1) {
        Ok(_) => vec![EngineChoice::Soft, EngineChoice::Kvm],
        Err(error) => {
            eprintln!("SKIP: {error}");
            vec![EngineChoice::Soft]
        }
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}

fn build(runtime: &Path, engine: EngineChoice) -> Build {
    Build {
        runtime: RuntimeDirectory::at(runtime),
        overrides: Overrides {
            engine: Some(engine),
            ..Overrides::default()
        },
        faults: open_faults(),
        console: ConsoleHub::new(),
        events: MachineEvents::new(|_| {}),
    }
}

/// The guest, as it is about to start.
fn booted(folder: &Path, engine: EngineChoice) -> ArrivingMachine {
    let kernel = folder.join("pair");
    std::fs::write(&kernel, pair::kernel()).unwrap();
    let config = serde_json::json!({
        "version": 1, "name": "a", "kernel": kernel, "command_line": "",
        "memory_bytes": pair::MEMORY, "cpus": 2, "baseline": "x86-64-v1",
    });
    let config: VmConfig = serde_json::from_value(config).unwrap();
    let runtime = folder.join("source");
    let guest = build(&runtime, engine)
        .build(&encode_config(&config))
        .unwrap();
    guest.machine.load_kernel().unwrap();
    guest
}

fn counters(memory: &Memory) -> [u64; 2] {
    [0, 1].map(|processor| {
        let at = GuestAddress(pair::counter(processor));
        memory.mapping().read_obj(at).unwrap()
    })
}

/// Waits until both processors count on.
fn both_count(memory: &Memory) {
    let before = counters(memory);
    until("both processors count", || {
        let now = counters(memory);
        (0..2).all(|processor| now[processor] > before[processor] + 10_000)
    });
}

/// What a paused guest has written is what its counters say: nothing is lost, and nothing old has
/// come back.
fn assert_whole(memory: &Memory) {
    for (processor, rounds) in counters(memory).into_iter().enumerate() {
        let pages = pair::data_pages(processor);
        let many = pair::DATA_PAGES[processor];
        assert!(rounds > many);
        for (index, page) in (pages.start.0..pages.end.0).enumerate() {
            let at = GuestAddress(page * PAGE_SIZE);
            let found: u64 = memory.mapping().read_obj(at).unwrap();
            let last = rounds - (rounds - index as u64) % many;
            // The counter goes first: the page of this round may not have been written yet.
            let expected = [last, if last == rounds { last - many } else { last }];
            assert!(
                expected.contains(&found),
                "processor {processor}, page {index}: {found}, not {expected:?}"
            );
        }
    }
}

/// How a lifecycle is reached and looked at.
#[derive(Clone)]
struct Reach {
    mailbox: Mailbox,
    monitor: Arc<MoveMonitor>,
    saves: Arc<SaveMonitor>,
}

/// The life of a guest that runs.
fn lifecycle(guest: ArrivingMachine, reach: Reach, inbox: mpsc::Receiver<Message>) -> Lifecycle {
    let files = OpenFiles::create(&guest.place).unwrap();
    let surroundings = Surroundings {
        from_file: None,
        saves: reach.saves,
        following: None,
        blueprint: guest.blueprint,
        inbox,
        mailbox: reach.mailbox,
        monitor: reach.monitor,
        faults: open_faults(),
        doors: Doors::new(),
        files: Arc::new(ProcessFiles::new(guest.place, files)),
    };
    let mut lifecycle = Lifecycle::new(guest.machine, Phase::Created, surroundings);
    lifecycle.start(Duration::ZERO).unwrap();
    lifecycle
}

impl Reach {
    fn new() -> (Self, mpsc::Receiver<Message>) {
        let (mailbox, inbox) = Mailbox::new();
        let reach = Self {
            mailbox,
            monitor: Arc::new(MoveMonitor::new()),
            saves: Arc::default(),
        };
        (reach, inbox)
    }
}

/// A running VM's owner on a thread of its own.
struct Owner {
    reach: Reach,
    memory: Memory,
    thread: JoinHandle<()>,
}

impl Owner {
    fn start(guest: ArrivingMachine) -> Self {
        let (reach, inbox) = Reach::new();
        let memory = guest.machine.memory().clone();
        let theirs = reach.clone();
        let (started, ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let lifecycle = lifecycle(guest, theirs, inbox);
            started.send(()).unwrap();
            lifecycle.run();
        });
        ready.recv().unwrap();
        Self {
            reach,
            memory,
            thread,
        }
    }

    fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> T {
        let (reply, answer) = oneshot::channel();
        self.reach.mailbox.send(message(reply));
        answer.blocking_recv().unwrap().unwrap()
    }

    fn migrate(&self, to: &Path) -> MigrationStatus {
        let request = format!(r#"{{"to":"unix:{}"}}"#, to.display());
        let request = MigrateRequest {
            verify: Verify::After,
            ..serde_json::from_str(&request).unwrap()
        };
        assert_eq!(request.to, Endpoint::Unix(to.into()));
        self.ask(|reply| Message::Migrate(request, reply));
        until("the move ends", || self.reach.monitor.status().is_over());
        self.reach.monitor.status()
    }

    fn end(self) {
        self.reach.mailbox.send(Message::End("the test is over"));
        self.thread.join().unwrap();
    }
}

type Arrived = Result<Arrival<ArrivingMachine>, MigrationError>;

/// Waits for a guest at `socket`.
fn destination(folder: &Path, socket: &Path, engine: EngineChoice) -> JoinHandle<Arrived> {
    let listener = Listener::unix(socket).unwrap();
    let build = build(&folder.join("destination"), engine);
    std::thread::spawn(move || {
        Destination::new(listener, DestinationOptions::default())
            .accept(|configuration| build.build_for_peer(configuration))
    })
}

fn paused(machine: &Machine) -> [u64; 2] {
    machine.pause(DiskLocks::Release).unwrap();
    assert_whole(machine.memory());
    counters(machine.memory())
}

#[test]
fn two_processors_that_write_move_between_all_engines_and_count_on() {
    for from in engines() {
        for to in engines() {
            let folder = tempfile::tempdir().unwrap();
            let source = Owner::start(booted(folder.path(), from));
            both_count(&source.memory);
            let socket = folder.path().join("lane");
            let arriving = destination(folder.path(), &socket, to);
            let status = source.migrate(&socket);
            assert_eq!(
                status.phase,
                MigrationPhase::Done,
                "{from:?} to {to:?}: {status:?}"
            );
            let report = status.report.unwrap();
            assert_eq!(report.verified, Some(true), "{from:?} to {to:?}");
            let left = counters(&source.memory);
            let arrived = arriving.join().unwrap().unwrap();
            let machine = &arrived.machine.machine;
            both_count(machine.memory());
            let now = paused(machine);
            assert!((0..2).all(|cpu| now[cpu] > left[cpu]), "{from:?} to {to:?}");
            assert_eq!(
                counters(&source.memory),
                left,
                "{from:?}: the source ran on"
            );
            arrived.witness.wait();
            source.end();
        }
    }
}

#[test]
fn a_processor_that_writes_much_is_slowed_down_more() {
    // Under KVM the log does not say which processor wrote a page: all are slowed down alike.
    for (engine, named) in [(EngineChoice::Soft, true), (EngineChoice::Kvm, false)] {
        if !engines().contains(&engine) {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let guest = booted(folder.path(), engine);
        let machine = &guest.machine;
        machine.vm().start_dirty_tracking().unwrap();
        machine.resume().unwrap();
        both_count(machine.memory());
        let mut throttled = Throttled::none(machine.memory());
        both_count(machine.memory());
        machine.vm().collect_dirty().unwrap();
        let mut written = PageSet::new(machine.memory().pages());
        machine.memory().dirty_log().harvest(&mut written);
        for processor in 0..2 {
            let pages = pair::data_pages(processor);
            for page in pages.start.0..pages.end.0 {
                assert!(
                    written.contains(dunlin_guest::PageIndex(page)),
                    "{engine:?}: {page}"
                );
            }
        }
        let slowdown = Slowdown::percent(60);
        let percent = throttled.next(machine.memory(), 2, slowdown);
        if named {
            assert_eq!(percent[0], 60, "{percent:?}");
            assert!((1..12).contains(&percent[1]), "{percent:?}");
        } else {
            assert_eq!(percent, [60, 60]);
        }
        machine.throttle(&percent).unwrap();
        assert_eq!(machine.throttled(), percent);
        // Slowed down is not stopped.
        both_count(machine.memory());
        machine.throttle(&[]).unwrap();
        assert!(machine.throttled().is_empty());
        paused(machine);
    }
}

/// When a machine that takes a guest over fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fails {
    /// It has its states; the other process may still run on.
    AfterRestore,
    /// The guest is its own, and does not start.
    AtStart,
    Never,
}

/// A machine that another process's guest is handed to.
struct Taker {
    machine: AdoptedMachine,
    fails: Fails,
}

fn hash(memory: &Memory) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut page = [0; PAGE_SIZE as usize];
    for index in 0..memory.pages() {
        memory.read_page(dunlin_guest::PageIndex(index), &mut page);
        page.hash(&mut hasher);
    }
    hasher.finish()
}

impl DestinationMachine for Taker {
    fn memory(&self) -> &Memory {
        self.machine.memory()
    }

    fn restore(&mut self, states: Vec<SavedState>) -> Result<(), MachineError> {
        let before = hash(self.memory());
        self.machine.restore(states)?;
        assert_eq!(hash(self.memory()), before, "restoring wrote guest memory");
        match self.fails {
            Fails::AfterRestore => Err(machine_error("go on", "told to fail")),
            Fails::AtStart | Fails::Never => Ok(()),
        }
    }

    fn start(&mut self) -> Result<(), MachineError> {
        match self.fails {
            Fails::AtStart => Err(machine_error("start", "told to fail")),
            Fails::AfterRestore | Fails::Never => self.machine.start(),
        }
    }
}

type Taken = Result<HandOverArrival<Taker>, MigrationError>;

/// Waits for the guest of the place in `folder` at `socket`.
fn taker(folder: &Path, socket: &Path, engine: EngineChoice, fails: Fails) -> JoinHandle<Taken> {
    let listener = Listener::unix_with_descriptors(socket).unwrap();
    let build = build(&folder.join("source"), engine);
    std::thread::spawn(move || {
        let name = "a".parse().unwrap();
        Destination::new(listener, DestinationOptions::default()).accept_hand_over(
            |configuration, descriptors| {
                let machine = build.adopt(&name, configuration, descriptors)?;
                Ok(Taker { machine, fails })
            },
        )
    })
}

#[test]
fn two_processors_that_write_go_on_in_another_process_or_in_this_one_with_memory_untouched() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let source = Owner::start(booted(folder.path(), engine));
        let hand_over = |fails, socket: &Path| {
            let arriving = taker(folder.path(), socket, engine, fails);
            let request = HandOverRequest {
                to: socket.to_owned(),
                pid: std::process::id(),
                downtime_ms: 20_000,
            };
            let (reply, answer) = oneshot::channel();
            source.reach.mailbox.send(Message::HandOver(request, reply));
            (answer.blocking_recv().unwrap(), arriving.join().unwrap())
        };
        for (index, fails) in [Fails::AfterRestore, Fails::AtStart]
            .into_iter()
            .enumerate()
        {
            both_count(&source.memory);
            let socket = folder.path().join(format!("failing{index}"));
            let (answer, arrived) = hand_over(fails, &socket);
            assert!(answer.is_err() && arrived.is_err(), "{engine:?}, {fails:?}");
            both_count(&source.memory);
        }
        let (answer, arrived) = hand_over(Fails::Never, &folder.path().join("taking"));
        let report = answer.unwrap();
        assert_eq!(report.outcome, Outcome::Moved, "{engine:?}: {report:?}");
        let arrived = arrived.unwrap();
        let machine = &arrived.machine.machine.guest.machine;
        both_count(machine.memory());
        paused(machine);
        arrived.witness.wait();
        source.thread.join().unwrap();
    }
}
