//! Fills the buffers of a page lane with pages, and says behind them which they are.

use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PAGE_SIZE, PageIndex};
use dunlin_lane::{Buffer, LaneError, PageSender, Placement, Ticket};

use super::sent::Sent;
use crate::pages::{self, PAGE};
use crate::protocol::lane::{self, Counts, MAX_BLOCK, MAX_PAGES, MAX_ZERO_RUNS};
use crate::protocol::runs::{self, Run};

/// Pages in a buffer: 512 KiB. More leave the processor's cache before they are sent.
pub(super) const BATCH_PAGES: usize = 128;
/// Equal pages that are told at once.
const MAX_SAME: u32 = 1 << 16;

/// Pages on their way into one lane. What is copied out of guest memory is what is checked for
/// zeros, hashed, compressed and sent: the guest may write on meanwhile. Where pages are neither
/// hashed nor compressed, a lane may read them from guest memory itself: what the guest writes after
/// they were looked at, it has marked as dirty.
pub(super) struct Packer {
    memory: Memory,
    limit: usize,
    /// The lane reads the pages of this batch itself.
    lent: bool,
    buffer: Option<Buffer>,
    placements: Vec<Placement>,
    pages: usize,
    stored: Vec<Run>,
    zero: Vec<Run>,
    same: u32,
    message: Vec<u8>,
}

/// How a batch went out.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Flushed {
    /// Pages with content.
    pub(super) pages: usize,
    /// Bytes of them on the wire.
    pub(super) bytes: usize,
    /// Time that compressing took, when it was tried.
    pub(super) compressing: Option<Duration>,
}

/// Is a batch to be compressed?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Squeeze {
    No,
    /// When it comes out smaller.
    Yes,
}

impl Packer {
    /// Batches of at most `limit` pages.
    pub(super) fn new(memory: Memory, limit: usize) -> Self {
        Self {
            memory,
            limit: limit.clamp(1, BATCH_PAGES.min(MAX_PAGES)),
            lent: false,
            buffer: None,
            placements: Vec::new(),
            pages: 0,
            stored: Vec::new(),
            zero: Vec::new(),
            same: 0,
            message: Vec::new(),
        }
    }

    /// Bytes of pages that wait.
    pub(super) fn bytes(&self) -> u64 {
        (self.pages * PAGE) as u64
    }

    /// Has to be flushed before more is added.
    pub(super) fn is_full(&self) -> bool {
        self.pages == self.limit || self.zero.len() == MAX_ZERO_RUNS || self.same == MAX_SAME
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages == 0 && self.zero.is_empty() && self.same == 0
    }

    /// Begins a batch: of lent memory, of which `room` bytes fit into a write, or of copies.
    pub(super) fn begin(&mut self, lent: Option<usize>) {
        self.lent = lent.is_some();
        if let Some(room) = lent {
            self.limit = self.limit.min(room / PAGE).max(1);
        }
    }

    /// The buffer to fill.
    pub(super) fn needs_buffer(&self) -> bool {
        !self.lent && self.buffer.is_none()
    }

    /// Gives it a buffer of the lane.
    pub(super) fn fill_into(&mut self, buffer: Buffer) {
        self.limit = self.limit.min(buffer.room() / PAGE).max(1);
        self.buffer = Some(buffer);
    }

    /// A page that was never written: zero, and not to be touched.
    pub(super) fn add_hole(&mut self, page: PageIndex) {
        runs::push(&mut self.zero, page);
    }

    /// Copies a page, unless it is zero or `sent` knows that the destination has it.
    pub(super) fn add(&mut self, page: PageIndex, sent: Option<&Sent>) {
        if self.lent {
            if self.is_zero(page) {
                runs::push(&mut self.zero, page);
            } else {
                self.pages += 1;
                runs::push(&mut self.stored, page);
            }
            return;
        }
        let Some(buffer) = &mut self.buffer else {
            return;
        };
        let Some(slot) = buffer
            .extend(PAGE)
            .and_then(|s| s.first_chunk_mut::<PAGE>())
        else {
            return;
        };
        self.memory.read_page(page, slot);
        let zero = pages::is_zero(slot);
        if sent.is_some_and(|sent| sent.same(page, slot)) {
            buffer.truncate_by(PAGE);
            self.same += 1;
        } else if zero {
            buffer.truncate_by(PAGE);
            runs::push(&mut self.zero, page);
        } else {
            self.pages += 1;
            runs::push(&mut self.stored, page);
        }
    }

    fn is_zero(&self, page: PageIndex) -> bool {
        let mut copy = [0; PAGE];
        self.memory.looks_zero(page)
            && self.memory.read_page(page, &mut copy)
            && pages::is_zero(&copy)
    }

    /// Posts what waits; the ticket is of the last operation.
    pub(super) fn flush(
        &mut self,
        lane: &mut dyn PageSender,
        round: u32,
        squeeze: Squeeze,
        deadline: Instant,
    ) -> Result<Flushed, LaneError> {
        let mut flushed = Flushed {
            pages: self.pages,
            bytes: self.pages * PAGE,
            compressing: None,
        };
        if self.lent && self.pages > 0 {
            self.place();
            posted(lane.write_lent(&self.placements, deadline))?;
        } else if self.pages > 0
            && let Some(buffer) = self.buffer.take()
        {
            if squeeze == Squeeze::Yes {
                let begun = Instant::now();
                let block = self.compress(round, buffer.filled());
                flushed.compressing = Some(begun.elapsed());
                if let Some(bytes) = block {
                    flushed.bytes = bytes;
                    lane.recycle(buffer);
                    posted(lane.send(&self.message, deadline))?;
                    self.stored.clear();
                    self.pages = 0;
                    return self.name(lane, round, deadline).map(|()| flushed);
                }
            }
            self.place();
            posted(lane.write(buffer, &self.placements, deadline))?;
        }
        self.name(lane, round, deadline).map(|()| flushed)
    }

