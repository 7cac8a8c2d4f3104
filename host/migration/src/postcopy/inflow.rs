//! The destination's side: guest memory that fills up while its guest runs.
//!
//! ```text
//!            a connection broke           new connections
//!   Flowing ───────────────────▶ Broken ─────────────────▶ Flowing
//!      │                            │
//!      │ the last page was placed   │ the last page had come before
//!      ▼                            ▼
//!    Whole                        Whole          (any state) ──end──▶ Ended
//! ```
//!
//! Until the guest is owned here (`Commit`) nobody waits for longer than the connections live: when
//! they break, memory is let go, whoever waits at a page finds zeros, and the switch-over has
//! failed. From then on whoever waits, waits.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PageIndex, PageSet};
use dunlin_lane::{LaneError, LaneEvent, PageReceiver};

use super::latency::Latency;
use super::parcel::{Parcel, Reason};
use super::{SLICE, spawn};
use crate::error::MigrationError;
use crate::options::CancelToken;
use crate::pages::{self, PAGE};
use crate::protocol::Message;
use crate::protocol::message::{Arrivals, KeepAlive, Wanted};
use crate::protocol::runs::{self, Run};
use crate::uffd::{FaultingMemory, UffdError, Userfaultfd};
use crate::wire::{Patience, Wire};

/// Most pages in one request.
const MAX_WANTED: usize = 256;

/// The connections of one generation, at the destination.
pub(crate) struct DestinationLinks {
    /// Asks.
    pub(crate) requests: Wire,
    /// Brings what was asked for.
    pub(crate) urgent: Box<dyn PageReceiver>,
    /// Brings the rest.
    pub(crate) bulk: Vec<Box<dyn PageReceiver>>,
}

/// Where the pages are. Drawn above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// They come.
    Flowing,
    /// They do not come until there are new connections.
    Broken,
    /// All are here.
    Whole,
    /// Nobody needs them any more.
    Ended,
}

struct State {
    flow: Flow,
    /// Why it broke.
    cause: Option<String>,
    /// Is the guest owned here?
    owned: bool,
    /// Pages that have not come. One that is being placed is not among them.
    missing: PageSet,
    /// Pages that are being placed.
    placing: PageSet,
    /// Faults are not seen any more: nothing helps then.
    blind: bool,
    /// Pages that something waits for, and since when.
    wanted: BTreeMap<u64, Instant>,
    counts: Arrivals,
    latency: Latency,
    /// Sum of the hashes of all pages here, when verification was asked for.
    hash: Option<u64>,
}

struct Shared {
    ram: FaultingMemory,
    state: Mutex<State>,
    /// Told of each change of the flow.
    changed: Box<dyn Fn() + Send + Sync>,
    idle: Duration,
}

/// What the thread that watches for faults is told.
enum Order {
    /// Ask on this connection.
    Link(Wire),
    /// Ask on none.
    Unlink,
}

/// Memory that fills up.
pub(crate) struct Inflow {
    shared: Arc<Shared>,
    watcher: Option<JoinHandle<()>>,
    orders: Sender<Order>,
    /// Wakes the watcher; its end ends it.
    bell: Option<PipeWriter>,
    /// Of this generation.
    receivers: Vec<JoinHandle<()>>,
    stop: CancelToken,
}

/// What an inflow starts from.
pub(crate) struct Basin {
    pub(crate) memory: Memory,
    pub(crate) uffd: Arc<Userfaultfd>,
    pub(crate) missing: PageSet,
    /// Silence after which the source counts as lost.
    pub(crate) idle: Duration,
    /// Sum of the hashes of the pages that are not missing.
    pub(crate) hash: Option<u64>,
}

