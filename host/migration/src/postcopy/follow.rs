//! Sends the rest of a guest's memory after it, from the source, over as many sets of connections as
//! it takes.

use std::time::{Duration, Instant};

use dunlin_guest::Memory;

use super::links::{self, Generation};
use super::missing;
use super::outflow::{Outflow, Sent, Terms};
use crate::error::MigrationError;
use crate::ownership::Doubt;
use crate::protocol::message::{Answer, Arrivals, Complete, Resume};
use crate::protocol::{Message, ProtocolError};
use crate::source::{Closing, ask};
use crate::transport::{Connector, TransportError};
use crate::wire::{Patience, Wire};

/// Between two attempts to connect, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Between two words about progress.
const TICK: Duration = Duration::from_millis(200);
/// How long the last word to the destination may take.
const SETTLED_WAIT: Duration = Duration::from_millis(500);

/// How it ended.
#[derive(Debug)]
pub(crate) enum Followed {
    /// The destination has every page.
    Complete(Box<Complete>),
    /// The destination's guest has ended before that.
    Ended(String),
    /// The destination did not start the guest, and never will.
    NeverStarted,
    /// The destination cannot be reached, or has lost the guest.
    Lost(String),
}

/// What is known at the source alone, when the destination says nothing any more.
pub(crate) fn counted_here(missing: u64, sent: &Sent) -> Arrivals {
    Arrivals {
        missing,
        urgent_pages: sent.urgent_pages,
        prefetched_pages: sent.prefetched_pages,
        bulk_pages: sent.bulk_pages,
        duplicates: sent.repeated_pages,
        bytes: sent.bytes,
        ..Arrivals::default()
    }
}

/// What it takes.
pub(crate) struct Follow<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) connector: &'a mut dyn Connector,
    pub(crate) doubt: Doubt,
    pub(crate) terms: Terms,
    /// How long a new connection is tried for.
    pub(crate) window: Duration,
    pub(crate) bulk_lanes: u16,
    /// The last set of connections.
    pub(crate) generation: Generation,
    pub(crate) sent: Sent,
    pub(crate) recoveries: u32,
    /// Told now and then what was sent and how many pages are left.
    pub(crate) progress: &'a mut dyn FnMut(&Sent, u64),
}

