//! From the guest to the switch.

use super::{BATCH, HEADER_SIZE, MIN_FRAME, Net, RETRY_FULL, Scratch, TRANSMIT_QUEUE, count};
use crate::virtio::{Chain, Queue, Queues, RingError, Wait};
use dunlin_vswitch::{Frame, MAX_FRAME};

/// Why a batch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The ring is empty.
    Empty,
    /// The batch is as long as it may be.
    Full,
    /// The chain that follows holds no frame.
    Malformed,
}

impl Net {
    pub(super) fn transmit(&mut self, queues: &mut Queues) -> Result<Wait, RingError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.transmit_batch(queues, &mut scratch);
        self.scratch = scratch;
        result
    }

    fn transmit_batch(
        &mut self,
        queues: &mut Queues,
        scratch: &mut Scratch,
    ) -> Result<Wait, RingError> {
        if queues.should_yield() {
            return Ok(Wait::MORE);
        }
        let Some(queue) = queues.get(TRANSMIT_QUEUE) else {
            return Ok(Wait::default());
        };
        let end = gather(queue, scratch)?;
        let frames = &scratch.outgoing[..scratch.heads.len()];
        let sent = match frames {
            [] => Ok(0),
            frames => self.port.send(frames),
        };
        let taken = match sent {
            Ok(taken) => {
                let taken = taken.min(frames.len());
                count(&self.counters.sent_frames, taken);
                let bytes = frames[..taken].iter().map(|frame| frame.bytes.len()).sum();
                count(&self.counters.sent_bytes, bytes);
                taken
            }
            Err(error) => {
                self.port_failed(&error);
                count(&self.counters.sent_dropped, frames.len());
                frames.len()
            }
        };
        for head in &scratch.heads[..taken] {
            queue.push_used(*head, 0)?;
        }
        let rest = scratch.heads.len() - taken;
        if rest > 0 {
            (0..rest).for_each(|_| queue.undo_pop());
            return Ok(Wait {
                readable: false,
                retry_after: Some(RETRY_FULL),
            });
        }
        if end == End::Malformed {
            self.drop_next(queue, scratch)?;
        }
        match end {
            End::Empty => Ok(Wait::default()),
            End::Full | End::Malformed => Ok(Wait::MORE),
        }
    }

    /// Returns a chain without a frame in it to the guest.
    fn drop_next(&mut self, queue: &mut Queue, scratch: &mut Scratch) -> Result<(), RingError> {
        let chain = first(&mut scratch.chains);
        if queue.pop(chain)? {
            count(&self.counters.sent_dropped, 1);
            queue.push_used(chain.head(), 0)?;
        }
        Ok(())
    }
}

/// Copies the frames that wait in the ring, up to a batch.
fn gather(queue: &mut Queue, scratch: &mut Scratch) -> Result<End, RingError> {
    let Scratch {
        chains,
        heads,
        outgoing,
        incoming: _,
    } = scratch;
    heads.clear();
    let chain = first(chains);
    while heads.len() < BATCH {
        if !queue.pop(chain)? {
            return Ok(End::Empty);
        }
        let length = chain.readable_length();
        let frame = HEADER_SIZE as u64 + MIN_FRAME as u64..=(HEADER_SIZE + MAX_FRAME) as u64;
        if !frame.contains(&length) {
            queue.undo_pop();
            return Ok(End::Malformed);
        }
        if outgoing.len() == heads.len() {
            outgoing.push(Frame::default());
        }
        let bytes = &mut outgoing[heads.len()].bytes;
        bytes.resize(length as usize - HEADER_SIZE, 0);
        chain.read(queue.memory().mapping(), HEADER_SIZE as u64, bytes);
        heads.push(chain.head());
    }
    Ok(End::Full)
}

fn first(chains: &mut Vec<Chain>) -> &mut Chain {
    if chains.is_empty() {
        chains.push(Chain::default());
    }
    &mut chains[0]
}
