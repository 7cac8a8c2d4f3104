//! A guest that can prove that it is whole, and machines that run it.
//!
//! Its one thread writes pages of its RAM and remembers, apart from RAM, which version of each
//! page it wrote last. A page's content follows from its index and version, so that any page
//! that was lost, old or mixed up is found.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]
#![expect(dead_code, reason = "each test file uses a part of this")]
#![expect(unreachable_pub, reason = "each test file includes this as a module")]

pub mod proxy;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PageIndex, SavedState};
use dunlin_migration::handover::{self, DepartingMachine, Descriptors, Leftovers};
use dunlin_migration::transport::{Connector, Listener, UnixConnector};
use dunlin_migration::{
    Arrival, CancelToken, Destination, DestinationMachine, DestinationOptions, MachineError,
    MigrationError, MigrationOptions, Slowdown, SourceMachine,
};
use prost::Message as _;

const PAGE: usize = 4096;
/// Written by saving, so that a page changes after the pause.
const CLOCK_PAGE: u64 = 1;
/// Holds the counter.
const COUNTER_PAGE: u64 = 0;

/// What a guest does.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub ram: u64,
    /// Pages that are written again and again.
    pub working_set: u64,
    pub pages_per_second: f64,
}

impl Load {
    pub const SMALL: Load = Load {
        ram: 4 << 20,
        working_set: 64,
        pages_per_second: 1000.0,
    };
}

#[derive(Clone, PartialEq, prost::Message)]
struct GuestState {
    #[prost(fixed64, repeated, tag = "1")]
    versions: Vec<u64>,
    #[prost(uint64, tag = "2")]
    counter: u64,
    #[prost(uint64, tag = "3")]
    random: u64,
    #[prost(uint64, tag = "4")]
    working_set: u64,
    #[prost(double, tag = "5")]
    pages_per_second: f64,
}

struct Control {
    run: bool,
    running: bool,
    quit: bool,
}

struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
    state: Mutex<GuestState>,
    memory: Memory,
}

/// The guest, wherever it is.
pub struct Guest {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

pub fn page_content(page: u64, version: u64) -> [u8; PAGE] {
    let mut content = [0; PAGE];
    if version == 0 {
        return content;
    }
    let seed = (page << 32 ^ version).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for (word, bytes) in content.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&(seed ^ word as u64).to_le_bytes());
    }
    content
}

impl Guest {
    fn with_state(memory: Memory, state: GuestState) -> Self {
        let shared = Arc::new(Shared {
            control: Mutex::new(Control {
                run: false,
                running: false,
                quit: false,
            }),
            changed: Condvar::new(),
            state: Mutex::new(state),
            memory,
        });
        let worker = Arc::clone(&shared);
        Self {
            shared,
            thread: Some(std::thread::spawn(move || worker.work())),
        }
    }

    /// A guest whose RAM has pages with content, pages of zeros that were written, and pages
    /// that were never touched. It is stopped.
    pub fn new(load: Load) -> Self {
        let memory = Memory::new(load.ram).unwrap();
        let pages = memory.pages();
        let mut versions = vec![0; pages as usize];
        for page in 2..pages {
            match page % 8 {
                0..=3 => {
                    versions[page as usize] = 1;
                    memory.write_page(PageIndex(page), &page_content(page, 1));
                }
                4 => {
                    memory.write_page(PageIndex(page), &[0; PAGE]);
                }
                _ => {}
            }
        }
        let state = GuestState {
            versions,
            counter: 0,
            random: 0x1234_5678_9abc_def1,
            working_set: load.working_set,
            pages_per_second: load.pages_per_second,
        };
        Self::with_state(memory, state)
    }

    pub fn memory(&self) -> &Memory {
        &self.shared.memory
    }

    pub fn start(&self) {
        let mut control = self.shared.control.lock().unwrap();
        control.run = true;
        self.shared.changed.notify_all();
        while !control.running {
            control = self.shared.changed.wait(control).unwrap();
        }
    }

    pub fn stop(&self) {
        let mut control = self.shared.control.lock().unwrap();
        control.run = false;
        self.shared.changed.notify_all();
        while control.running {
            control = self.shared.changed.wait(control).unwrap();
        }
    }

    pub fn is_running(&self) -> bool {
        self.shared.control.lock().unwrap().running
    }

    pub fn counter(&self) -> u64 {
        self.shared.state.lock().unwrap().counter
    }