impl Inflow {
    /// Forgets what the missing pages held, and asks for each that is touched from now on.
    /// `changed` is called when the flow changes; it must not block.
    ///
    /// # Errors
    /// [`MigrationError`] when the host does not give what it takes. Nothing is watched over then.
    pub(crate) fn begin(
        basin: Basin,
        links: DestinationLinks,
        changed: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, MigrationError> {
        let ram = FaultingMemory::new(basin.uffd, basin.memory);
        // First: nobody can fill what is emptied then, be it the host that prepares pages ahead.
        ram.register()?;
        if let Err(error) = empty(&ram, &basin.missing) {
            ram.unregister()?;
            return Err(error);
        }
        let counts = Arrivals {
            missing: basin.missing.len(),
            ..Arrivals::default()
        };
        let pages = ram.memory().pages();
        let shared = Arc::new(Shared {
            ram,
            state: Mutex::new(State {
                flow: Flow::Flowing,
                cause: None,
                owned: false,
                missing: basin.missing,
                placing: PageSet::new(pages),
                blind: false,
                wanted: BTreeMap::new(),
                counts,
                latency: Latency::default(),
                hash: basin.hash,
            }),
            changed: Box::new(changed),
            idle: basin.idle,
        });
        let host = |source| MigrationError::Host {
            what: "a pipe",
            source,
        };
        let (quiet, bell) = std::io::pipe().map_err(host)?;
        let (orders, inbox) = channel();
        let mut inflow = Self {
            shared: Arc::clone(&shared),
            watcher: None,
            orders,
            bell: Some(bell),
            receivers: Vec::new(),
            stop: CancelToken::new(),
        };
        inflow.watcher = Some(spawn("postcopy-faults", move || {
            if let Err(error) = shared.watch(&quiet, &inbox) {
                shared.state().blind = true;
                shared.breaks(&error);
            }
        })?);
        inflow.link(links)?;
        Ok(inflow)
    }

    /// Takes up new connections: asks for everything that is waited for, and receives.
    fn link(&mut self, links: DestinationLinks) -> Result<(), MigrationError> {
        let DestinationLinks {
            requests,
            urgent,
            bulk,
        } = links;
        self.stop = CancelToken::new();
        self.shared.settle();
        self.order(Order::Link(requests));
        let urgent = (urgent, true);
        for (lane, urgent) in std::iter::once(urgent).chain(bulk.into_iter().map(|l| (l, false))) {
            let (shared, stop) = (Arc::clone(&self.shared), self.stop.clone());
            let thread = spawn("postcopy-lane", move || {
                let received = shared.receive(lane, urgent, &stop);
                if let Err(error) = received
                    && !stop.is_cancelled()
                {
                    shared.breaks(&error);
                }
            })?;
            self.receivers.push(thread);
        }
        Ok(())
    }

    fn order(&mut self, order: Order) {
        // A watcher that has failed has said so.
        let _failed = self.orders.send(order);
        if let Some(bell) = &mut self.bell {
            let _failed = bell.write(&[1]);
        }
    }

    /// Ends this generation's connections; nothing is placed any more from the return on.
    pub(crate) fn hang_up(&mut self) {
        self.stop.cancel();
        self.order(Order::Unlink);
        for receiver in self.receivers.drain(..) {
            if receiver.join().is_err() {
                tracing::error!("a thread that receives pages panicked");
            }
        }
    }

    /// Goes on over new connections.
    pub(crate) fn resume(&mut self, links: DestinationLinks) -> Result<(), MigrationError> {
        self.hang_up();
        {
            let mut state = self.shared.state();
            state.counts.recoveries += 1;
            if state.flow == Flow::Broken {
                state.flow = Flow::Flowing;
                state.cause = None;
            }
        }
        self.link(links)
    }

    /// Ends this generation's connections, and says what has not come.
    pub(crate) fn pause(&mut self) -> PageSet {
        self.hang_up();
        let mut state = self.shared.state();
        if state.flow == Flow::Flowing {
            state.flow = Flow::Broken;
        }
        state.missing.clone()
    }

    /// The guest is owned here from now on. False: the pages do not come, so it cannot be.
    pub(crate) fn own(&self) -> bool {
        let mut state = self.shared.state();
        state.owned = matches!(state.flow, Flow::Flowing | Flow::Whole);
        state.owned
    }

    /// Looks at it from elsewhere.
    pub(crate) fn gauge(&self) -> Gauge {
        Gauge(Arc::clone(&self.shared))
    }

    /// All pages are here: memory is memory again, while the connections stay.
    pub(crate) fn release(&self) {
        self.shared.let_go();
    }

    /// Nobody needs the pages any more, or all are here: memory is memory again, and the
    /// connections end.
    pub(crate) fn end(&mut self) {
        self.hang_up();
        {
            let mut state = self.shared.state();
            if state.flow != Flow::Whole {
                state.flow = Flow::Ended;
            }
        }
        self.shared.let_go();
        self.bell = None;
        if let Some(watcher) = self.watcher.take()
            && watcher.join().is_err()
        {
            tracing::error!("the thread that watches for faults panicked");
        }
    }

    /// The guest is lost. Whoever waits at a page waits until the process ends: what would come
    /// instead of the page is wrong.
    pub(crate) fn strand(mut self) {
        self.hang_up();
        // The end of the descriptor would end the waiting.
        std::mem::forget(Arc::clone(&self.shared));
        self.bell = None;
        self.watcher = None;
    }
}

impl Drop for Inflow {
    fn drop(&mut self) {
        // Stranded memory stays as it is.
        if self.bell.is_some() {
            self.end();
        }
    }
}

/// Forgets what missing pages hold, ahead of an inflow, which then has less to do.
///
/// # Errors
/// [`MigrationError`] when the host refuses.
pub(crate) fn make_room(
    memory: &Memory,
    uffd: &Arc<Userfaultfd>,
    missing: &PageSet,
) -> Result<(), MigrationError> {
    empty(
        &FaultingMemory::new(Arc::clone(uffd), memory.clone()),
        missing,
    )
}

/// Makes the missing pages holes, as far as they are none.
fn empty(ram: &FaultingMemory, missing: &PageSet) -> Result<(), MigrationError> {
    let mut extents = pages::Extents::new(ram.memory());
    for run in missing.runs() {
        if !is_hole(&mut extents, &run) {
            ram.discard(PageIndex(run.start), run.end - run.start)?;
        }
    }
    let mut extents = pages::Extents::new(ram.memory());
    for run in missing.runs() {
        if !is_hole(&mut extents, &run) {
            // Whoever touched it would find old content instead of waiting.
            return Err(MigrationError::Refused {
                reason: format!("page {} cannot be emptied", run.start),
            });
        }
    }
    Ok(())
}

fn is_hole(extents: &mut pages::Extents<'_>, run: &Range<u64>) -> bool {
    let end = extents.hole_at(PageIndex(run.start));
    end.is_some_and(|end| end >= run.end)
}

/// What can be seen of an inflow.
#[derive(Clone)]
pub(crate) struct Gauge(Arc<Shared>);

impl Gauge {
    pub(crate) fn flow(&self) -> Flow {
        self.0.state().flow
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.flow() == Flow::Broken
    }

