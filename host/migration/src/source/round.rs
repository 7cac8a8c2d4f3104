//! Sends one round: pages in batches with their content, zero pages as runs.

use std::time::Instant;

use dunlin_guest::{Memory, PageIndex, PageSet};

use super::attempt::Attempt;
use crate::error::MigrationError;
use crate::options::Step;
use crate::pages::{self, Extents, PAGE};
use crate::protocol::frame::MAX_ZERO_RUNS;
use crate::protocol::message::{RoundBegin, RoundEnd};
use crate::protocol::runs::{self, Run};
use crate::protocol::{Kind, Message};
use crate::transport::TransportError;
use crate::wire::{Patience, Wire};

/// Pages in a batch: 512 KiB. Larger ones leave the processor's cache before they are sent.
const BATCH_PAGES: usize = 128;

/// Pages copied out of guest memory, so that the checksum covers what is sent although the guest
/// writes on.
pub(crate) struct Batch {
    data: Vec<u8>,
    limit: usize,
    pages: usize,
    runs: Vec<Run>,
    zero_runs: Vec<Run>,
    table: Vec<u8>,
}

impl Batch {
    pub(crate) fn new(limit: usize) -> Self {
        let limit = limit.clamp(1, BATCH_PAGES);
        Self {
            data: vec![0; limit * PAGE],
            limit,
            pages: 0,
            runs: Vec::new(),
            zero_runs: Vec::new(),
            table: Vec::new(),
        }
    }

    /// Copies a page. True when it has content.
    pub(crate) fn add(&mut self, memory: &Memory, page: PageIndex) -> bool {
        let slot = &mut self.data[self.pages * PAGE..];
        let Some(slot) = slot.first_chunk_mut::<PAGE>() else {
            return false;
        };
        memory.read_page(page, slot);
        if pages::is_zero(slot) {
            self.add_zero(page);
            return false;
        }
        self.pages += 1;
        runs::push(&mut self.runs, page);
        true
    }

    pub(crate) fn add_zero(&mut self, page: PageIndex) {
        runs::push(&mut self.zero_runs, page);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.pages == self.limit || self.zero_runs.len() == MAX_ZERO_RUNS
    }

    fn bytes(&self) -> u64 {
        (self.pages * PAGE) as u64
    }

    /// Sends what has been added. After an error the batch is lost: its pages have to be sent
    /// again.
    pub(crate) fn send(
        &mut self,
        wire: &mut Wire,
        patience: Patience,
    ) -> Result<(), MigrationError> {
        if self.pages > 0 {
            runs::encode(&self.runs, &mut self.table);
            let data = &self.data[..self.pages * PAGE];
            self.pages = 0;
            self.runs.clear();
            wire.send_frame(Kind::Pages, &[&self.table, data], patience)?;
        }
        if !self.zero_runs.is_empty() {
            runs::encode(&self.zero_runs, &mut self.table);
            self.zero_runs.clear();
            wire.send_frame(Kind::ZeroPages, &[&self.table], patience)?;
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.pages = 0;
        self.runs.clear();
        self.zero_runs.clear();
    }
}

/// What a round came to.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
}

impl Attempt<'_, '_> {
    /// Sends the pages of `set` as round `number`.
    pub(super) fn send_pages(
        &mut self,
        number: u32,
        set: &PageSet,
        patience: Patience,
    ) -> Result<Counts, MigrationError> {
        let begin = RoundBegin {
            round: number,
            pages: set.len(),
        };
        self.wire.send(&Message::RoundBegin(begin), patience)?;
        let memory = self.memory.clone();
        // Only the first round names pages that were never touched; looking for holes among
        // pages that the guest wrote would find none.
        let mut extents = (number == 0).then(|| Extents::new(&memory));
        let mut counts = Counts::default();
        self.batch.clear();
        for page in set.iter() {
            if extents.as_mut().is_some_and(|e| e.hole_at(page).is_some()) {
                self.batch.add_zero(page);
                counts.zero_pages += 1;
            } else if self.batch.add(&memory, page) {
                counts.pages += 1;
            } else {
                counts.zero_pages += 1;
            }
            if self.batch.is_full() {
                self.send_batch(patience)?;
                let step = if self.paused {
                    Step::SwitchingOver
                } else {
                    Step::Copying
                };
                self.tell(step, number, counts.pages + counts.zero_pages, set.len());
            }
        }
        self.send_batch(patience)?;
        let end = RoundEnd {
            round: number,
            pages: counts.pages,
            zero_pages: counts.zero_pages,
        };
        self.wire.send(&Message::RoundEnd(end), patience)?;
        Ok(counts)
    }

    fn send_batch(&mut self, patience: Patience) -> Result<(), MigrationError> {
        let deadline: Option<Instant> = match patience {
            Patience::Until(deadline) => Some(deadline),
            Patience::Idle(_) => None,
        };
        let in_time = self
            .throttle
            .wait(self.batch.bytes(), deadline, &self.cancel)?;
        if !in_time {
            let peer = self.wire.peer().to_owned();
            return Err(TransportError::TimedOut { peer }.into());
        }
        self.batch.send(&mut self.wire, patience)?;
        self.hear_words()
    }
}
