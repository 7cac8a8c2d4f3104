//! One attempt to bring a guest here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PageSet};

use super::Host;
use super::inventory::Inventory;
use super::lanes::{Book, Lanes};
use super::missing::PostCopy;
use crate::error::MigrationError;
use crate::machine::{DestinationMachine, MachineError};
use crate::options::{DestinationOptions, Verification};
use crate::pages;
use crate::postcopy::Following;
use crate::protocol::lane::Counts;
use crate::protocol::message::{
    Configuration, Prepared, Process, Ready, RoundBegin, RoundEnd, Running, States, Stored,
};
use crate::protocol::{Kind, Message, ProtocolError, Token};
use crate::report::DestinationReport;
use crate::transport::TransportError;
use crate::wire::{Patience, Wire};

/// How often a session looks at its lanes, and tells how far they have come.
const TICK: Duration = Duration::from_millis(100);
/// How long the source may take to say why it closed its lanes.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Where a session is. Before the first stage the machine is built (`Configuration`, `Ready`) and
/// the page lanes are opened (`Lanes`).
///
/// ```text
///      Lanes              SwitchOver        (Missing,) States         Commit
///  ──────────────▶ Copying ────────▶ Switching ────────▶ Prepared ───────────▶ (runs)
///                    ▲ │ ▲               │                   │
///    round of pages  └─┘ └──── Back ─────┴──────── Back ─────┘
/// ```
///
/// Anything else that a stage receives, a damaged frame, silence or the end of the stream end the
/// session: the machine is dropped, the guest stays with the source. A switch-over holds one
/// round at most, or says which pages are missing (`destination::missing`): they follow the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The guest runs at the source.
    Copying,
    /// It is paused, and the last round is coming: the switch-over's number.
    Switching(u32),
    /// It could run here, and waits for `Commit`.
    Prepared(u32),
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Copying => "copying",
            Self::Switching(_) => "switching over",
            Self::Prepared(_) => "waiting for the commit",
        }
    }
}

/// A guest that runs here.
pub(super) struct Came<M> {
    pub(super) machine: M,
    pub(super) report: DestinationReport,
    /// The rest of its memory, and what the source was told.
    pub(super) following: Option<(Following, Running)>,
}

/// A round that has begun and not ended.
#[derive(Debug, Clone, Copy)]
struct Round {
    number: u32,
    /// Pages that come at most.
    expected: u64,
}

pub(super) struct Session<'a, M> {
    wire: &'a mut Wire,
    host: &'a Host<'a>,
    token: Token,
    machine: M,
    inventory: Arc<Inventory>,
    lanes: Lanes,
    verification: Verification,
    stage: Stage,
    round: Option<Round>,
    next_round: u32,
    last_attempt: u32,
    announced: Instant,
    restore: Duration,
    cpu_at_start: f64,
    post_copy: PostCopy,
    /// When the source was last heard, on whatever connection.
    alive: Instant,
    /// Signs of life of lanes that were seen, and pages that were told.
    seen: u64,
    told: u64,
}

impl<'a, M: DestinationMachine> Session<'a, M> {
    /// Receives the configuration, builds the machine, and opens the page lanes.
    pub(super) fn begin(
        wire: &'a mut Wire,
        host: &'a Host<'a>,
        token: Token,
        build: &mut impl FnMut(&[u8]) -> Result<M, MachineError>,
    ) -> Result<Self, MigrationError> {
        let cpu_at_start = pages::thread_cpu_seconds();
        let options = host.options;
        let patience = Patience::Idle(options.idle_timeout);
        let configuration = match wire.receive(patience)? {
            Message::Configuration(configuration) => configuration,
            other => return Err(unexpected(&other, "waiting for the configuration").into()),
        };
        let verification = check(&configuration, options)?;
        let machine = build(&configuration.machine)?;
        check_ram(machine.memory(), &configuration)?;
        let hashing = verification != Verification::Off;
        let inventory = Arc::new(Inventory::new(machine.memory().clone(), hashing));
        let most = configuration
            .lanes
            .clamp(1, options.max_lanes.max(1).into());
        let opening = host.lanes.open(token, most as u16);
        let post_copy = PostCopy::new(host, token);
        let ready = Ready {
            incarnation: host.ledger.incarnation().as_bytes().to_vec(),
            lanes: most,
            no_post_copy: post_copy.refusal(),
            process: Process::own(),
        };
        wire.send(&Message::Ready(ready), patience)?;
        let count = match wire.receive(patience)? {
            Message::Lanes(lanes) => lanes.count,
            Message::Abort(body) => {
                return Err(MigrationError::Peer {
                    reason: body.reason,
                });
            }
            other => return Err(unexpected(&other, "waiting for the page lanes").into()),
        };
        let receivers = opening.collect(count, Instant::now() + options.idle_timeout)?;
        let lanes = Lanes::start(receivers, &inventory)?;
        Ok(Self {
            wire,
            host,
            token,
            machine,
            inventory,
            lanes,
            verification,
            stage: Stage::Copying,
            round: None,
            next_round: 0,
            last_attempt: 0,
            announced: Instant::now(),
            restore: Duration::ZERO,
            cpu_at_start,
            post_copy,
            alive: Instant::now(),
            seen: 0,
            told: 0,
        })
    }