    /// Faults are not seen any more.
    pub(crate) fn is_blind(&self) -> bool {
        self.0.state().blind
    }

    /// Why it broke.
    pub(crate) fn cause(&self) -> Option<String> {
        self.0.state().cause.clone()
    }

    pub(crate) fn ram_pages(&self) -> u64 {
        self.0.ram.memory().pages()
    }

    pub(crate) fn missing_pages(&self) -> u64 {
        self.0.state().missing.len()
    }

    pub(crate) fn counts(&self) -> Arrivals {
        let state = self.0.state();
        Arrivals {
            fault_p50_us: state.latency.percentile(50),
            fault_p99_us: state.latency.percentile(99),
            fault_max_us: state.latency.max(),
            ..state.counts
        }
    }

    pub(crate) fn hash(&self) -> Option<u64> {
        self.0.state().hash
    }
}

impl Shared {
    /// The state is whole between any two statements, so a poisoned lock is as good as any.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection broke.
    fn breaks(&self, error: &MigrationError) {
        let mut state = self.state();
        if state.flow != Flow::Flowing {
            return;
        }
        state.flow = Flow::Broken;
        state.cause = Some(error.chain());
        let owned = state.owned;
        drop(state);
        if !owned {
            self.let_go();
        }
        (self.changed)();
    }