    /// Waits until the counter has moved by `n`: the guest makes progress.
    pub fn wait_for_progress(&self, n: u64) {
        let from = self.counter();
        let begun = Instant::now();
        while self.counter() < from + n {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "the guest stands still"
            );
            std::thread::yield_now();
        }
    }

    /// Checks each page of a stopped guest against what it remembers.
    pub fn assert_whole(&self) {
        assert!(!self.is_running());
        let state = self.shared.state.lock().unwrap();
        check(&self.shared.memory, &state).unwrap();
    }
}

fn check(memory: &Memory, state: &GuestState) -> Result<(), String> {
    let mut page = [0; PAGE];
    memory.read_page(PageIndex(COUNTER_PAGE), &mut page);
    let counter = u64::from_le_bytes(page[..8].try_into().unwrap());
    if counter != state.counter {
        return Err(format!(
            "counter {counter} in RAM, {} in state",
            state.counter
        ));
    }
    for index in 2..memory.pages() {
        memory.read_page(PageIndex(index), &mut page);
        let version = state.versions[index as usize];
        if page != page_content(index, version) {
            return Err(format!("page {index} is not of version {version}"));
        }
    }
    Ok(())
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.control.lock().unwrap().quit = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut last = Instant::now();
        let mut credit = 0.0;
        loop {
            {
                let mut control = self.control.lock().unwrap();
                loop {
                    if control.quit {
                        return;
                    }
                    if control.run != control.running {
                        control.running = control.run;
                        last = Instant::now();
                        credit = 1.0;
                        self.changed.notify_all();
                    }
                    if control.run {
                        break;
                    }
                    control = self.changed.wait(control).unwrap();
                }
                // The guest's own pace: it writes what a millisecond allows, then idles.
                if credit < 1.0 {
                    let tick = Duration::from_millis(1);
                    drop(self.changed.wait_timeout(control, tick).unwrap());
                }
            }
            let now = Instant::now();
            let mut state = self.state.lock().unwrap();
            credit += (now - last).as_secs_f64() * state.pages_per_second;
            last = now;
            // A slow machine must not make the guest stop late.
            let mut burst = 0;
            while credit >= 1.0 && burst < 64 {
                credit -= 1.0;
                burst += 1;
                self.write_one(&mut state);
            }
            credit = credit.min(state.pages_per_second / 100.0 + 1.0);
        }
    }

    fn write_one(&self, state: &mut GuestState) {
        state.random ^= state.random << 13;
        state.random ^= state.random >> 7;
        state.random ^= state.random << 17;
        let page = 2 + state.random % state.working_set.min(self.memory.pages() - 2);
        // Now and then a page becomes zero again.
        let version = match state.versions[page as usize] {
            0 => state.counter + 2,
            _ if state.random >> 60 == 0 => 0,
            _ => state.counter + 2,
        };
        state.versions[page as usize] = version;
        self.memory
            .write_page(PageIndex(page), &page_content(page, version));
        state.counter += 1;
        let mut counter = [0; PAGE];
        counter[..8].copy_from_slice(&state.counter.to_le_bytes());
        self.memory.write_page(PageIndex(COUNTER_PAGE), &counter);
    }
}

fn machine_error(action: &'static str, what: impl Into<String>) -> MachineError {
    MachineError {
        action,
        source: what.into().into(),
    }
}

/// The guest at its source.
pub struct SourceSide {
    pub guest: Guest,
    pub tracking: bool,
    /// Runs at each `pause`.
    pub at_pause: Box<dyn FnMut() + Send>,
}

impl SourceSide {
    pub fn running(load: Load) -> Self {
        let guest = Guest::new(load);
        guest.start();
        Self {
            guest,
            tracking: false,
            at_pause: Box::new(|| {}),
        }
    }

    /// Asserts that the guest runs here, has lost nothing, and leaves it running.
    pub fn assert_runs_whole(&self) {
        assert!(self.guest.is_running());
        self.guest.wait_for_progress(3);
        self.guest.stop();
        self.guest.assert_whole();
        self.guest.start();
    }
}

impl SourceMachine for SourceSide {
    fn memory(&self) -> &Memory {
        self.guest.memory()
    }

    fn configuration(&self) -> Vec<u8> {
        self.guest.memory().size().to_le_bytes().to_vec()
    }

