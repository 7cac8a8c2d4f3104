//! One attempt to bring a guest here.

use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PAGE_SIZE, PageSet};

use super::custody::Ledger;
use super::store::Store;
use crate::error::MigrationError;
use crate::machine::{DestinationMachine, MachineError};
use crate::options::{DestinationOptions, Verification};
use crate::pages;
use crate::protocol::message::{
    Configuration, Prepared, Ready, RoundBegin, RoundEnd, Running, States, Stored,
};
use crate::protocol::{Header, Kind, Message, ProtocolError, Token};
use crate::report::DestinationReport;
use crate::wire::{Patience, Wire};

/// Pages between two words of progress within a round: 16 MiB.
const PROGRESS_PAGES: u64 = (16 << 20) / PAGE_SIZE;

/// Where a session is. Before the first stage the machine is built (`Configuration`, `Ready`).
///
/// ```text
///   Configuration         SwitchOver             States              Commit
///  ──────────────▶ Copying ────────▶ Switching ────────▶ Prepared ───────────▶ (runs)
///                    ▲ │ ▲               │                   │
///    round of pages  └─┘ └──── Back ─────┴──────── Back ─────┘
/// ```
///
/// Anything else that a stage receives, a damaged frame, silence or the end of the stream end the
/// session: the machine is dropped, the guest stays with the source. A switch-over holds one
/// round at most.
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

#[derive(Debug, Default)]
struct Round {
    number: u32,
    expected: u64,
    pages: u64,
    zero_pages: u64,
    told: u64,
}

pub(super) struct Session<'a, M> {
    wire: &'a mut Wire,
    ledger: &'a Ledger,
    options: &'a DestinationOptions,
    token: Token,
    machine: M,
    store: Store,
    verification: Verification,
    stage: Stage,
    round: Option<Round>,
    next_round: u32,
    last_attempt: u32,
    announced: Instant,
    restore: Duration,
    cpu_at_start: f64,
}

impl<'a, M: DestinationMachine> Session<'a, M> {
    /// Receives the configuration and builds the machine.
    pub(super) fn begin(
        wire: &'a mut Wire,
        ledger: &'a Ledger,
        options: &'a DestinationOptions,
        token: Token,
        build: &mut impl FnMut(&[u8]) -> Result<M, MachineError>,
    ) -> Result<Self, MigrationError> {
        let cpu_at_start = pages::thread_cpu_seconds();
        let patience = Patience::Idle(options.idle_timeout);
        let configuration = match wire.receive(patience)? {
            Message::Configuration(configuration) => configuration,
            other => return Err(unexpected(&other, "waiting for the configuration").into()),
        };
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
        let machine = build(&configuration.machine)?;
        check_ram(machine.memory(), &configuration)?;
        let store = Store::new(machine.memory().clone(), verification != Verification::Off);
        let incarnation = ledger.incarnation().as_bytes().to_vec();
        wire.send(&Message::Ready(Ready { incarnation }), patience)?;
        Ok(Self {
            wire,
            ledger,
            options,
            token,
            machine,
            store,
            verification,
            stage: Stage::Copying,
            round: None,
            next_round: 0,
            last_attempt: 0,
            announced: Instant::now(),
            restore: Duration::ZERO,
            cpu_at_start,
        })
    }

