//! The switch-over of a post-copy: the guest changes hands before the rest of its memory has, and the
//! source serves that memory until the destination has all of it. See [`crate::postcopy`].

use std::time::{Duration, Instant};

use super::attempt::{Attempt, ms};
use super::hand_over::{Switched, missed};
use super::inquiry::{Closing, ask};
use super::{End, Phase};
use crate::error::MigrationError;
use crate::machine::SourceMachine;
use crate::options::{Compression, Progress, Step, Verification};
use crate::pages;
use crate::postcopy::{self, Follow, Followed, Outflow, Sent, SourceLinks, Terms};
use crate::protocol::Message;
use crate::protocol::message::{Answer, Missing, Prepared, States};
use crate::report::{PostCopyReport, SwitchOverReport};
use crate::transport::Connector;
use crate::wire::Patience;

/// Between two questions who owns the guest, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A pause that has begun, and when it has to end.
struct Paused {
    at: Instant,
    deadline: Instant,
    times: SwitchOverReport,
}

/// What is known of a guest whose hand-over was cut.
enum Owner {
    Destination,
    Source,
    Unknown,
}

impl Attempt<'_, '_> {
    /// Why memory cannot follow the guest in this move; `None` when it can.
    pub(super) fn no_post_copy(&self) -> Option<&str> {
        self.report.no_post_copy.as_deref()
    }

    /// Stops the guest and hands it over without the pages that the destination lacks, which
    /// follow; taken back when that would miss the downtime limit.
    ///
    /// An error means that the guest is still the source's, and perhaps paused.
    pub(super) fn post_copy(
        &mut self,
        machine: &mut dyn SourceMachine,
        connector: &mut dyn Connector,
    ) -> Result<Switched, MigrationError> {
        self.generation += 1;
        let deadline = Instant::now() + self.options.idle_timeout;
        let lanes = self.bulk_lanes();
        let token = self.doubt.token;
        let links = postcopy::open_links(connector, token, self.generation, lanes, deadline);
        let links = match links {
            Ok(links) => links,
            Err(error) => {
                let reason = error.chain();
                tracing::warn!(
                    reason,
                    "memory cannot follow the guest: all of it goes before"
                );
                self.report.no_post_copy = Some(reason);
                return Ok(Switched::TakenBack);
            }
        };
        self.announce(machine)?;
        let (at, times) = self.stop_guest(machine)?;
        let limit = self.options.downtime_limit;
        let mut paused = Paused {
            at,
            deadline: at + limit.saturating_sub(self.policy.reserve()),
            times,
        };
        match self.leave_memory(machine, links, &mut paused)? {
            (Some(prepared), Some(outflow)) => {
                self.tell(Step::HandingOver, self.next_round, 0, 0);
                let end = self.send_after(connector, (paused, prepared), outflow)?;
                Ok(Switched::End(end))
            }
            (_, outflow) => {
                // Serves until the destination has answered: its restoring may wait for a page.
                self.take_back(machine, paused.at, &paused.times)?;
                drop(outflow);
                Ok(Switched::TakenBack)
            }
        }
    }

    /// Tells the destination, while the guest still runs here, which pages will be missing: making
    /// room for those takes time that the pause need not have.
    fn announce(&mut self, machine: &mut dyn SourceMachine) -> Result<(), MigrationError> {
        self.harvest(machine)?;
        self.forget_sent();
        let missing = Missing {
            attempt: self.switch_over + 1,
            ..postcopy::tell(&self.pending)
        };
        let patience = Patience::Idle(self.options.idle_timeout);
        self.wire.send(&Message::Missing(missing), patience)?;
        self.echo().map(|_took| ())
    }

    /// The destination forgets what it has of pending pages.
    fn forget_sent(&self) {
        if let Some(sent) = &self.sent {
            self.pending.iter().for_each(|page| sent.forget(page));
        }
    }

    fn bulk_lanes(&self) -> u16 {
        u16::try_from(self.lanes.active())
            .unwrap_or(u16::MAX)
            .max(1)
    }

    fn terms(&self) -> Terms {
        let limit = self.options.bandwidth_limit;
        Terms {
            idle: self.options.idle_timeout,
            bandwidth: limit,
            // Without a limit the wire is rarely what is scarce while a guest waits for pages.
            pack: match self.options.compression {
                Compression::Off => false,
                Compression::Auto => limit.is_some(),
                Compression::Lz4 => true,
            },
        }
    }

    /// Everything between the pause and `Commit`. No answer: the limit would be missed.
    fn leave_memory(
        &mut self,
        machine: &mut dyn SourceMachine,
        links: SourceLinks,
        paused: &mut Paused,
    ) -> Result<(Option<Prepared>, Option<Outflow>), MigrationError> {
        let patience = Patience::Until(paused.deadline);
        let states = machine.save()?;
        self.harvest(machine)?;
        paused.times.saved_ms = ms(paused.at.elapsed());
        if Instant::now() >= paused.deadline {
            return Ok((None, None));
        }
        self.forget_sent();
        let set = self.take_pending();
        let missing = Message::Missing(Missing {
            attempt: self.switch_over,
            generation: self.generation,
            bulk_lanes: self.bulk_lanes().into(),
            ..postcopy::tell(&set)
        });
        let body = Message::States(States {
            attempt: self.switch_over,
            states,
            hash_wanted: false,
        });
        paused.times.state_bytes = body.encode().len() as u64;
        let sent = self.wire.send(&missing, patience);
        if missed(&sent, Some(paused.deadline)) {
            return Ok((None, None));
        }
        sent?;
        let terms = self.terms();
        let outflow = Outflow::start(&self.memory, set, links, terms, Sent::default())?;
        let ended = outflow.ended();
        self.wire
            .set_stops(vec![self.cancel.clone(), ended.clone()]);
        self.restoring = true;
        let prepared = self.wire.send(&body, patience).and_then(|()| {
            paused.times.sent_ms = ms(paused.at.elapsed());
            self.await_prepared(patience)
        });
        self.wire.set_stops(vec![self.cancel.clone()]);
        if missed(&prepared, Some(paused.deadline)) || ended.is_cancelled() {
            return Ok((None, Some(outflow)));
        }
        let prepared = prepared?;
        paused.times.prepared_ms = ms(paused.at.elapsed());
        let in_time = Instant::now() < paused.deadline;
        Ok((in_time.then_some(prepared), Some(outflow)))
    }