    /// Whoever waits goes on, and finds zeros.
    fn let_go(&self) {
        if let Err(error) = self.ram.unregister() {
            let error = MigrationError::from(error);
            tracing::error!(error = %error.chain(), "guest memory is still watched over");
        }
    }

    /// Was that the last page?
    fn settle(&self) {
        let mut state = self.state();
        let whole = state.missing.is_empty() && state.placing.is_empty();
        if whole && matches!(state.flow, Flow::Flowing | Flow::Broken) {
            state.flow = Flow::Whole;
            drop(state);
            (self.changed)();
        }
    }

    /// Waits for faults and asks for what they touched, until the bell's other end is closed.
    fn watch(
        &self,
        mut quiet: &PipeReader,
        orders: &Receiver<Order>,
    ) -> Result<(), MigrationError> {
        let beat = self.idle / 4;
        let mut link: Option<Wire> = None;
        let mut addresses = Vec::new();
        let mut told = Instant::now();
        loop {
            let patience = beat.saturating_sub(told.elapsed());
            let ready = self.ram.uffd().wait_either(quiet.as_raw_fd(), patience)?;
            if ready.fault {
                self.ram.uffd().read(&mut addresses)?;
                let wanted = self.want(&addresses)?;
                if !wanted.is_empty() {
                    self.ask(&mut link, &wanted);
                    told = Instant::now();
                }
            }
            if ready.other {
                // The bell: an order for each stroke.
                if quiet.read(&mut [0]).unwrap_or(0) == 0 {
                    return Ok(());
                }
                match orders.try_recv() {
                    Ok(Order::Link(wire)) => {
                        link = Some(wire);
                        let wanted: Vec<u64> = self.state().wanted.keys().copied().collect();
                        self.ask(&mut link, &wanted);
                    }
                    Ok(Order::Unlink) => link = None,
                    Err(_nothing) => {}
                }
            }
            if told.elapsed() >= beat {
                self.tell(
                    &mut link,
                    &Message::KeepAlive(KeepAlive { echo: 0, number: 0 }),
                );
                told = Instant::now();
            }
        }
    }

    /// Notes what is waited for; what has to be asked for.
    fn want(&self, addresses: &[usize]) -> Result<Vec<u64>, UffdError> {
        let mut wanted = Vec::new();
        let mut there = Vec::new();
        let mut state = self.state();
        for page in addresses.iter().filter_map(|&at| self.ram.page_at(at)) {
            if state.missing.contains(page) {
                if let Entry::Vacant(vacant) = state.wanted.entry(page.0) {
                    vacant.insert(Instant::now());
                    state.counts.faults += 1;
                    wanted.push(page.0);
                }
            } else if !state.placing.contains(page) {
                there.push(page);
            }
        }
        drop(state);
        for page in there {
            // It has come meanwhile, which ends the waiting, or the guest gave it back after it
            // came, and zero is what it holds.
            self.ram.place_zeros(page, 1)?;
        }
        Ok(wanted)
    }

    fn ask(&self, link: &mut Option<Wire>, wanted: &[u64]) {
        for pages in wanted.chunks(MAX_WANTED) {
            let pages = pages.to_vec();
            self.tell(link, &Message::Wanted(Wanted { pages }));
        }
    }

    fn tell(&self, link: &mut Option<Wire>, message: &Message) {
        let Some(wire) = link else {
            return;
        };
        if let Err(error) = wire.send(message, Patience::Idle(self.idle)) {
            *link = None;
            self.breaks(&error);
        }
    }

