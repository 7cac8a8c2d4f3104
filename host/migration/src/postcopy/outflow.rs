//! The source's side of one set of connections: answers requests, and pushes the rest.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PageIndex, PageSet};
use dunlin_lane::{LaneError, PageSender, Ticket};

use super::parcel::{MAX_PAGES, Packer, Reason};
use super::plan::Plan;
use super::{SLICE, spawn};
use crate::error::MigrationError;
use crate::options::CancelToken;
use crate::pages::{self, PAGE};
use crate::protocol::message::Wanted;
use crate::protocol::runs::{self, Run};
use crate::protocol::{Kind, Message, ProtocolError};
use crate::source::Throttle;
use crate::transport::TransportError;
use crate::wire::{Patience, Wire};

/// Pages in one bulk message: few, so that what is asked for does not wait for long behind it.
const BULK_PAGES: usize = 64;

/// The connections of one generation, at the source.
pub(crate) struct SourceLinks {
    /// The destination asks on it.
    pub(crate) requests: Wire,
    /// Answers.
    pub(crate) urgent: Box<dyn PageSender>,
    /// The rest.
    pub(crate) bulk: Vec<Box<dyn PageSender>>,
}

/// How pages are sent, the same in each generation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    /// Silence after which the destination counts as lost.
    pub(crate) idle: Duration,
    /// Bytes a second for all but what is asked for.
    pub(crate) bandwidth: Option<u64>,
    /// Are bulk pages packed where that makes them smaller?
    pub(crate) pack: bool,
}

/// What the source has sent, over all generations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Pages that were asked for.
    pub(crate) urgent_pages: u64,
    /// Of those, pages that were on their way already.
    pub(crate) repeated_pages: u64,
    /// Neighbours of what was asked for.
    pub(crate) prefetched_pages: u64,
    /// All others.
    pub(crate) bulk_pages: u64,
    /// Bytes of messages.
    pub(crate) bytes: u64,
}

struct State {
    plan: Plan,
    /// May bulk pages go?
    open: bool,
    sent: Sent,
}

struct Shared {
    memory: Memory,
    terms: Terms,
    state: Mutex<State>,
    opened: Condvar,
    throttle: Mutex<Throttle>,
    /// Ends this generation.
    stop: CancelToken,
    failed: Mutex<Option<MigrationError>>,
}

/// Serves the destination until it is stopped or a connection breaks. The memory that it reads
/// does not change: the guest has left, or is paused.
pub(crate) struct Outflow {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Outflow {
    /// Answers requests from now on; bulk pages wait for [`Outflow::open`].
    ///
    /// # Errors
    /// [`MigrationError::Host`] when there are no threads.
    pub(crate) fn start(
        memory: &Memory,
        missing: PageSet,
        links: SourceLinks,
        terms: Terms,
        sent: Sent,
    ) -> Result<Self, MigrationError> {
        let shared = Arc::new(Shared {
            memory: memory.clone(),
            terms,
            state: Mutex::new(State {
                plan: Plan::new(missing),
                open: false,
                sent,
            }),
            opened: Condvar::new(),
            throttle: Mutex::new(Throttle::new(terms.bandwidth)),
            stop: CancelToken::new(),
            failed: Mutex::new(None),
        });
        let mut outflow = Self {
            shared,
            threads: Vec::new(),
        };
        let SourceLinks {
            mut requests,
            urgent,
            bulk,
        } = links;
        requests.set_stops(vec![outflow.shared.stop.clone()]);
        outflow.work("postcopy-urgent", move |shared| {
            shared.answer(requests, urgent)
        })?;
        for lane in bulk {
            outflow.work("postcopy-bulk", move |shared| shared.push(lane))?;
        }
        Ok(outflow)
    }

    fn work(
        &mut self,
        name: &str,
        work: impl FnOnce(&Shared) -> Result<(), MigrationError> + Send + 'static,
    ) -> Result<(), MigrationError> {
        let shared = Arc::clone(&self.shared);
        let thread = spawn(name, move || {
            if let Err(error) = work(&shared) {
                shared.fail(error);
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Bulk pages go from now on.
    pub(crate) fn open(&self) {
        self.shared.state().open = true;
        self.shared.opened.notify_all();
    }

    /// Cancelled when a connection broke, and with [`Outflow::stop`].
    pub(crate) fn ended(&self) -> CancelToken {
        self.shared.stop.clone()
    }

    /// What was sent so far, and how many pages were not taken for sending yet.
    pub(crate) fn progress(&self) -> (Sent, u64) {
        let state = self.shared.state();
        (state.sent, state.plan.left())
    }

    /// Ends the connections. Why they broke, if they did, and what was sent.
    pub(crate) fn stop(mut self) -> (Sent, Option<MigrationError>) {
        self.end();
        let failed = lock(&self.shared.failed).take();
        (self.shared.state().sent, failed)
    }

    fn end(&mut self) {
        self.shared.end();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that sends pages panicked");
            }
        }
    }
}

impl Drop for Outflow {
    fn drop(&mut self) {
        self.end();
    }
}

/// The states are whole between any two statements, so a poisoned lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn end(&self) {
        self.stop.cancel();
        // Under the lock: a thread that has just looked at the token is waiting by then.
        let _state = self.state();
        self.opened.notify_all();
    }

    fn fail(&self, error: MigrationError) {
        if !self.stop.is_cancelled() {
            lock(&self.failed).get_or_insert(error);
        }
        self.end();
    }

