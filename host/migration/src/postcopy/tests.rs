//! Source and destination of a post-copy in one process, with connections that break.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PageIndex, PageSet};

use super::*;
use crate::options::CancelToken;
use crate::ownership::Doubt;
use crate::pages::{self, PAGE};
use crate::protocol::Token;
use crate::protocol::message::{Complete, Running};
use crate::transport::{
    Connector, Fencing, Listener, PeerProcess, SocketTransport, Transport, TransportError,
    UnixConnector,
};
use crate::uffd::Userfaultfd;
use crate::wire::{Patience, Wire};

const TOKEN: Token = Token::from_bytes([3; 16]);
const INCARNATION: Token = Token::from_bytes([4; 16]);
const IDLE: Duration = Duration::from_secs(5);

fn userfaultfd() -> Option<Arc<Userfaultfd>> {
    match Userfaultfd::open() {
        Ok(uffd) => Some(Arc::new(uffd)),
        Err(error) => {
            eprintln!("SKIP: {error}");
            None
        }
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Every fifth page is zero in its first version.
fn content(page: u64, version: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if version == 1 && page.is_multiple_of(5) {
        return bytes;
    }
    let mut random = Random(page << 20 | version | 1 << 63);
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    bytes
}

fn filled(pages: u64, version: u64) -> Memory {
    let memory = Memory::new(pages * PAGE as u64).unwrap();
    for page in 0..pages {
        memory.write_page(PageIndex(page), &content(page, version));
    }
    memory
}

/// Breaks connections after random numbers of bytes, so many times.
struct Breaker {
    inner: UnixConnector,
    cuts: Arc<AtomicI64>,
    most: u64,
    random: Random,
    /// No more connections come about.
    down: Arc<AtomicBool>,
}

struct Fragile {
    inner: Box<dyn Transport>,
    budget: Option<i64>,
    cuts: Arc<AtomicI64>,
    down: Arc<AtomicBool>,
}

impl Fencing for Breaker {
    fn peer_is_dead(&self) -> Option<bool> {
        None
    }
}

impl Connector for Breaker {
    fn connect(&mut self, deadline: Instant) -> Result<Box<dyn Transport>, TransportError> {
        if self.down.load(Ordering::SeqCst) {
            return Err(TransportError::Closed {
                peer: "a network that is down".into(),
            });
        }
        let inner = self.inner.connect(deadline)?;
        let budget = self.random.below(self.most) as i64;
        let breaks = self.cuts.load(Ordering::SeqCst) > 0;
        Ok(Box::new(Fragile {
            inner,
            budget: breaks.then_some(budget),
            cuts: Arc::clone(&self.cuts),
            down: Arc::clone(&self.down),
        }))
    }

    fn watch(&mut self, _process: PeerProcess) {}

    fn transport(&self) -> &'static str {
        "unix"
    }
}

impl Fragile {
    fn spend(&mut self, bytes: usize) {
        if let Some(budget) = &mut self.budget {
            *budget -= bytes as i64;
        }
    }

    fn check(&mut self) -> Result<(), TransportError> {
        let spent = self.budget.is_some_and(|budget| budget < 0);
        if spent && self.cuts.fetch_sub(1, Ordering::SeqCst) <= 0 {
            self.budget = None;
        } else if !spent && !self.down.load(Ordering::SeqCst) {
            return Ok(());
        } else {
            self.inner.shutdown(std::net::Shutdown::Both);
            self.budget = None;
            self.down.load(Ordering::SeqCst);
            return Err(TransportError::Closed {
                peer: "a cut wire".into(),
            });
        }
        Ok(())
    }
}

impl Transport for Fragile {
    fn read(
        &mut self,
        into: &mut [std::io::IoSliceMut<'_>],
        deadline: Instant,
    ) -> Result<usize, TransportError> {
        self.check()?;
        let count = self.inner.read(into, deadline)?;
        self.spend(count);
        Ok(count)
    }

    fn write(
        &mut self,
        from: &[std::io::IoSlice<'_>],
        deadline: Instant,
    ) -> Result<usize, TransportError> {
        self.check()?;
        // In small steps, so that it breaks in the middle of a frame.
        let first = from.iter().find(|part| !part.is_empty());
        let step = first.map_or(&[][..], |part| &part[..part.len().min(3000)]);
        let count = self.inner.write(&[std::io::IoSlice::new(step)], deadline)?;
        self.spend(count);
        Ok(count)
    }

    fn shutdown(&mut self, how: std::net::Shutdown) {
        self.inner.shutdown(how);
    }

    fn peer(&self) -> &str {
        self.inner.peer()
    }

    fn traits(&self) -> dunlin_lane::stream::StreamTraits {
        self.inner.traits()
    }
}

/// Makes connections, of which one swallows what is written to it from some byte on.
struct Swallower {
    inner: UnixConnector,
    /// Connections before that one.
    before: usize,
}

struct Swallowing {
    inner: Box<dyn Transport>,
    budget: usize,
}

impl Fencing for Swallower {
    fn peer_is_dead(&self) -> Option<bool> {
        None
    }
}

impl Connector for Swallower {
    fn connect(&mut self, deadline: Instant) -> Result<Box<dyn Transport>, TransportError> {
        let inner = self.inner.connect(deadline)?;
        let Some(before) = self.before.checked_sub(1) else {
            self.before = usize::MAX;
            return Ok(Box::new(Swallowing {
                inner,
                budget: 100_000,
            }));
        };
        self.before = before;
        Ok(inner)
    }

    fn watch(&mut self, _process: PeerProcess) {}

    fn transport(&self) -> &'static str {
        "unix"
    }
}

impl Transport for Swallowing {
    fn read(
        &mut self,
        into: &mut [std::io::IoSliceMut<'_>],
        deadline: Instant,
    ) -> Result<usize, TransportError> {
        self.inner.read(into, deadline)
    }

    fn write(
        &mut self,
        from: &[std::io::IoSlice<'_>],
        deadline: Instant,
    ) -> Result<usize, TransportError> {
        let first = from.iter().find(|part| !part.is_empty());
        let step = first.map_or(&[][..], |part| &part[..part.len().min(3000)]);
        self.budget = self.budget.saturating_sub(step.len());
        if self.budget == 0 {
            return Ok(step.len());
        }
        self.inner.write(&[std::io::IoSlice::new(step)], deadline)
    }

    fn shutdown(&mut self, how: std::net::Shutdown) {
        self.inner.shutdown(how);
    }

    fn peer(&self) -> &str {
        self.inner.peer()
    }

    fn traits(&self) -> dunlin_lane::stream::StreamTraits {
        self.inner.traits()
    }
}

/// The destination's door: what `Reception` does for these connections.
struct Door {
    directory: tempfile::TempDir,
    stop: CancelToken,
    thread: Option<JoinHandle<()>>,
}

impl Door {
    fn new(switchboard: Switchboard) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = Listener::unix(&directory.path().join("door")).unwrap();
        let stop = CancelToken::new();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.is_cancelled() {
                let deadline = Instant::now() + Duration::from_millis(20);
                let Ok(Some(transport)) = listener.accept(deadline) else {
                    continue;
                };
                let switchboard = switchboard.clone();
                std::thread::spawn(move || {
                    let mut wire = Wire::new(transport);
                    let patience = Patience::Until(Instant::now() + IDLE);
                    // A connection that broke is the other side's to mend.
                    if let Ok(preamble) = wire.receive_preamble(patience) {
                        let _broke = switchboard.connect(&preamble, wire, patience);
                    }
                });
            }
        });
        Self {
            directory,
            stop,
            thread: Some(thread),
        }
    }

    fn connector(&self) -> UnixConnector {
        UnixConnector::new(self.directory.path().join("door"))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.stop.cancel();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A guest that reads and writes pages at random, and knows what each must hold.
struct Guest {
    versions: Arc<Mutex<Vec<u64>>>,
    stop: CancelToken,
    thread: JoinHandle<()>,
}

impl Guest {
    fn start(memory: &Memory, versions: Vec<u64>, seed: u64) -> Self {
        let versions = Arc::new(Mutex::new(versions));
        let stop = CancelToken::new();
        let (mine, stopped, memory) = (Arc::clone(&versions), stop.clone(), memory.clone());
        let thread = std::thread::spawn(move || {
            let mut random = Random(seed | 1);
            let mut versions = mine.lock().unwrap();
            let mut bytes = [0; PAGE];
            while !stopped.is_cancelled() {
                let page = random.below(versions.len() as u64);
                memory.read_page(PageIndex(page), &mut bytes);
                let version = &mut versions[page as usize];
                assert!(bytes == content(page, *version), "page {page} of {version}");
                if random.below(2) == 0 {
                    *version += 1;
                    memory.write_page(PageIndex(page), &content(page, *version));
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        Self {
            versions,
            stop,
            thread,
        }
    }

    fn finish(self) -> Vec<u64> {
        self.stop.cancel();
        self.thread.join().unwrap();
        Arc::into_inner(self.versions)
            .unwrap()
            .into_inner()
            .unwrap()
    }
}

/// Both sides, right after `Commit`.
struct Pair {
    source: Memory,
    there: Memory,
    missing: PageSet,
    door: Door,
    control: Wire,
    outflow: Outflow,
    following: Following,
    settled: CancelToken,
    switchboard: Switchboard,
}

const LANES: u16 = 2;

fn wires() -> (Wire, Wire) {
    let (a, b) = UnixStream::pair().unwrap();
    let wire = |stream| Wire::new(Box::new(SocketTransport::unix(stream, "pair").unwrap()));
    (wire(a), wire(b))
}

fn terms() -> Terms {
    Terms {
        idle: IDLE,
        bandwidth: None,
        pack: false,
    }
}

fn some_pages(pages: u64, seed: u64) -> PageSet {
    let mut random = Random(seed | 1);
    let mut set = PageSet::new(pages);
    for page in 0..pages {
        if random.below(4) < 3 {
            set.insert(PageIndex(page));
        }
    }
    set
}

/// `pages` of RAM; three of four are missing and hold older content at the destination.
fn pair(uffd: Arc<Userfaultfd>, pages: u64, window: Duration) -> Pair {
    pair_over(uffd, pages, window, |door| Box::new(door.connector()))
}

/// The same over connections of this connector.
fn pair_over(
    uffd: Arc<Userfaultfd>,
    pages: u64,
    window: Duration,
    connector: impl FnOnce(&Door) -> Box<dyn Connector>,
) -> Pair {
    let (source, there) = (filled(pages, 1), filled(pages, 1));
    let missing = some_pages(pages, 99);
    let mut hash = pages::hash_ram(&there);
    for page in missing.iter() {
        hash = hash.wrapping_sub(pages::hash(page, &content(page.0, 1)));
        there.write_page(page, &content(page.0, 9));
    }
    let switchboard = Switchboard::new();
    let door = Door::new(switchboard.clone());
    let (events, line) = switchboard.open(TOKEN);
    let deadline = Instant::now() + IDLE;
    let links = open_links(&mut *connector(&door), TOKEN, 1, LANES, deadline).unwrap();
    let arriving = collect(&line, 1, LANES, IDLE).unwrap();
    let basin = Basin {
        memory: there.clone(),
        uffd,
        missing: missing.clone(),
        idle: IDLE,
        hash: Some(hash),
    };
    let bell = events.clone();
    let inflow = Inflow::begin(basin, arriving, move || {
        let _full = bell.try_send(Event::Changed);
    })
    .unwrap();
    assert!(inflow.own());
    let settled = CancelToken::new();
    let keeper = Keeper {
        token: TOKEN,
        incarnation: INCARNATION,
        generation: 1,
        switchboard: switchboard.clone(),
        line,
        events: events.clone(),
        settled: settled.clone(),
        idle: IDLE,
        window,
        max_lanes: LANES,
    };
    let following = keeper.keep(inflow).unwrap();
    let (control, their_control) = wires();
    assert!(
        events
            .send(Event::Started(their_control, Running::default()))
            .is_ok()
    );
    let outflow =
        Outflow::start(&source, missing.clone(), links, terms(), Sent::default()).unwrap();
    Pair {
        source,
        there,
        missing,
        door,
        control,
        outflow,
        following,
        settled,
        switchboard,
    }
}

/// Runs the source's side to its end.
fn follow(
    memory: &Memory,
    connector: &mut dyn Connector,
    links: (Wire, Outflow),
    window: Duration,
) -> (Followed, Sent, u32) {
    let mut follow = Follow {
        memory,
        connector,
        doubt: Doubt {
            token: TOKEN,
            incarnation: INCARNATION,
        },
        terms: terms(),
        window,
        bulk_lanes: LANES,
        generation: 1,
        sent: Sent::default(),
        recoveries: 0,
        progress: &mut |_, _| {},
    };
    let (mut control, outflow) = links;
    let end = follow.run(Some((&mut control, outflow)));
    (end, follow.sent, follow.recoveries)
}

fn complete(end: Followed) -> Complete {
    match end {
        Followed::Complete(body) => *body,
        other => panic!("{other:?}"),
    }
}

fn assert_whole(memory: &Memory, versions: &[u64]) {
    let mut bytes = [0; PAGE];
    for (page, &version) in (0..).zip(versions) {
        memory.read_page(PageIndex(page), &mut bytes);
        assert!(bytes == content(page, version), "page {page} of {version}");
    }
}

#[test]
fn a_guest_that_writes_gets_every_page_once_and_never_an_older_one() {
    let Some(uffd) = userfaultfd() else { return };
    let window = Duration::from_secs(20);
    let pair = pair(uffd, 8192, window);
    let guest = Guest::start(&pair.there, vec![1; 8192], 7);
    pair.outflow.open();
    let mut connector = pair.door.connector();
    let links = (pair.control, pair.outflow);
    let (end, sent, recoveries) = follow(&pair.source, &mut connector, links, window);
    let body = complete(end);
    assert_eq!(pair.following.wait(), Standing::Complete);
    assert_whole(&pair.there, &guest.finish());
    let counts = body.counts.unwrap();
    assert_eq!(body.hash, Some(pages::hash_ram(&pair.source)));
    assert_eq!(counts.missing, pair.missing.len());
    let came = counts.urgent_pages + counts.prefetched_pages + counts.bulk_pages;
    assert_eq!(came, counts.missing);
    assert_eq!(counts.duplicates, sent.repeated_pages);
    assert_eq!((counts.recoveries, recoveries), (0, 0));
    assert!(pair.settled.is_cancelled());
    eprintln!("{counts:?}");
}

#[test]
fn pages_that_nobody_pushes_come_when_they_are_touched() {
    let Some(uffd) = userfaultfd() else { return };
    let pair = pair(uffd, 512, IDLE);
    // Bulk pages are held back: the guest gets nothing but what it asks for.
    let mut bytes = [0; PAGE];
    for page in 0..512 {
        pair.there.read_page(PageIndex(page), &mut bytes);
        assert!(bytes == content(page, 1), "page {page}");
    }
    let mut connector = pair.door.connector();
    let links = (pair.control, pair.outflow);
    let (end, sent, _) = follow(&pair.source, &mut connector, links, IDLE);
    let counts = complete(end).counts.unwrap();
    assert_eq!(counts.faults, pair.missing.len());
    assert_eq!(counts.urgent_pages, pair.missing.len());
    assert_eq!((counts.duplicates, sent.bulk_pages), (0, 0));
    assert!(counts.fault_p50_us <= counts.fault_p99_us);
    assert!(counts.fault_p99_us <= counts.fault_max_us);
}

#[test]
fn twenty_random_cuts_are_each_recovered() {
    let Some(uffd) = userfaultfd() else { return };
    let window = Duration::from_secs(30);
    for seed in [1, 2] {
        let pair = pair(Arc::clone(&uffd), 16_384, window);
        let guest = Guest::start(&pair.there, vec![1; 16_384], seed);
        let cuts = Arc::new(AtomicI64::new(20));
        let mut connector = Breaker {
            inner: pair.door.connector(),
            cuts: Arc::clone(&cuts),
            most: 1 << 20,
            random: Random(seed << 8 | 5),
            down: Arc::new(AtomicBool::new(false)),
        };
        // The first connections break as well: by the end of their other side.
        let links = (pair.control, pair.outflow);
        let (sent_before, _) = links.1.stop();
        let mut follow = Follow {
            memory: &pair.source,
            connector: &mut connector,
            doubt: Doubt {
                token: TOKEN,
                incarnation: INCARNATION,
            },
            terms: terms(),
            window,
            bulk_lanes: LANES,
            generation: 1,
            sent: sent_before,
            recoveries: 0,
            progress: &mut |_, _| {},
        };
        let body = complete(follow.run(None));
        assert_eq!(pair.following.wait(), Standing::Complete);
        assert_whole(&pair.there, &guest.finish());
        assert_eq!(body.hash, Some(pages::hash_ram(&pair.source)));
        let counts = body.counts.unwrap();
        assert!(cuts.load(Ordering::SeqCst) <= 0, "{cuts:?}");
        assert!(follow.recoveries > 10);
        let came = counts.urgent_pages + counts.prefetched_pages + counts.bulk_pages;
        assert_eq!(came, counts.missing);
        eprintln!("recoveries {} {counts:?}", follow.recoveries);
    }
}

#[test]
fn a_source_that_sees_nothing_of_a_break_begins_anew() {
    let Some(uffd) = userfaultfd() else { return };
    let window = Duration::from_secs(30);
    let pair = pair_over(uffd, 8192, window, |door| {
        Box::new(Swallower {
            inner: door.connector(),
            // Behind the requests' comes the urgent lane.
            before: 1,
        })
    });
    // Other lanes are held back until then.
    let guest = Guest::start(&pair.there, vec![1; 8192], 3);
    let mut connector = pair.door.connector();
    let links = (pair.control, pair.outflow);
    let (end, _, recoveries) = follow(&pair.source, &mut connector, links, window);
    let body = complete(end);
    assert_eq!(pair.following.wait(), Standing::Complete);
    assert_whole(&pair.there, &guest.finish());
    assert_eq!(body.hash, Some(pages::hash_ram(&pair.source)));
    assert_eq!(recoveries, 1);
}

#[test]
fn a_source_that_does_not_come_back_is_told_as_loss_on_both_sides() {
    let Some(uffd) = userfaultfd() else { return };
    let window = Duration::from_millis(300);
    let pair = pair(uffd, 1024, window);
    let down = Arc::new(AtomicBool::new(true));
    let mut connector = Breaker {
        inner: pair.door.connector(),
        cuts: Arc::new(AtomicI64::new(0)),
        most: 1,
        random: Random(1),
        down,
    };
    let memory = pair.there.clone();
    let touched = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&touched);
    pair.outflow.stop();
    let first = pair.missing.iter().next().unwrap();
    // Waits for ever: nothing right can come in the page's place.
    std::thread::spawn(move || {
        memory.read_page(first, &mut [0; PAGE]);
        seen.store(true, Ordering::SeqCst);
    });
    drop(pair.control);
    let mut follow = Follow {
        memory: &pair.source,
        connector: &mut connector,
        doubt: Doubt {
            token: TOKEN,
            incarnation: INCARNATION,
        },
        terms: terms(),
        window,
        bulk_lanes: LANES,
        generation: 1,
        sent: Sent::default(),
        recoveries: 0,
        progress: &mut |_, _| {},
    };
    let end = follow.run(None);
    assert!(matches!(end, Followed::Lost(_)), "{end:?}");
    let standing = pair.following.wait();
    assert!(matches!(standing, Standing::Lost { .. }), "{standing:?}");
    assert!(!touched.load(Ordering::SeqCst));
    assert_eq!(
        pages::hash_ram(&pair.source),
        pages::hash_ram(&filled(1024, 1))
    );
    // Whoever comes too late is told so.
    let mut late = Follow {
        connector: &mut pair.door.connector(),
        ..follow
    };
    let end = late.run(None);
    assert!(
        matches!(&end, Followed::Lost(cause) if cause.contains("lost")),
        "{end:?}"
    );
}

#[test]
fn a_guest_that_is_ended_lets_its_source_forget_it() {
    let Some(uffd) = userfaultfd() else { return };
    let pair = pair(uffd, 1024, IDLE);
    let following = pair.following.clone();
    let ender = std::thread::spawn(move || following.end("stopped by request"));
    let mut connector = pair.door.connector();
    let links = (pair.control, pair.outflow);
    let (end, _, _) = follow(&pair.source, &mut connector, links, IDLE);
    assert!(
        matches!(&end, Followed::Ended(reason) if reason == "stopped by request"),
        "{end:?}"
    );
    ender.join().unwrap();
    assert_eq!(pair.following.standing(), Standing::Ended);
    assert!(pair.settled.is_cancelled());
    drop(pair.switchboard);
}

#[test]
fn before_the_commit_a_break_frees_who_waits() {
    let Some(uffd) = userfaultfd() else { return };
    let switchboard = Switchboard::new();
    let door = Door::new(switchboard.clone());
    let (_events, line) = switchboard.open(TOKEN);
    let deadline = Instant::now() + IDLE;
    let links = open_links(&mut door.connector(), TOKEN, 1, 1, deadline).unwrap();
    let there = filled(256, 9);
    let basin = Basin {
        memory: there.clone(),
        uffd: Arc::clone(&uffd),
        missing: PageSet::full(256),
        idle: IDLE,
        hash: None,
    };
    let arriving = collect(&line, 1, 1, IDLE).unwrap();
    let inflow = Inflow::begin(basin, arriving, || {}).unwrap();
    let memory = there.clone();
    let reader = std::thread::spawn(move || {
        let mut bytes = [1; PAGE];
        memory.read_page(PageIndex(5), &mut bytes);
        bytes
    });
    drop(links);
    assert_eq!(reader.join().unwrap(), [0; PAGE]);
    assert!(!inflow.own());
    drop(inflow);
    // And it can begin again.
    let source = filled(256, 1);
    let links = open_links(&mut door.connector(), TOKEN, 2, 1, deadline).unwrap();
    let missing = PageSet::full(256);
    let outflow = Outflow::start(&source, missing.clone(), links, terms(), Sent::default());
    let arriving = collect(&line, 2, 1, IDLE).unwrap();
    let basin = Basin {
        memory: there.clone(),
        uffd,
        missing,
        idle: IDLE,
        hash: None,
    };
    let inflow = Inflow::begin(basin, arriving, || {}).unwrap();
    let mut bytes = [0; PAGE];
    there.read_page(PageIndex(5), &mut bytes);
    assert!(bytes == content(5, 1));
    assert!(inflow.own());
    drop((inflow, outflow));
}