    /// Takes the guest over. On success it runs here.
    pub(super) fn run(mut self) -> Result<(M, DestinationReport), MigrationError> {
        loop {
            let header = self.wire.receive_header(self.patience())?;
            match header.kind {
                Kind::Pages => self.pages(&header)?,
                Kind::ZeroPages => self.zero_pages(&header)?,
                kind => {
                    let payload = self.wire.receive_payload(self.patience())?;
                    let message = Message::decode(kind, &payload)?;
                    if self.control(message)? {
                        return self.take_over();
                    }
                }
            }
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
            ..Round::default()
        });
        Ok(())
    }

    fn end_round(&mut self, body: &RoundEnd) -> Result<(), MigrationError> {
        let round = self.round.take().ok_or(ProtocolError::Unexpected {
            kind: Kind::RoundEnd,
            state: "no round was open",
        })?;
        let fits = body.round == round.number
            && body.pages == round.pages
            && body.zero_pages == round.zero_pages
            && round.pages + round.zero_pages == round.expected;
        if !fits {
            return Err(ProtocolError::invalid(
                Kind::RoundEnd,
                format!(
                    "{} pages and {} zero pages came, {} and {} were announced",
                    round.pages, round.zero_pages, body.pages, body.zero_pages
                ),
            )
            .into());
        }
        if self.stage == Stage::Copying {
            self.tell(&round, true)?;
        }
        Ok(())
    }

    fn pages(&mut self, header: &Header) -> Result<(), MigrationError> {
        let mut round = self.open_round(header.kind)?;
        let patience = self.patience();
        let stored = self.store.receive_pages(self.wire, header, patience)?;
        round.pages += stored;
        self.count(round)
    }

    fn zero_pages(&mut self, header: &Header) -> Result<(), MigrationError> {
        let mut round = self.open_round(header.kind)?;
        let payload = self.wire.receive_payload(self.patience())?;
        round.zero_pages += self.store.receive_zero_pages(&payload)?;
        self.count(round)
    }

    fn open_round(&mut self, kind: Kind) -> Result<Round, ProtocolError> {
        self.round.take().ok_or(ProtocolError::Unexpected {
            kind,
            state: "no round was open",
        })
    }

    fn count(&mut self, mut round: Round) -> Result<(), MigrationError> {
        let stored = round.pages + round.zero_pages;
        if stored > round.expected {
            let reason = "more pages than the round announced";
            return Err(ProtocolError::invalid(Kind::Pages, reason).into());
        }
        if self.stage == Stage::Copying && stored >= round.told + PROGRESS_PAGES {
            round.told = stored;
            self.tell(&round, false)?;
        }
        self.round = Some(round);
        Ok(())
    }

    fn tell(&mut self, round: &Round, complete: bool) -> Result<(), MigrationError> {
        let stored = Stored {
            round: round.number,
            pages: round.pages,
            zero_pages: round.zero_pages,
            complete,
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
        self.machine.restore(body.states)?;
        self.restore = begun.elapsed();
        log.harvest(&mut changed);
        self.store.note_written(&changed);
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
    fn take_over(mut self) -> Result<(M, DestinationReport), MigrationError> {
        if !self.ledger.commit(self.token) {
            return Err(MigrationError::Refused {
                reason: "the source took it back before the commit arrived".to_owned(),
            });
        }
        let begun = Instant::now();
        self.machine.start()?;
        let report = DestinationReport {
            restore_ms: self.restore.as_secs_f64() * 1e3,
            start_ms: begun.elapsed().as_secs_f64() * 1e3,
            blackout_ms: self.announced.elapsed().as_secs_f64() * 1e3,
            cpu_seconds: pages::thread_cpu_seconds() - self.cpu_at_start,
        };
        let running = Running {
            restore_us: self.restore.as_micros() as u64,
            start_us: (report.start_ms * 1e3) as u64,
            blackout_us: (report.blackout_ms * 1e3) as u64,
            cpu_us: (report.cpu_seconds * 1e6) as u64,
            hash: self.store.hash(),
        };
        self.ledger.running(self.token, running.clone());
        let patience = self.patience();
        self.wire.set_stops(Vec::new());
        if let Err(error) = self.wire.send(&Message::Running(running), patience) {
            // The source will ask, and the witness will answer.
            tracing::warn!(error = %error.chain(), "the source was not told that the guest runs");
        }
        Ok((self.machine, report))
    }

    fn patience(&self) -> Patience {
        Patience::Idle(self.options.idle_timeout)
    }
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
