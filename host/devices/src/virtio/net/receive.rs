//! From the switch to the guest.

use dunlin_vswitch::{Frame, MAX_FRAME};

use super::{BATCH, HEADER_SIZE, MIN_FRAME, Net, RECEIVE_QUEUE, RETRY_FAILED, Scratch, count};
use crate::virtio::{Chain, Queue, Queues, RingError, Wait};

/// Most buffers for one frame.
const MAX_BUFFERS: usize = 64;

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delivery {
    Done,
    /// The guest has too few buffers now.
    NoBuffers,
    /// The guest's buffers cannot hold it.
    TooLarge,
}

impl Net {
    pub(super) fn receive(&mut self, queues: &mut Queues) -> Result<Wait, RingError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.receive_batch(queues, &mut scratch);
        self.scratch = scratch;
        result
    }

    fn receive_batch(
        &mut self,
        queues: &mut Queues,
        scratch: &mut Scratch,
    ) -> Result<Wait, RingError> {
        if queues.should_yield() {
            return Ok(Wait::MORE);
        }
        let Some(queue) = queues.get(RECEIVE_QUEUE) else {
            return Ok(Wait::default());
        };
        // No more than there are buffers for: what waits in the port can still go elsewhere.
        let buffers = usize::from(queue.available()?);
        if buffers == 0 {
            return Ok(Wait::default());
        }
        let mut wait = Wait::MORE;
        if self.received.is_empty() {
            wait = self.fetch(buffers.min(BATCH), &mut scratch.incoming);
        }
        while let Some(frame) = self.received.front() {
            match deliver(frame, self.mergeable, queue, &mut scratch.chains)? {
                Delivery::Done => {
                    count(&self.counters.received_frames, 1);
                    count(&self.counters.received_bytes, frame.bytes.len());
                }
                Delivery::TooLarge => count(&self.counters.received_dropped, 1),
                Delivery::NoBuffers => return Ok(Wait::default()),
            }
            self.received.pop_front();
        }
        Ok(wait)
    }

    /// Gets frames from the port.
    fn fetch(&mut self, limit: usize, incoming: &mut Vec<Frame>) -> Wait {
        incoming.clear();
        match self.port.receive(incoming, limit) {
            Ok(_) if incoming.is_empty() => Wait {
                readable: true,
                retry_after: None,
            },
            Ok(_) => {
                for frame in incoming.drain(..) {
                    if (MIN_FRAME..=MAX_FRAME).contains(&frame.bytes.len()) {
                        self.received.push_back(frame);
                    } else {
                        count(&self.counters.received_dropped, 1);
                    }
                }
                Wait::MORE
            }
            Err(error) => {
                self.port_failed(&error);
                Wait {
                    readable: false,
                    retry_after: Some(RETRY_FAILED),
                }
            }
        }
    }
}

/// Writes a frame, with its header, to as many buffers as it takes (5.1.6.3.2, 5.1.6.4).
fn deliver(
    frame: &Frame,
    mergeable: bool,
    queue: &mut Queue,
    chains: &mut Vec<Chain>,
) -> Result<Delivery, RingError> {
    let total = HEADER_SIZE + frame.bytes.len();
    let mut used = 0;
    let mut room = 0;
    while room < total as u64 {
        if used == MAX_BUFFERS || (used == 1 && !mergeable) {
            (0..used).for_each(|_| queue.undo_pop());
            return Ok(Delivery::TooLarge);
        }
        if chains.len() == used {
            chains.push(Chain::default());
        }
        if !queue.pop(&mut chains[used])? {
            (0..used).for_each(|_| queue.undo_pop());
            return Ok(Delivery::NoBuffers);
        }
        room += chains[used].writable_length();
        used += 1;
    }
    let mut message = [0; HEADER_SIZE + MAX_FRAME];
    message[10..HEADER_SIZE].copy_from_slice(&(used as u16).to_le_bytes());
    message[HEADER_SIZE..total].copy_from_slice(&frame.bytes);
    let mut done = 0;
    for chain in &chains[..used] {
        let written = chain.write(queue.memory().mapping(), 0, &message[done..total]);
        queue.push_used(chain.head(), written as u32)?;
        done += written;
    }
    Ok(Delivery::Done)
}