    /// Says which pages there were.
    fn name(
        &mut self,
        lane: &mut dyn PageSender,
        round: u32,
        deadline: Instant,
    ) -> Result<(), LaneError> {
        if self.stored.is_empty() && self.zero.is_empty() && self.same == 0 {
            return Ok(());
        }
        lane::encode_pages(
            round,
            &self.stored,
            &self.zero,
            self.same,
            &mut self.message,
        );
        self.clear();
        posted(lane.send(&self.message, deadline))
    }

    /// The message with the block, when that is worth it: its bytes.
    fn compress(&mut self, round: u32, content: &[u8]) -> Option<usize> {
        lane::encode_compressed(round, &self.stored, &mut self.message);
        let head = self.message.len();
        let most = lz4_flex::block::get_maximum_output_size(content.len());
        self.message.resize(head + most, 0);
        let length = lz4_flex::block::compress_into(content, &mut self.message[head..]).ok()?;
        self.message.truncate(head + length);
        (length < content.len() / 10 * 9 && length <= MAX_BLOCK).then_some(length)
    }

    /// One placement for each run; more where a run crosses into another region of RAM: each
    /// region is a window of its own, and a placement lies within one window.
    fn place(&mut self) {
        self.placements.clear();
        for run in &self.stored {
            let mut target = run.first.0 * PAGE_SIZE;
            let end = target + u64::from(run.count) * PAGE_SIZE;
            while target < end {
                let ends = self
                    .memory
                    .regions()
                    .map(|region| region.offset + region.size);
                let border = ends.filter(|&border| border > target).min();
                let stretch = border.unwrap_or(end).min(end) - target;
                self.placements.push(Placement {
                    target,
                    length: stretch as u32,
                });
                target += stretch;
            }
        }
    }

    /// Forgets what waits. Those pages are not sent, and `sent` must not believe so.
    pub(super) fn discard(&mut self, lane: &mut dyn PageSender, sent: Option<&Sent>) {
        if let Some(buffer) = self.buffer.take() {
            lane.recycle(buffer);
        }
        if let Some(sent) = sent {
            let named = self.stored.iter().chain(&self.zero);
            named
                .flat_map(Run::pages)
                .for_each(|page| sent.forget(page));
        }
        self.clear();
    }

    fn clear(&mut self) {
        self.pages = 0;
        self.stored.clear();
        self.zero.clear();
        self.same = 0;
    }

    /// What waits, as counts.
    pub(super) fn counts(&self) -> Counts {
        Counts {
            pages: self.pages as u64,
            zero_pages: lane::pages_in(&self.zero),
            same_pages: u64::from(self.same),
        }
    }
}

/// An operation whose deadline struck is posted all the same: the next one goes on with it.
pub(super) fn posted(result: Result<Ticket, LaneError>) -> Result<(), LaneError> {
    match result {
        Ok(_) | Err(LaneError::TimedOut { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use dunlin_lane::memory::MemoryLane;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn batches_of_zeros_use_up_no_buffers() {
        let (mut lane, _other) = dunlin_lane::memory::pair(MemoryLane::default());
        let mut packer = Packer::new(Memory::new(1 << 20).unwrap(), BATCH_PAGES);
        for round in 0..2 * lane.traits().buffers as u32 {
            if packer.needs_buffer() {
                packer.fill_into(lane.buffer(soon()).unwrap());
            }
            packer.add(PageIndex(3), None);
            assert_eq!(packer.counts().zero_pages, 1);
            packer.flush(&mut lane, round, Squeeze::No, soon()).unwrap();
        }
    }

    #[test]
    fn lent_pages_of_zeros_are_told_and_not_sent() {
        let memory = Memory::new(1 << 20).unwrap();
        let mut page = [0; PAGE];
        // Where the first look does not look.
        page[9] = 1;
        memory.write_page(PageIndex(5), &page);
        let mut packer = Packer::new(memory, BATCH_PAGES);
        packer.begin(Some(1 << 20));
        assert!(!packer.needs_buffer());
        (4..7).for_each(|page| packer.add(PageIndex(page), None));
        let counts = packer.counts();
        assert_eq!((counts.pages, counts.zero_pages), (1, 2));
        assert_eq!(
            packer.stored,
            [Run {
                first: PageIndex(5),
                count: 1
            }]
        );
    }

    #[test]
    fn no_placement_crosses_into_another_region() {
        let memory = Memory::new((3 << 30) + (1 << 20)).unwrap();
        let border = memory.regions().next().unwrap().size;
        assert!(border < memory.size(), "there is one region only");
        let mut packer = Packer::new(memory, BATCH_PAGES);
        for page in border / PAGE_SIZE - 2..border / PAGE_SIZE + 3 {
            runs::push(&mut packer.stored, PageIndex(page));
        }
        runs::push(&mut packer.stored, PageIndex(7));
        packer.place();
        let placed = packer.placements.iter().map(|p| (p.target, p.length));
        assert_eq!(
            placed.collect::<Vec<_>>(),
            [
                (border - 2 * PAGE_SIZE, 2 * PAGE as u32),
                (border, 3 * PAGE as u32),
                (7 * PAGE_SIZE, PAGE as u32),
            ]
        );
    }
}
