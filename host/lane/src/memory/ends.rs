//! The two ends.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::channel::{Channel, Found};
use crate::page::{
    Buffer, LaneError, LaneEvent, LaneTraits, PageReceiver, PageSender, Placement, Ticket, Window,
    WindowRange,
};

const PEER: &str = "the other end in memory";
/// What a buffer is full of when it comes back.
const STALE: u8 = 0xdb;

#[derive(Debug)]
struct Shared {
    channel: Mutex<Channel>,
    moved: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Channel> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` says what it was waited for.
    fn wait<T>(
        &self,
        deadline: Instant,
        mut done: impl FnMut(&mut Channel) -> Option<T>,
    ) -> Result<T, LaneError> {
        let mut channel = self.lock();
        loop {
            let before = channel.progress();
            let found = done(&mut channel);
            if channel.progress() != before {
                self.moved.notify_all();
            }
            if let Some(value) = found {
                return Ok(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timed_out());
            }
            let waited = self.moved.wait_timeout(channel, left);
            channel = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

pub(super) fn pair(traits: LaneTraits, channel: Channel) -> (MemorySender, MemoryReceiver) {
    let shared = Arc::new(Shared {
        channel: Mutex::new(channel),
        moved: Condvar::new(),
    });
    let sender = MemorySender {
        shared: Arc::clone(&shared),
        traits,
        free: VecDeque::new(),
        made: 0,
        posted: VecDeque::new(),
        bytes: 0,
    };
    (sender, MemoryReceiver { shared, traits })
}

/// The end that writes.
#[derive(Debug)]
pub struct MemorySender {
    shared: Arc<Shared>,
    traits: LaneTraits,
    free: VecDeque<Buffer>,
    made: usize,
    /// Buffers that have not come back, with the numbers of their operations.
    posted: VecDeque<(u64, Buffer)>,
    bytes: u64,
}

impl MemorySender {
    /// Takes back the buffers of operations that are complete.
    fn take_back(&mut self) {
        let channel = self.shared.lock();
        while let Some((number, _)) = self.posted.front()
            && channel.is_complete(*number)
            && let Some((_, mut buffer)) = self.posted.pop_front()
        {
            buffer.clear();
            if let Some(all) = buffer.extend(buffer.room()) {
                all.fill(STALE);
            }
            buffer.clear();
            self.free.push_back(buffer);
        }
    }

    /// Posts an operation, and waits for as long as too many are on their way.
    fn post(
        &mut self,
        bytes: usize,
        deadline: Instant,
        post: impl FnOnce(&mut Channel),
    ) -> Result<Ticket, LaneError> {
        self.bytes += bytes as u64;
        let number = {
            let mut channel = self.shared.lock();
            let number = channel.posted();
            post(&mut channel);
            number
        };
        self.shared.moved.notify_all();
        self.wait_for(number, deadline)?;
        Ok(Ticket(number))
    }

    fn wait_for(&self, number: u64, deadline: Instant) -> Result<(), LaneError> {
        self.shared.wait(deadline, |channel| {
            if channel.is_over() {
                return Some(Err(closed()));
            }
            channel.is_complete(number).then_some(Ok(()))
        })?
    }

    /// Could this write be posted?
    fn check(&self, from: &Buffer, to: &[Placement]) -> Result<(), LaneError> {
        let filled = from.filled().len();
        let places = to.iter().map(|to| u64::from(to.length)).sum::<u64>() as usize;
        let limit = filled.min(self.traits.buffer_bytes);
        if places != limit || to.len() > self.traits.placements {
            return Err(too_large(places.max(filled), limit));
        }
        let channel = self.shared.lock();
        let outside = |to: &&Placement| match self.traits.registers {
            true => channel.windows.resolve(**to).is_none(),
            false => to.target.checked_add(to.length.into()).is_none(),
        };
        match to.iter().find(outside) {
            Some(outside) => Err(LaneError::NotGranted {
                peer: PEER.to_owned(),
                start: outside.target,
                end: outside.target.saturating_add(outside.length.into()),
            }),
            None => Ok(()),
        }
    }
}

impl PageSender for MemorySender {
    fn traits(&self) -> LaneTraits {
        self.traits
    }

    fn peer(&self) -> &str {
        PEER
    }

    fn announce(&mut self, range: WindowRange, deadline: Instant) -> Result<(), LaneError> {
        if self.traits.registers {
            self.post(0, deadline, |channel| channel.post_announcement(range))?;
        }
        Ok(())
    }

    fn await_grant(&mut self, range: WindowRange, deadline: Instant) -> Result<(), LaneError> {
        if !self.traits.registers {
            return Ok(());
        }
        self.shared.wait(deadline, |channel| {
            if channel.is_over() {
                return Some(Err(closed()));
            }
            channel.windows.cover(&range).then_some(Ok(()))
        })?
    }

    fn buffer(&mut self, deadline: Instant) -> Result<Buffer, LaneError> {
        if self.made < self.traits.buffers {
            self.made += 1;
            let bytes = vec![STALE; self.traits.buffer_bytes];
            return Ok(Buffer::new(self.made - 1, bytes.into_boxed_slice()));
        }
        if self.free.is_empty()
            && let Some(&(number, _)) = self.posted.front()
        {
            self.wait_for(number, deadline)?;
            self.take_back();
        }
        self.free.pop_front().ok_or_else(timed_out)
    }

    fn recycle(&mut self, mut buffer: Buffer) {
        buffer.clear();
        self.free.push_back(buffer);
    }

    fn write(
        &mut self,
        from: Buffer,
        to: &[Placement],
        deadline: Instant,
    ) -> Result<Ticket, LaneError> {
        if let Err(error) = self.check(&from, to) {
            self.recycle(from);
            return Err(error);
        }
        let number = self.shared.lock().posted();
        let bytes = from.filled().to_vec();
        self.posted.push_back((number, from));
        self.post(bytes.len(), deadline, |channel| {
            channel.post_write(&bytes, to);
        })
    }

    fn send(&mut self, message: &[u8], deadline: Instant) -> Result<Ticket, LaneError> {
        if message.len() > self.traits.message_bytes {
            return Err(too_large(message.len(), self.traits.message_bytes));
        }
        self.post(message.len(), deadline, |channel| {
            channel.post_message(message);
        })
    }

    fn complete(&mut self, ticket: Ticket, deadline: Instant) -> Result<(), LaneError> {
        let last = self.shared.lock().posted().checked_sub(1);
        if let Some(last) = last {
            self.wait_for(ticket.0.min(last), deadline)?;
        }
        self.take_back();
        Ok(())
    }

    fn bytes_sent(&self) -> u64 {
        self.bytes
    }

    fn close(&mut self) {
        self.shared.lock().sender_gone = true;
        self.shared.moved.notify_all();
    }
}

impl Drop for MemorySender {
    fn drop(&mut self) {
        self.close();
    }
}

/// The end that is written to.
#[derive(Debug)]
pub struct MemoryReceiver {
    shared: Arc<Shared>,
    traits: LaneTraits,
}

impl PageReceiver for MemoryReceiver {
    fn traits(&self) -> LaneTraits {
        self.traits
    }

    fn peer(&self) -> &str {
        PEER
    }

    fn grant(&mut self, window: Window, _deadline: Instant) -> Result<(), LaneError> {
        self.shared.lock().windows.grant(window);
        self.shared.moved.notify_all();
        Ok(())
    }

    fn revoke(&mut self, range: WindowRange) -> Result<(), LaneError> {
        self.shared.lock().windows.revoke(&range);
        Ok(())
    }

    fn receive(
        &mut self,
        message: &mut Vec<u8>,
        deadline: Instant,
    ) -> Result<LaneEvent, LaneError> {
        let found = self.shared.wait(deadline, |channel| match channel.find() {
            Found::Nothing => None,
            found => Some(found),
        })?;
        match found {
            Found::Message(content) => {
                *message = content;
                Ok(LaneEvent::Message)
            }
            Found::Announcement(range) => Ok(LaneEvent::Announced(range)),
            Found::Broken(reason) => Err(LaneError::Corrupted {
                peer: PEER.to_owned(),
                reason,
            }),
            Found::End => Err(closed()),
            Found::Nothing => Err(timed_out()),
        }
    }

    fn close(&mut self) {
        self.shared.lock().receiver_gone = true;
        self.shared.moved.notify_all();
    }
}

impl Drop for MemoryReceiver {
    fn drop(&mut self) {
        self.close();
    }
}

fn timed_out() -> LaneError {
    LaneError::TimedOut {
        peer: PEER.to_owned(),
    }
}

fn closed() -> LaneError {
    LaneError::Closed {
        peer: PEER.to_owned(),
    }
}

fn too_large(bytes: usize, limit: usize) -> LaneError {
    LaneError::TooLarge {
        peer: PEER.to_owned(),
        bytes,
        limit,
    }
}