impl Follow<'_> {
    /// Goes on until the end. `links` are those that are there; none when they broke.
    pub(crate) fn run(&mut self, links: Option<(&mut Wire, Outflow)>) -> Followed {
        if let Some((control, outflow)) = links
            && let Some(end) = self.serve(control, Some(outflow))
        {
            return end;
        }
        loop {
            let (mut control, outflow) = match self.reconnect() {
                Ok(links) => links,
                Err(end) => return end,
            };
            if let Some(end) = self.serve(&mut control, outflow) {
                return end;
            }
        }
    }

    /// Serves over one set of connections; `None` when it broke.
    fn serve(&mut self, control: &mut Wire, outflow: Option<Outflow>) -> Option<Followed> {
        let heard = self.attend(control, outflow.as_ref());
        control.shutdown();
        let broke = self.stop(outflow);
        match heard {
            Ok(end) => Some(end),
            Err(error) => {
                let error = broke.unwrap_or(error);
                tracing::warn!(error = %error.chain(), "the post-copy's connections broke");
                None
            }
        }
    }

    fn stop(&mut self, outflow: Option<Outflow>) -> Option<MigrationError> {
        let (sent, broke) = outflow?.stop();
        self.sent = sent;
        broke
    }

    /// Waits for the end of the post-copy, or of the connections.
    fn attend(
        &mut self,
        control: &mut Wire,
        outflow: Option<&Outflow>,
    ) -> Result<Followed, MigrationError> {
        control.set_stops(outflow.iter().map(|outflow| outflow.ended()).collect());
        let begun = Instant::now();
        let end = loop {
            match control.receive(Patience::Until(Instant::now() + TICK)) {
                Ok(Message::Complete(body)) => break Followed::Complete(Box::new(body)),
                Ok(Message::Ended(body)) => break Followed::Ended(body.reason),
                Ok(Message::KeepAlive(_)) => {}
                Ok(other) => return Err(unexpected(&other).into()),
                Err(MigrationError::Transport(TransportError::TimedOut { .. }))
                    // Without an outflow nothing else tells that the destination is silent.
                    if outflow.is_some() || begun.elapsed() < self.terms.idle => {}
                Err(error) => return Err(error),
            }
            if let Some(outflow) = outflow {
                let (sent, left) = outflow.progress();
                (self.progress)(&sent, left);
            }
        };
        control.set_stops(Vec::new());
        let patience = Patience::Until(Instant::now() + SETTLED_WAIT);
        if let Err(error) = control.send(&Message::Settled, patience) {
            tracing::debug!(error = %error.chain(), "the destination was not told the end");
        }
        Ok(end)
    }

    /// Tries to connect until it succeeds, or never will.
    fn reconnect(&mut self) -> Result<(Wire, Option<Outflow>), Followed> {
        let until = Instant::now() + self.window;
        let mut pause = FIRST_PAUSE;
        loop {
            let cause = match self.link_up() {
                Ok(Linked::Up(control, outflow)) => {
                    self.recoveries += 1;
                    tracing::info!(recoveries = self.recoveries, "the post-copy goes on");
                    return Ok((control, outflow));
                }
                Ok(Linked::Gone(reason)) => return Err(self.gone(reason)),
                Err(error) => error.chain(),
            };
            if self.connector.peer_is_dead() == Some(true) {
                return Err(Followed::Lost(format!(
                    "the destination's process is dead: {cause}"
                )));
            }
            if Instant::now() + pause >= until {
                let window = self.window.as_secs_f64();
                return Err(Followed::Lost(format!(
                    "no connection to the destination within {window} s: {cause}"
                )));
            }
            tracing::debug!(cause, "the destination is not reached yet");
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One attempt.
    fn link_up(&mut self) -> Result<Linked, MigrationError> {
        self.generation += 1;
        let deadline = Instant::now() + ATTEMPT.min(self.terms.idle);
        let patience = Patience::Until(deadline);
        let token = self.doubt.token;
        let mut control = links::open_control(self.connector, token, self.generation, deadline)?;
        let resume = Resume {
            incarnation: self.doubt.incarnation.as_bytes().to_vec(),
            generation: self.generation,
            bulk_lanes: u32::from(self.bulk_lanes),
        };
        control.send(&Message::Resume(resume), patience)?;
        let missing = match control.receive(patience)? {
            Message::Missing(body) => missing::hear(&body, self.memory.pages())?,
            Message::Gone(body) => return Ok(Linked::Gone(body.reason)),
            Message::Abort(body) => {
                return Err(MigrationError::Peer {
                    reason: body.reason,
                });
            }
            other => return Err(unexpected(&other).into()),
        };
        if missing.is_empty() {
            return Ok(Linked::Up(control, None));
        }
        let (generation, lanes) = (self.generation, self.bulk_lanes);
        let links = links::open_links(self.connector, token, generation, lanes, deadline)?;
        let outflow = Outflow::start(self.memory, missing, links, self.terms, self.sent)?;
        outflow.open();
        Ok(Linked::Up(control, Some(outflow)))
    }

    /// The destination does not know the guest: it never started it, or it has no longer.
    fn gone(&mut self, reason: String) -> Followed {
        match ask(self.connector, &self.doubt, Closing::Leave) {
            Ok((Answer::Relinquished, _)) => Followed::NeverStarted,
            Ok(_) | Err(_) => Followed::Lost(reason),
        }
    }
}

enum Linked {
    Up(Wire, Option<Outflow>),
    Gone(String),
}

fn unexpected(message: &Message) -> ProtocolError {
    ProtocolError::Unexpected {
        kind: message.kind(),
        state: "memory follows its guest",
    }
}
