//! Keeps a guest's memory coming at the destination: takes up new connections when the old ones
//! break, until every page is here, the guest is ended, or too much time has passed.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use dunlin_guest::PageSet;

use super::inflow::{Flow, Gauge, Inflow};
use super::links::{Collection, Event, Generation, LinkName, Switchboard};
use super::watch::{Board, Following, Standing};
use super::{missing, spawn};
use crate::error::MigrationError;
use crate::options::CancelToken;
use crate::protocol::message::{Complete, Ended, Missing, Running};
use crate::protocol::{Message, ProtocolError, Token};
use crate::wire::{Patience, Wire};

/// A wait without an end in sight.
const LONG: Duration = Duration::from_secs(3600);
/// How long the source may take to confirm that it may forget the guest's memory.
const SETTLED_WAIT: Duration = Duration::from_secs(5);

/// Whom a keeper works for.
pub(crate) struct Keeper {
    pub(crate) token: Token,
    pub(crate) incarnation: Token,
    /// Of the connections that the inflow began with.
    pub(crate) generation: Generation,
    pub(crate) switchboard: Switchboard,
    pub(crate) line: Receiver<Event>,
    pub(crate) events: SyncSender<Event>,
    /// Cancelled when the source knows the end.
    pub(crate) settled: CancelToken,
    pub(crate) idle: Duration,
    /// How long the guest waits for new connections.
    pub(crate) window: Duration,
    pub(crate) max_lanes: u16,
}

impl Keeper {
    /// Keeps `inflow` going on a thread of its own.
    ///
    /// # Errors
    /// [`MigrationError::Host`] when there is no thread.
    pub(crate) fn keep(self, inflow: Inflow) -> Result<Following, MigrationError> {
        let board = Board::new();
        let gauge = inflow.gauge();
        let following = Following {
            board: Arc::clone(&board),
            gauge: gauge.clone(),
            events: self.events.clone(),
        };
        let work = Work {
            generation: self.generation,
            keeper: self,
            inflow: Some(inflow),
            gauge,
            board,
            control: None,
            running: None,
            pending: None,
            broken_since: None,
            begun: Instant::now(),
            duration: Duration::ZERO,
        };
        spawn("postcopy-keeper", move || work.run())?;
        Ok(following)
    }
}

struct Work {
    keeper: Keeper,
    inflow: Option<Inflow>,
    gauge: Gauge,
    board: Arc<Board>,
    /// Where the source is told the end.
    control: Option<Wire>,
    running: Option<Running>,
    /// The last generation that the source has begun.
    generation: Generation,
    pending: Option<(Wire, Collection)>,
    broken_since: Option<Instant>,
    begun: Instant,
    /// Until every page was here.
    duration: Duration,
}

impl Work {
    fn run(mut self) {
        let reason = loop {
            if let Some(reason) = self.look() {
                break reason;
            }
            let left = self.broken_since.map_or(LONG, |since| {
                self.keeper.window.saturating_sub(since.elapsed())
            });
            match self.keeper.line.recv_timeout(left) {
                Ok(Event::Link(name, wire)) => {
                    if let Err(error) = self.link(name, wire) {
                        tracing::warn!(error = %error.chain(), "a connection of a post-copy failed");
                    }
                }
                Ok(Event::Changed) | Err(RecvTimeoutError::Timeout) => {}
                Ok(Event::Started(control, running)) => {
                    // A newer one may have come meanwhile.
                    self.control.get_or_insert(control);
                    self.running = Some(running);
                }
                Ok(Event::End(reason)) => break self.end(reason),
                Ok(Event::Relinquished) | Err(RecvTimeoutError::Disconnected) => {
                    self.let_go();
                    self.board.post(Standing::Ended);
                    break "the guest did not start here".to_owned();
                }
            }
        };
        self.keeper.switchboard.close(self.keeper.token, &reason);
    }

    /// Looks at the flow; why this is the end, if it is.
    fn look(&mut self) -> Option<String> {
        match self.gauge.flow() {
            Flow::Flowing => {
                self.broken_since = None;
                self.board.post(Standing::Arriving);
                return None;
            }
            Flow::Ended => return Some("the guest has ended".to_owned()),
            Flow::Whole => return self.whole(),
            Flow::Broken => {}
        }
        let cause = self.gauge.cause();
        let cause = cause.unwrap_or_else(|| "the source began anew".to_owned());
        let since = match self.broken_since {
            Some(since) => since,
            None => self.hang_up(&cause),
        };
        self.board.post(Standing::Waiting {
            cause: cause.clone(),
        });
        let blind = self.gauge.is_blind();
        if !blind && since.elapsed() < self.keeper.window {
            return None;
        }
        let cause = if blind {
            cause
        } else {
            let window = self.keeper.window.as_secs_f64();
            format!("the source did not come back within {window} s after this: {cause}")
        };
        tracing::error!(
            cause,
            missing_pages = self.gauge.missing_pages(),
            "the guest is lost: pages of its memory are still at the source"
        );
        if let Some(inflow) = self.inflow.take() {
            inflow.strand();
        }
        self.board.post(Standing::Lost {
            cause: cause.clone(),
        });
        Some(format!("the guest was lost: {cause}"))
    }