    fn start_dirty_tracking(&mut self) -> Result<(), MachineError> {
        assert!(!self.tracking);
        self.tracking = true;
        Ok(())
    }

    fn collect_dirty(&mut self) -> Result<(), MachineError> {
        assert!(self.tracking);
        Ok(())
    }

    fn stop_dirty_tracking(&mut self) -> Result<(), MachineError> {
        self.tracking = false;
        Ok(())
    }

    fn throttle(&mut self, _slowdown: Slowdown) -> Result<(), MachineError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        assert!(self.guest.is_running());
        self.guest.stop();
        (self.at_pause)();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        assert!(!self.guest.is_running());
        self.guest.start();
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<SavedState>, MachineError> {
        assert!(!self.guest.is_running());
        let state = self.guest.shared.state.lock().unwrap();
        let mut clock = [7; PAGE];
        clock[..8].copy_from_slice(&state.counter.to_le_bytes());
        self.guest
            .memory()
            .write_page(PageIndex(CLOCK_PAGE), &clock);
        Ok(vec![SavedState {
            name: "guest".to_owned(),
            kind: "test".to_owned(),
            version: 1,
            body: state.encode_to_vec(),
        }])
    }
}

impl DepartingMachine for SourceSide {
    fn descriptors(&mut self) -> Result<Descriptors, MachineError> {
        let mut descriptors = Descriptors::new();
        descriptors.add("extra", tempfile::tempfile().unwrap().into());
        Ok(descriptors)
    }

    fn leftovers(&mut self) -> Leftovers {
        assert!(!self.guest.is_running());
        Leftovers {
            body: b"history".to_vec(),
            descriptors: Descriptors::new(),
        }
    }
}

/// How a destination misbehaves, and what it has done.
#[derive(Debug, Default)]
pub struct Conduct {
    pub starts: AtomicUsize,
    pub restores: AtomicUsize,
    pub refuse_start: AtomicBool,
    /// Restoring does not look at RAM.
    pub trusting: bool,
    /// Restoring writes a page that the source's guest never touches, and starting clears it.
    pub scribbling: bool,
    /// Restoring waits until this is cancelled.
    pub restore_gate: Option<CancelToken>,
    /// Starting waits until this is cancelled.
    pub start_gate: Option<CancelToken>,
    /// Names of the descriptors that came, RAM excepted.
    pub descriptors: Mutex<Vec<String>>,
}

/// The guest at its destination.
pub struct DestinationSide {
    memory: Memory,
    pub guest: Option<Guest>,
    conduct: Arc<Conduct>,
}

impl DestinationSide {
    pub fn build(configuration: &[u8], conduct: Arc<Conduct>) -> Result<Self, MachineError> {
        let size = <[u8; 8]>::try_from(configuration)
            .map_err(|_wrong_length| machine_error("read its configuration", "not 8 bytes"))?;
        let memory = Memory::new(u64::from_le_bytes(size)).map_err(|error| MachineError {
            action: "reserve memory",
            source: error.into(),
        })?;
        Ok(Self {
            memory,
            guest: None,
            conduct,
        })
    }

    /// As [`DestinationSide::build`], around RAM that another machine still uses.
    pub fn adopt(
        configuration: &[u8],
        mut descriptors: Descriptors,
        conduct: Arc<Conduct>,
    ) -> Result<Self, MachineError> {
        let size = <[u8; 8]>::try_from(configuration)
            .map_err(|_wrong_length| machine_error("read its configuration", "not 8 bytes"))?;
        let Some(ram) = descriptors.take(handover::RAM) else {
            return Err(machine_error("adopt memory", "none came"));
        };
        let memory = Memory::from_file(ram.into(), u64::from_le_bytes(size));
        let memory = memory.map_err(|error| MachineError {
            action: "adopt memory",
            source: error.into(),
        })?;
        *conduct.descriptors.lock().unwrap() = descriptors.names();
        Ok(Self {
            memory,
            guest: None,
            conduct,
        })
    }

    pub fn guest(&self) -> &Guest {
        self.guest.as_ref().unwrap()
    }

    /// As [`SourceSide::assert_runs_whole`].
    pub fn assert_runs_whole(&self) {
        let guest = self.guest();
        assert!(guest.is_running());
        guest.wait_for_progress(3);
        guest.stop();
        guest.assert_whole();
        guest.start();
    }
}