    /// Gives the guest up, and sends its memory after it until the destination has it all. An error
    /// means that the destination has promised not to run it.
    fn send_after(
        &mut self,
        connector: &mut dyn Connector,
        (paused, prepared): (Paused, Prepared),
        outflow: Outflow,
    ) -> Result<End, MigrationError> {
        if self.cancel.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        self.report.paused_at_ms = Some(ms(paused.at - self.started));
        self.wire.set_stops(vec![outflow.ended()]);
        self.phase = Phase::Committed;
        let mut times = paused.times;
        let (running, links) = match self.commit() {
            Ok(running) => {
                times.running_ms = ms(paused.at.elapsed());
                self.note_running(paused.at, &prepared, times, &running);
                outflow.open();
                (Some(running), Some(outflow))
            }
            Err(error) => {
                self.wire.shutdown();
                tracing::warn!(error = %error.chain(), "the hand-over is open, asking who owns the guest");
                let owner = self.ask_owner(connector);
                drop(outflow);
                match owner {
                    Owner::Destination => (None, None),
                    Owner::Source => return Err(error),
                    Owner::Unknown => return Ok(End::Lost(error.chain())),
                }
            }
        };
        let followed = self.follow_guest(connector, links);
        match followed {
            Followed::Complete(body) => {
                if let (None, Some(running)) = (running, &body.running) {
                    times.running_ms = ms(paused.at.elapsed());
                    self.note_running(paused.at, &prepared, times, running);
                }
                self.verify(body.hash);
                Ok(End::Moved)
            }
            Followed::Ended(reason) => {
                tracing::info!(
                    reason,
                    "the guest ended at the destination before all of its memory was there"
                );
                Ok(End::Moved)
            }
            Followed::NeverStarted => {
                let reason = "it did not start the guest".to_owned();
                let error = MigrationError::Peer { reason };
                // Only a destination that has started it could not say so.
                if self.report.blackout_ms.is_some() {
                    return Ok(End::Lost(error.chain()));
                }
                Err(error)
            }
            Followed::Lost(cause) => Ok(End::Lost(cause)),
        }
    }

    /// Asks until somebody knows who owns the guest, for as long as it may wait for its memory.
    fn ask_owner(&self, connector: &mut dyn Connector) -> Owner {
        let patience = (self.options.inquiry_timeout).max(self.options.reconnect_window);
        let until = Instant::now() + patience;
        let mut pause = FIRST_PAUSE;
        loop {
            match ask(connector, &self.doubt, Closing::Leave) {
                Ok((Answer::Running | Answer::Starting, _)) => return Owner::Destination,
                Ok((Answer::Relinquished, _)) => return Owner::Source,
                Ok(_) | Err(_) => {}
            }
            if connector.peer_is_dead() == Some(true) {
                tracing::warn!("the destination is dead: its guest does not run");
                return Owner::Source;
            }
            if Instant::now() + pause >= until {
                return Owner::Unknown;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Serves the guest's memory to the end.
    fn follow_guest(&mut self, connector: &mut dyn Connector, links: Option<Outflow>) -> Followed {
        let before = self.bytes_sent();
        let terms = self.terms();
        let lanes = self.bulk_lanes();
        let total = self.unconfirmed.len();
        let (round, callback) = (self.next_round, &mut self.progress);
        let mut progress = |sent: &Sent, left: u64| {
            if let Some(callback) = callback {
                callback(Progress {
                    step: Step::Following,
                    round,
                    pages_done: total.saturating_sub(left),
                    pages_total: total,
                    bytes_sent: before + sent.bytes,
                });
            }
        };
        let mut follow = Follow {
            memory: &self.memory,
            connector,
            doubt: self.doubt,
            terms,
            window: self.options.reconnect_window,
            bulk_lanes: lanes,
            generation: self.generation,
            sent: Sent::default(),
            recoveries: 0,
            progress: &mut progress,
        };
        let followed = follow.run(links.map(|outflow| (&mut self.wire, outflow)));
        let (sent, recoveries) = (follow.sent, follow.recoveries);
        self.bytes_after += sent.bytes;
        let counts = match &followed {
            Followed::Complete(body) => body.counts.unwrap_or_default(),
            _ => postcopy::counted_here(total, &sent),
        };
        self.report.post_copy = Some(PostCopyReport {
            recoveries,
            ..PostCopyReport::from_arrivals(&counts)
        });
        followed
    }

    /// Compares what the destination has stored with what is here.
    fn verify(&mut self, there: Option<u64>) {
        if self.options.verification == Verification::Off {
            return;
        }
        let here = pages::hash_ram(&self.memory);
        self.report.ram_hash = Some(format!("{here:016x}"));
        self.report.verified = Some(there == Some(here));
        if there != Some(here) {
            tracing::error!(here, ?there, "memory differs after the move");
        }
    }
}
