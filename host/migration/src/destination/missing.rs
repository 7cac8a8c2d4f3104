//! A session whose source hands the guest over before all of its memory: see [`crate::postcopy`].

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use super::Host;
use super::inventory::Inventory;
use crate::error::MigrationError;
use crate::postcopy::{self, Basin, Event, Following, Inflow, Keeper};
use crate::protocol::message::Missing;
use crate::protocol::{Kind, ProtocolError, Token};
use crate::uffd::Userfaultfd;

/// What a session has for it.
pub(super) struct PostCopy {
    token: Token,
    line: Result<Line, String>,
    idle: Duration,
    max_lanes: u16,
    /// Memory that fills up in the present switch-over.
    filling: Option<Inflow>,
    /// The last set of connections.
    generation: u32,
}

struct Line {
    faults: Arc<Userfaultfd>,
    events: SyncSender<Event>,
    /// Goes to the keeper with the guest.
    inbox: Option<Receiver<Event>>,
}

impl PostCopy {
    pub(super) fn new(host: &Host<'_>, token: Token) -> Self {
        let options = host.options;
        let line = options.faults.clone().map(|faults| {
            let (events, inbox) = host.switchboard.open(token);
            Line {
                faults,
                events,
                inbox: Some(inbox),
            }
        });
        Self {
            token,
            line,
            idle: options.idle_timeout,
            max_lanes: options.max_lanes.max(1),
            filling: None,
            generation: 0,
        }
    }

    /// Why it cannot be.
    pub(super) fn refusal(&self) -> Option<String> {
        self.line.as_ref().err().cloned()
    }

    /// The source says which pages will be missing, while the guest still runs there.
    pub(super) fn make_room(
        &self,
        body: &Missing,
        inventory: &Inventory,
    ) -> Result<(), MigrationError> {
        let Ok(line) = &self.line else {
            let reason = "pages are not to follow";
            return Err(ProtocolError::invalid(Kind::Missing, reason).into());
        };
        let memory = inventory.memory();
        let missing = postcopy::hear(body, memory.pages())?;
        postcopy::make_room(memory, &line.faults, &missing)
    }

    /// The source says which pages are missing: they are asked for from now on.
    pub(super) fn begin(
        &mut self,
        body: &Missing,
        inventory: &Inventory,
    ) -> Result<(), MigrationError> {
        let invalid = |reason: &str| ProtocolError::invalid(Kind::Missing, reason);
        let (Ok(line), None) = (&self.line, &self.filling) else {
            return Err(invalid("pages are not to follow").into());
        };
        let Some(inbox) = &line.inbox else {
            return Err(invalid("the guest is here").into());
        };
        let lanes = u16::try_from(body.bulk_lanes).unwrap_or(u16::MAX);
        if lanes > self.max_lanes || body.generation <= self.generation {
            return Err(invalid("its connections cannot be").into());
        }
        let memory = inventory.memory();
        let missing = postcopy::hear(body, memory.pages())?;
        self.generation = body.generation;
        let links = postcopy::collect(inbox, body.generation, lanes, self.idle)?;
        let basin = Basin {
            memory: memory.clone(),
            uffd: Arc::clone(&line.faults),
            hash: inventory.hash_without(&missing),
            missing,
            idle: self.idle,
        };
        let events = line.events.clone();
        let inflow = Inflow::begin(basin, links, move || {
            // A keeper with so much to do looks at the flow anyway.
            let _full = events.try_send(Event::Changed);
        })?;
        self.filling = Some(inflow);
        Ok(())
    }

    /// The guest runs on at the source.
    pub(super) fn end(&mut self) {
        self.filling = None;
    }

    /// Have pages that are missing stopped to come?
    pub(super) fn is_broken(&self) -> bool {
        let filling = self.filling.as_ref();
        filling.is_some_and(|inflow| inflow.gauge().is_broken())
    }

    /// The guest is to be owned here. False: missing pages have stopped to come.
    pub(super) fn own(&self) -> bool {
        self.filling.as_ref().is_none_or(Inflow::own)
    }

    /// The guest is owned here: its memory keeps coming, whatever happens to the connections.
    pub(super) fn keep(&mut self, host: &Host<'_>) -> Result<Option<Following>, MigrationError> {
        let Some(inflow) = self.filling.take() else {
            return Ok(None);
        };
        let Ok(line) = &mut self.line else {
            return Ok(None);
        };
        let Some(inbox) = line.inbox.take() else {
            return Ok(None);
        };
        let keeper = Keeper {
            token: self.token,
            incarnation: host.ledger.incarnation(),
            generation: self.generation,
            switchboard: host.switchboard.clone(),
            line: inbox,
            events: line.events.clone(),
            settled: host.settled.clone(),
            idle: self.idle,
            window: host.options.reconnect_window,
            max_lanes: self.max_lanes,
        };
        keeper.keep(inflow).map(Some)
    }
}