    /// A connection broke: ends the others. The source may see nothing of a break, and would go on
    /// where nobody receives any more; when it is asked no more, it begins anew.
    fn hang_up(&mut self, cause: &str) -> Instant {
        tracing::warn!(
            cause,
            missing_pages = self.gauge.missing_pages(),
            "the connections to the source broke: the guest waits at pages that are missing"
        );
        let now = Instant::now();
        self.broken_since = Some(now);
        if let Some(inflow) = &mut self.inflow {
            inflow.hang_up();
        }
        now
    }

    /// Every page is here: tells the source, again and again if need be.
    fn whole(&mut self) -> Option<String> {
        if let Some(inflow) = self.inflow.as_ref().filter(|_| self.duration.is_zero()) {
            self.duration = self.begun.elapsed();
            inflow.release();
            self.board.post(Standing::Complete);
            tracing::info!(
                pages = self.gauge.counts().missing,
                "all of the guest's memory is here"
            );
        }
        let end = "all of the guest's memory had arrived".to_owned();
        let Some(mut control) = self.control.take() else {
            let since = *self.broken_since.get_or_insert_with(Instant::now);
            return (since.elapsed() >= self.keeper.window).then_some(end);
        };
        let counts = self.gauge.counts();
        let complete = Message::Complete(Complete {
            running: self.running.clone(),
            counts: Some(crate::protocol::message::Arrivals {
                duration_us: self.duration.as_micros() as u64,
                ..counts
            }),
            hash: self.gauge.hash(),
        });
        // The other connections end behind this word: before it, that would look like a break.
        let told = self.last_word(&mut control, &complete);
        self.let_go();
        match told {
            Ok(()) => Some(end),
            Err(error) => {
                tracing::debug!(error = %error.chain(), "the source does not know yet that all is here");
                None
            }
        }
    }

    /// Says something final and waits until it is understood.
    fn last_word(&self, control: &mut Wire, word: &Message) -> Result<(), MigrationError> {
        let patience = Patience::Until(Instant::now() + SETTLED_WAIT.min(self.keeper.idle));
        control.set_stops(Vec::new());
        let told = control.send(word, patience).and_then(|()| {
            loop {
                match control.receive(patience)? {
                    Message::Settled => return Ok(()),
                    Message::KeepAlive(_) => {}
                    other => return Err(unexpected(&other).into()),
                }
            }
        });
        control.shutdown();
        if told.is_ok() {
            self.keeper.settled.cancel();
        }
        told
    }

    /// The guest was ended.
    fn end(&mut self, reason: String) -> String {
        if let Some(mut control) = self.control.take() {
            let ended = Message::Ended(Ended {
                reason: reason.clone(),
            });
            if let Err(error) = self.last_word(&mut control, &ended) {
                tracing::warn!(error = %error.chain(), "the source was not told that its guest has ended");
            }
        }
        self.let_go();
        self.board.post(Standing::Ended);
        reason
    }

    fn let_go(&mut self) {
        if let Some(mut inflow) = self.inflow.take() {
            inflow.end();
        }
    }

    /// A connection has come: the first of a generation, or one that belongs to it.
    fn link(&mut self, name: LinkName, wire: Wire) -> Result<(), MigrationError> {
        if name.is_control() {
            return self.begin(name, wire);
        }
        let Some((_, collection)) = &mut self.pending else {
            return Ok(());
        };
        collection.add(name, wire);
        if !collection.is_complete() {
            return Ok(());
        }
        let Some((control, collection)) = self.pending.take() else {
            return Ok(());
        };
        let (Some(links), Some(inflow)) = (collection.into_links(), &mut self.inflow) else {
            return Ok(());
        };
        inflow.resume(links)?;
        self.control = Some(control);
        tracing::info!(
            missing_pages = self.gauge.missing_pages(),
            "the source is back: pages arrive again"
        );
        Ok(())
    }

    /// The source begins a new generation: the old one ends, and the source is told what is missing.
    fn begin(&mut self, name: LinkName, mut wire: Wire) -> Result<(), MigrationError> {
        let patience = Patience::Until(Instant::now() + self.keeper.idle);
        let resume = match wire.receive(patience)? {
            Message::Resume(body) => body,
            other => return Err(unexpected(&other).into()),
        };
        let lanes = u16::try_from(resume.bulk_lanes).unwrap_or(u16::MAX);
        let meant = resume.incarnation == self.keeper.incarnation.as_bytes()
            && resume.generation == name.generation
            && resume.generation > self.generation
            && lanes <= self.keeper.max_lanes;
        if !meant {
            wire.abort("it does not continue this post-copy".to_owned());
            return Ok(());
        }
        self.generation = resume.generation;
        self.pending = None;
        self.control = None;
        let pages = match &mut self.inflow {
            Some(inflow) => inflow.pause(),
            None => PageSet::new(self.gauge.ram_pages()),
        };
        let missing = Missing {
            generation: self.generation,
            bulk_lanes: resume.bulk_lanes,
            ..missing::tell(&pages)
        };
        wire.send(&Message::Missing(missing), patience)?;
        if pages.is_empty() {
            self.control = Some(wire);
        } else {
            self.pending = Some((wire, Collection::new(self.generation, lanes)));
        }
        Ok(())
    }
}

fn unexpected(message: &Message) -> ProtocolError {
    ProtocolError::Unexpected {
        kind: message.kind(),
        state: "memory follows its guest",
    }
}