impl DestinationMachine for DestinationSide {
    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn restore(&mut self, states: Vec<SavedState>) -> Result<(), MachineError> {
        self.conduct.restores.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = &self.conduct.restore_gate {
            while !gate.is_cancelled() {
                std::thread::yield_now();
            }
        }
        let [state] = states.as_slice() else {
            return Err(machine_error("restore", "not one state"));
        };
        let state: GuestState = state.decode("test", 1).map_err(|error| MachineError {
            action: "restore",
            source: error.into(),
        })?;
        if !self.conduct.trusting {
            check(&self.memory, &state).map_err(|error| machine_error("restore", error))?;
        }
        let mut clock = [0; PAGE];
        self.memory.read_page(PageIndex(CLOCK_PAGE), &mut clock);
        if !self.conduct.trusting && clock[..8] != state.counter.to_le_bytes() {
            return Err(machine_error("restore", "what saving wrote did not arrive"));
        }
        if self.conduct.scribbling {
            let last = PageIndex(self.memory.pages() - 1);
            self.memory.write_page(last, &[1; PAGE]);
        }
        self.guest = Some(Guest::with_state(self.memory.clone(), state));
        Ok(())
    }

    fn start(&mut self) -> Result<(), MachineError> {
        if self.conduct.refuse_start.load(Ordering::SeqCst) {
            return Err(machine_error("start", "told to refuse"));
        }
        if let Some(gate) = &self.conduct.start_gate {
            while !gate.is_cancelled() {
                std::thread::yield_now();
            }
        }
        if self.conduct.scribbling {
            let last = PageIndex(self.memory.pages() - 1);
            self.memory.write_page(last, &[0; PAGE]);
        }
        self.conduct.starts.fetch_add(1, Ordering::SeqCst);
        self.guest().start();
        Ok(())
    }
}

/// A destination on a thread of its own.
pub struct Waiting {
    pub cancel: CancelToken,
    pub conduct: Arc<Conduct>,
    thread: JoinHandle<Result<Arrival<DestinationSide>, MigrationError>>,
}

/// Short waits, and all of memory goes before the guest.
pub fn destination_options() -> DestinationOptions {
    DestinationOptions {
        idle_timeout: Duration::from_millis(1500),
        preamble_timeout: Duration::from_millis(1000),
        ..DestinationOptions::default()
    }
}

pub fn wait_on(listener: Listener, conduct: Conduct) -> Waiting {
    wait_with(listener, conduct, destination_options())
}

pub fn wait_with(listener: Listener, conduct: Conduct, options: DestinationOptions) -> Waiting {
    let conduct = Arc::new(conduct);
    let cancel = options.cancel.clone();
    let theirs = Arc::clone(&conduct);
    let thread = std::thread::spawn(move || {
        Destination::new(listener, options)
            .accept(|configuration| DestinationSide::build(configuration, Arc::clone(&theirs)))
    });
    Waiting {
        cancel,
        conduct,
        thread,
    }
}

impl Waiting {
    pub fn arrival(self) -> Arrival<DestinationSide> {
        self.thread.join().unwrap().unwrap()
    }

    pub fn starts(&self) -> usize {
        self.conduct.starts.load(Ordering::SeqCst)
    }

    /// Ends the wait; nothing arrived.
    pub fn give_up(self) {
        self.cancel.cancel();
        assert!(matches!(
            self.thread.join().unwrap(),
            Err(MigrationError::Cancelled)
        ));
    }
}

/// A destination behind a unix socket in a directory of its own.
pub struct UnixPlace {
    pub directory: tempfile::TempDir,
    pub waiting: Waiting,
}

impl UnixPlace {
    pub fn new(conduct: Conduct) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = Listener::unix(&directory.path().join("door")).unwrap();
        Self {
            waiting: wait_on(listener, conduct),
            directory,
        }
    }

    pub fn door(&self) -> std::path::PathBuf {
        self.directory.path().join("door")
    }

    pub fn connector(&self) -> Box<dyn Connector> {
        Box::new(UnixConnector::new(self.door()))
    }
}

/// Short waits, a wide downtime limit: the machine that tests run on may be busy.
pub fn options() -> MigrationOptions {
    MigrationOptions {
        downtime_limit: Duration::from_millis(500),
        idle_timeout: Duration::from_millis(1500),
        connect_timeout: Duration::from_secs(5),
        inquiry_timeout: Duration::from_secs(5),
        ..MigrationOptions::default()
    }
}