    /// Takes the guest over. On success it runs here.
    pub(super) fn run(mut self) -> Result<Came<M>, MigrationError> {
        loop {
            match self.wire.receive(Patience::Until(Instant::now() + TICK)) {
                Ok(message) => {
                    self.alive = Instant::now();
                    if self.control(message)? {
                        return self.take_over();
                    }
                }
                Err(MigrationError::Transport(TransportError::TimedOut { .. })) => self.tick()?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Looks at the lanes, and tells the source how far they have come.
    fn tick(&mut self) -> Result<(), MigrationError> {
        let book = Arc::clone(self.lanes.book());
        if let Some(error) = book.failure() {
            return Err(self.last_words(error));
        }
        let signs = book.signs_of_life() + self.wire.bytes_received();
        if signs != self.seen {
            self.seen = signs;
            self.alive = Instant::now();
        }
        if self.alive.elapsed() > self.host.options.idle_timeout {
            let peer = self.wire.peer().to_owned();
            return Err(TransportError::TimedOut { peer }.into());
        }
        match self.round {
            Some(round) if self.told != book.pages() => {
                self.tell(round.number, Counts::default(), Complete::NotYet)
            }
            _ => Ok(()),
        }
    }

    /// A source that gives up closes its lanes, and says why on the control connection: those
    /// words come first.
    fn last_words(&mut self, error: MigrationError) -> MigrationError {
        let patience = Patience::Until(Instant::now() + LAST_WORDS);
        match self.wire.receive(patience) {
            Ok(Message::Abort(body)) => MigrationError::Peer {
                reason: body.reason,
            },
            _ => error,
        }
    }

    /// Handles a control message; true when the guest is ours.
    fn control(&mut self, message: Message) -> Result<bool, MigrationError> {
        match (message, self.stage) {
            (Message::KeepAlive(body), _) => {
                let patience = self.patience();
                self.wire.echo(&body, patience)?;
            }
            (Message::Abort(body), _) => {
                return Err(MigrationError::Peer {
                    reason: body.reason,
                });
            }
            (Message::RoundBegin(body), Stage::Copying | Stage::Switching(_)) => {
                self.begin_round(&body)?;
            }
            (Message::RoundEnd(body), Stage::Copying | Stage::Switching(_)) => {
                self.end_round(&body)?;
            }
            (Message::SwitchOver(body), Stage::Copying)
                if self.round.is_none() && body.attempt == self.last_attempt + 1 =>
            {
                self.last_attempt = body.attempt;
                self.stage = Stage::Switching(body.attempt);
                self.announced = Instant::now();
            }
            (Message::Missing(body), Stage::Copying) if self.round.is_none() => {
                self.lanes.prepare_no_more();
                self.post_copy.make_room(&body, &self.inventory)?;
            }
            (Message::Missing(body), Stage::Switching(attempt))
                if self.round.is_none() && body.attempt == attempt =>
            {
                self.lanes.prepare_no_more();
                self.post_copy.begin(&body, &self.inventory)?;
            }
            (Message::States(body), Stage::Switching(attempt))
                if self.round.is_none() && body.attempt == attempt =>
            {
                self.prepare(body)?;
            }
            (Message::Back(body), Stage::Switching(attempt) | Stage::Prepared(attempt))
                if body.attempt == attempt =>
            {
                self.round = None;
                self.stage = Stage::Copying;
                self.post_copy.end();
            }
            (Message::Commit(body), Stage::Prepared(attempt)) if body.attempt == attempt => {
                return Ok(true);
            }
            (message, stage) => return Err(unexpected(&message, stage.name()).into()),
        }
        Ok(false)
    }

    fn begin_round(&mut self, body: &RoundBegin) -> Result<(), ProtocolError> {
        let kind = Kind::RoundBegin;
        if self.round.is_some() || body.round != self.next_round {
            return Err(ProtocolError::invalid(
                kind,
                format!("round {} where {} was due", body.round, self.next_round),
            ));
        }
        if body.pages > self.machine.memory().pages() {
            return Err(ProtocolError::invalid(kind, "more pages than RAM has"));
        }
        self.next_round = body.round.saturating_add(1);
        self.round = Some(Round {
            number: body.round,
            expected: body.pages,
        });
        Ok(())
    }

    /// Waits for the marks of all lanes: then everything of the round is in RAM.
    fn end_round(&mut self, body: &RoundEnd) -> Result<(), MigrationError> {
        let round = self.round.ok_or(ProtocolError::Unexpected {
            kind: Kind::RoundEnd,
            state: "no round was open",
        })?;
        let book = Arc::clone(self.lanes.book());
        let lanes = body.lanes as usize;
        if body.round != round.number || !(1..=book.lanes()).contains(&lanes) {
            let reason = format!("it ends round {} on {lanes} lanes", body.round);
            return Err(ProtocolError::invalid(Kind::RoundEnd, reason).into());
        }
        let came = self.marks(&book, lanes, round.number)?;
        let announced = Counts {
            pages: body.pages,
            zero_pages: body.zero_pages,
            same_pages: body.same_pages,
        };
        if came != announced || came.total() > round.expected {
            let reason = format!(
                "{came:?} came, {announced:?} were announced, of {} at most",
                round.expected
            );
            return Err(ProtocolError::invalid(Kind::RoundEnd, reason).into());
        }
        self.round = None;
        self.tell(round.number, came, Complete::Yes)
    }

    fn marks(&mut self, book: &Book, lanes: usize, round: u32) -> Result<Counts, MigrationError> {
        loop {
            match book.marks(lanes, round, Instant::now() + TICK) {
                Ok(Some(counts)) => return Ok(counts),
                Ok(None) => self.tick()?,
                Err(error) => return Err(self.last_words(error)),
            }
            if self.wire.is_stopped() {
                let peer = self.wire.peer().to_owned();
                return Err(TransportError::Stopped { peer }.into());
            }
        }
    }

    fn tell(
        &mut self,
        round: u32,
        counts: Counts,
        complete: Complete,
    ) -> Result<(), MigrationError> {
        self.told = self.lanes.book().pages();
        let stored = Stored {
            round,
            pages: counts.pages,
            zero_pages: counts.zero_pages,
            same_pages: counts.same_pages,
            complete: complete == Complete::Yes,
            all_content_pages: self.told,
        };
        let patience = self.patience();
        self.wire.send(&Message::Stored(stored), patience)
    }

    fn prepare(&mut self, body: States) -> Result<(), MigrationError> {
        let hash = match (body.hash_wanted, self.verification) {
            (false, _) => None,
            (true, Verification::BeforeHandOver) => Some(pages::hash_ram(self.machine.memory())),
            (true, _) => {
                let reason = "a hash that the configuration did not announce";
                return Err(ProtocolError::invalid(Kind::States, reason).into());
            }
        };
        let log = self.machine.memory().dirty_log().clone();
        let mut changed = PageSet::new(self.machine.memory().pages());
        log.harvest(&mut changed);
        changed.clear();
        let begun = Instant::now();
        let restored = self.machine.restore(body.states);
        // When the missing pages stopped coming, restoring found anything, and the source goes on.
        if !self.post_copy.is_broken() {
            restored?;
        }
        self.restore = begun.elapsed();
        log.harvest(&mut changed);
        self.inventory.note_written(&changed);
        self.stage = Stage::Prepared(body.attempt);
        let prepared = Prepared {
            attempt: body.attempt,
            restore_us: self.restore.as_micros() as u64,
            hash,
            changed_pages: changed.iter().map(|page| page.0).collect(),
        };
        let patience = self.patience();
        self.wire.send(&Message::Prepared(prepared), patience)
    }

    /// `Commit` came. From the ledger's word on the guest is owned here.
    fn take_over(mut self) -> Result<Came<M>, MigrationError> {
        if !self.post_copy.own() || !self.host.ledger.commit(self.token) {
            return Err(MigrationError::Refused {
                reason: "the source took it back, or its memory stopped coming, before the commit arrived"
                    .to_owned(),
            });
        }
        let following = self.post_copy.keep(self.host)?;
        let begun = Instant::now();
        if let Err(error) = self.machine.start() {
            if let Some(following) = following {
                following.relinquish();
            }
            return Err(error.into());
        }
        let report = DestinationReport {
            restore_ms: self.restore.as_secs_f64() * 1e3,
            start_ms: begun.elapsed().as_secs_f64() * 1e3,
            blackout_ms: self.announced.elapsed().as_secs_f64() * 1e3,
            cpu_seconds: pages::thread_cpu_seconds() - self.cpu_at_start
                + self.lanes.book().cpu_seconds(),
        };
        let running = Running {
            restore_us: self.restore.as_micros() as u64,
            start_us: (report.start_ms * 1e3) as u64,
            blackout_us: (report.blackout_ms * 1e3) as u64,
            cpu_us: (report.cpu_seconds * 1e6) as u64,
            // Memory that follows is hashed when it is here.
            hash: if following.is_none() {
                self.inventory.hash()
            } else {
                None
            },
        };
        self.host.ledger.running(self.token, running.clone());
        let patience = self.patience();
        self.wire.set_stops(Vec::new());
        if let Err(error) = self.wire.send(&Message::Running(running.clone()), patience) {
            // The source will ask, and the witness will answer.
            tracing::warn!(error = %error.chain(), "the source was not told that the guest runs");
        }
        Ok(Came {
            machine: self.machine,
            report,
            following: following.map(|following| (following, running)),
        })
    }

    fn patience(&self) -> Patience {
        Patience::Idle(self.host.options.idle_timeout)
    }
}

/// Is all of a round there?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Complete {
    Yes,
    NotYet,
}

/// What a configuration asks for, when that can be had.
fn check(
    configuration: &Configuration,
    options: &DestinationOptions,
) -> Result<Verification, MigrationError> {
    let verification = match configuration.verification {
        0 => Verification::Off,
        1 => Verification::AfterHandOver,
        2 => Verification::BeforeHandOver,
        _ => {
            let kind = Kind::Configuration;
            return Err(ProtocolError::invalid(kind, "unknown verification").into());
        }
    };
    if configuration.ram_bytes > options.max_ram {
        return Err(MigrationError::Refused {
            reason: format!(
                "it has {} bytes of RAM, at most {} are accepted",
                configuration.ram_bytes, options.max_ram
            ),
        });
    }
    Ok(verification)
}

/// Has the machine that was built the RAM that the source's guest has?
pub(crate) fn check_ram(
    memory: &Memory,
    configuration: &Configuration,
) -> Result<(), MigrationError> {
    let here: Vec<_> = memory
        .regions()
        .map(|r| (r.start, r.size, r.offset))
        .collect();
    let there: Vec<_> = configuration
        .regions
        .iter()
        .map(|r| (r.start, r.size, r.offset))
        .collect();
    if memory.size() == configuration.ram_bytes && here == there {
        return Ok(());
    }
    Err(MigrationError::Refused {
        reason: format!(
            "its RAM of {} bytes does not lie where this build places {} bytes",
            configuration.ram_bytes,
            memory.size()
        ),
    })
}

fn unexpected(message: &Message, state: &'static str) -> ProtocolError {
    ProtocolError::Unexpected {
        kind: message.kind(),
        state,
    }
}
