//! What others see of memory that is still arriving.

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::inflow::Gauge;
use super::links::Event;
use crate::report::PostCopyReport;

/// How the arrival of a guest's memory stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Pages arrive.
    Arriving,
    /// The connections broke; the guest waits at missing pages until the source comes back.
    Waiting {
        /// Why they broke.
        cause: String,
    },
    /// Every page is here.
    Complete,
    /// The guest was ended before every page was here.
    Ended,
    /// The rest will not come: the guest cannot go on, and must not.
    Lost {
        /// Why.
        cause: String,
    },
}

impl Standing {
    /// Does it change any more?
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Arriving | Self::Waiting { .. })
    }
}

#[derive(Debug)]
pub(super) struct Board {
    standing: Mutex<Standing>,
    changed: Condvar,
}

impl Board {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            standing: Mutex::new(Standing::Arriving),
            changed: Condvar::new(),
        })
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A final standing stays.
    pub(super) fn post(&self, standing: Standing) {
        let mut now = self.standing();
        if !now.is_final() {
            *now = standing;
            self.changed.notify_all();
        }
    }
}

/// The rest of a guest's memory, which follows it. Clones see the same.
#[derive(Clone)]
pub struct Following {
    pub(super) board: Arc<Board>,
    pub(super) gauge: Gauge,
    pub(super) events: SyncSender<Event>,
}

impl std::fmt::Debug for Following {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Following")
            .field("standing", &self.standing())
            .field("missing_pages", &self.missing_pages())
            .finish_non_exhaustive()
    }
}

impl Following {
    /// Tells the keeper.
    pub(crate) fn events(&self) -> SyncSender<Event> {
        self.events.clone()
    }

    /// The guest did not start, and goes back to the source.
    pub(crate) fn relinquish(&self) {
        // A keeper that is gone keeps nothing.
        let _gone = self.events.send(Event::Relinquished);
    }

    /// How it stands.
    pub fn standing(&self) -> Standing {
        self.board.standing().clone()
    }

    /// Pages that have not come.
    pub fn missing_pages(&self) -> u64 {
        self.gauge.missing_pages()
    }

    /// What was counted so far.
    pub fn report(&self) -> PostCopyReport {
        PostCopyReport::from_arrivals(&self.gauge.counts())
    }

    /// Waits until every page is here, or none comes any more.
    pub fn wait(&self) -> Standing {
        let mut standing = self.board.standing();
        while !standing.is_final() {
            let waited = self.board.changed.wait(standing);
            standing = waited.unwrap_or_else(PoisonError::into_inner);
        }
        standing.clone()
    }

    /// The guest has ended, and nothing touches its memory any more: the source is told that it
    /// may forget it. Returns when it was, or cannot be told.
    pub fn end(&self, reason: &str) {
        // A keeper that is gone has nothing to tell.
        let told = self.events.send(Event::End(reason.to_owned()));
        if told.is_ok() {
            self.wait();
        }
    }
}