    /// Places what a lane brings until it is told to stop.
    fn receive(
        &self,
        mut lane: Box<dyn PageReceiver>,
        urgent: bool,
        stop: &CancelToken,
    ) -> Result<(), MigrationError> {
        let mut message = Vec::new();
        let mut heard = Instant::now();
        while !stop.is_cancelled() {
            match lane.receive(&mut message, Instant::now() + SLICE) {
                Ok(LaneEvent::Message) => {
                    heard = Instant::now();
                    self.open(&message)?;
                }
                Ok(LaneEvent::Announced(_)) => {}
                // Only the urgent lane has signs of life.
                Err(LaneError::TimedOut { .. }) if !urgent || heard.elapsed() < self.idle => {}
                Err(error) => return Err(error.into()),
            }
        }
        lane.close();
        Ok(())
    }

    fn open(&self, message: &[u8]) -> Result<(), MigrationError> {
        let parcel = Parcel::decode(message, self.ram.memory().pages())?;
        let Parcel::Pages {
            reason,
            runs,
            content,
        } = parcel
        else {
            return Ok(());
        };
        let mut at = 0;
        for run in &runs {
            let length = run.count as usize * PAGE;
            let part = match &content {
                // Decoding has checked that it is as long as the runs say.
                Some(content) => content.get(at..at + length),
                None => None,
            };
            at += length;
            self.arrive(reason, run, part)?;
        }
        self.state().counts.bytes += message.len() as u64;
        self.settle();
        Ok(())
    }

    /// Places the pages of a run that have not come before.
    fn arrive(
        &self,
        reason: Reason,
        run: &Run,
        content: Option<&[u8]>,
    ) -> Result<(), MigrationError> {
        let mut fresh = Vec::new();
        let hashing = {
            let mut state = self.state();
            for page in run.pages() {
                if state.missing.remove(page) {
                    state.placing.insert(page);
                    runs::push(&mut fresh, page);
                } else {
                    state.counts.duplicates += 1;
                }
            }
            state.hash.is_some()
        };
        for part in &fresh {
            let at = (part.first.0 - run.first.0) as usize * PAGE;
            let length = part.count as usize * PAGE;
            let bytes = content.and_then(|content| content.get(at..at + length));
            let placed = match bytes {
                Some(bytes) => self.ram.place(part.first, bytes),
                None => self.ram.place_zeros(part.first, u64::from(part.count)),
            };
            let hash = bytes.filter(|_| hashing).map(|bytes| hash_of(part, bytes));
            self.placed(reason, part, hash, placed)?;
        }
        Ok(())
    }

    /// Accounts for pages that were placed, or were not.
    fn placed(
        &self,
        reason: Reason,
        part: &Run,
        hash: Option<u64>,
        placed: Result<u64, UffdError>,
    ) -> Result<(), MigrationError> {
        let now = Instant::now();
        let count = u64::from(part.count);
        let mut state = self.state();
        for page in part.pages() {
            state.placing.remove(page);
        }
        let placed = match placed {
            Ok(placed) => placed,
            Err(error) => {
                // The source is asked for them again.
                for page in part.pages() {
                    state.missing.insert(page);
                }
                return Err(error.into());
            }
        };
        // After a failure in the middle of a run a part of it may come again.
        state.counts.duplicates += count - placed.min(count);
        match reason {
            Reason::Asked => state.counts.urgent_pages += placed,
            Reason::Neighbour => state.counts.prefetched_pages += placed,
            Reason::Turn => state.counts.bulk_pages += placed,
        }
        if let (Some(sum), Some(hash)) = (&mut state.hash, hash) {
            *sum = sum.wrapping_add(hash);
        }
        for page in part.pages() {
            if let Some(since) = state.wanted.remove(&page.0) {
                state.latency.record(now - since);
            }
        }
        Ok(())
    }
}

fn hash_of(run: &Run, bytes: &[u8]) -> u64 {
    let pages = run.pages().zip(bytes.chunks_exact(PAGE));
    pages.fold(0, |sum, (page, bytes)| {
        sum.wrapping_add(pages::hash(page, bytes))
    })
}