    /// Answers requests, the moment that they come.
    fn answer(
        &self,
        mut requests: Wire,
        mut urgent: Box<dyn PageSender>,
    ) -> Result<(), MigrationError> {
        let beat = self.terms.idle / 4;
        let mut packer = Packer::default();
        let mut heard = Instant::now();
        let mut told = heard;
        while !self.stop.is_cancelled() {
            match requests.receive(Patience::Until(Instant::now() + beat)) {
                Ok(message) => {
                    heard = Instant::now();
                    if self.request(message, urgent.as_mut(), &mut packer)? {
                        told = heard;
                    }
                }
                Err(MigrationError::Transport(TransportError::Stopped { .. })) => break,
                Err(MigrationError::Transport(TransportError::TimedOut { .. }))
                    if heard.elapsed() < self.terms.idle => {}
                Err(error) => return Err(error),
            }
            if told.elapsed() >= beat {
                self.post(urgent.as_mut(), packer.alive())?;
                told = Instant::now();
            }
        }
        Ok(())
    }

    /// True when it was answered by pages.
    fn request(
        &self,
        message: Message,
        urgent: &mut dyn PageSender,
        packer: &mut Packer,
    ) -> Result<bool, MigrationError> {
        let Wanted { pages } = match message {
            Message::Wanted(body) => body,
            Message::KeepAlive(_) => return Ok(false),
            other => {
                return Err(ProtocolError::Unexpected {
                    kind: other.kind(),
                    state: "serving faults",
                }
                .into());
            }
        };
        let mut content = [0; PAGE];
        for page in pages.into_iter().map(PageIndex) {
            if !self.memory.read_page(page, &mut content) {
                let reason = "a page outside of RAM";
                return Err(ProtocolError::invalid(Kind::Wanted, reason).into());
            }
            let on_its_way = !self.state().plan.asked(page);
            let run = [Run {
                first: page,
                count: 1,
            }];
            let message = if pages::is_zero(&content) {
                packer.zeros(Reason::Asked, &run)
            } else {
                packer.pages(Reason::Asked, &run, &content, false)
            };
            self.post(urgent, message)?;
            let bytes = message.len() as u64;
            // What was asked for does not wait, but what follows makes up for it.
            lock(&self.throttle).take(bytes, Instant::now());
            let sent = &mut self.state().sent;
            sent.urgent_pages += 1;
            sent.repeated_pages += u64::from(on_its_way);
            sent.bytes += bytes;
        }
        Ok(true)
    }

    /// Pushes what nobody has asked for until all is sent, and then keeps the lane: its end would
    /// look like a break.
    fn push(&self, mut lane: Box<dyn PageSender>) -> Result<(), MigrationError> {
        let limit = lock(&self.throttle).batch_pages(BULK_PAGES.min(MAX_PAGES));
        let mut packer = Packer::default();
        let mut content = vec![0; limit * PAGE];
        loop {
            let mut state = self.state();
            let batch = loop {
                if self.stop.is_cancelled() {
                    return Ok(());
                }
                let batch = if state.open {
                    state.plan.take(limit)
                } else {
                    None
                };
                if let Some(batch) = batch {
                    break batch;
                }
                let waited = self.opened.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            let (reason, runs) = batch;
            self.send(lane.as_mut(), (reason, &runs), &mut packer, &mut content)?;
        }
    }

    fn send(
        &self,
        lane: &mut dyn PageSender,
        (reason, batch): (Reason, &[Run]),
        packer: &mut Packer,
        content: &mut [u8],
    ) -> Result<(), MigrationError> {
        let (mut full, mut zero) = (Vec::new(), Vec::new());
        let (slots, _rest) = content.as_chunks_mut::<PAGE>();
        let mut used = 0;
        for page in batch.iter().flat_map(Run::pages) {
            let Some(slot) = slots.get_mut(used) else {
                break;
            };
            self.memory.read_page(page, slot);
            if pages::is_zero(slot) {
                runs::push(&mut zero, page);
            } else {
                runs::push(&mut full, page);
                used += 1;
            }
        }
        let mut bytes = 0;
        if used > 0 {
            let pack = self.terms.pack;
            let message = packer.pages(reason, &full, &content[..used * PAGE], pack);
            bytes += message.len() as u64;
            self.wait_for_turn(message.len() as u64);
            self.post(lane, message)?;
        }
        if !zero.is_empty() {
            let message = packer.zeros(reason, &zero);
            bytes += message.len() as u64;
            self.post(lane, message)?;
        }
        let pages: u64 = batch.iter().map(|run| u64::from(run.count)).sum();
        let sent = &mut self.state().sent;
        sent.bytes += bytes;
        match reason {
            Reason::Neighbour => sent.prefetched_pages += pages,
            Reason::Turn | Reason::Asked => sent.bulk_pages += pages,
        }
        Ok(())
    }

    /// Keeps to the bandwidth limit.
    fn wait_for_turn(&self, bytes: u64) {
        let mut left = lock(&self.throttle).take(bytes, Instant::now());
        while !left.is_zero() && !self.stop.is_cancelled() {
            let slice = left.min(SLICE);
            std::thread::sleep(slice);
            left -= slice;
        }
    }

    /// Sends a message; gives up after the time of silence, or when this generation ends.
    fn post(&self, lane: &mut dyn PageSender, message: &[u8]) -> Result<(), LaneError> {
        let until = Instant::now() + self.terms.idle;
        let mut posted = lane.send(message, Instant::now() + SLICE).map(|_posted| ());
        loop {
            match posted {
                Err(LaneError::TimedOut { .. })
                    if Instant::now() < until && !self.stop.is_cancelled() =>
                {
                    // It is posted; what is left of it goes on.
                    posted = lane.complete(Ticket::ALL, Instant::now() + SLICE);
                }
                posted => return posted,
            }
        }
    }
}
