//! Damage on the way, and lanes that break or stand still.

use std::io::{IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use dunlin_lane::memory::{Fault, MemoryLane};
use dunlin_lane::stream::{StreamTraits, Transport, TransportError};
use dunlin_lane::{LaneError, Ticket};

use super::support::{
    Pair, Region, SMALL, in_memory, over, over_tls, receive, soon, unix_streams, write,
};

/// Flips one bit of what goes through.
struct Flip {
    inner: Box<dyn Transport>,
    /// Bytes until the bit's byte.
    until: usize,
    bit: u32,
    armed: Arc<AtomicBool>,
}

impl Transport for Flip {
    fn traits(&self) -> StreamTraits {
        self.inner.traits()
    }

    fn read(
        &mut self,
        into: &mut [IoSliceMut<'_>],
        deadline: Instant,
    ) -> Result<usize, TransportError> {
        let count = self.inner.read(into, deadline)?;
        if !self.armed.load(Ordering::Acquire) {
            return Ok(count);
        }
        let mut left = count;
        for slice in into {
            let here = left.min(slice.len());
            if self.until < here {
                slice[self.until] ^= 1 << self.bit;
                self.until = usize::MAX;
            } else if self.until != usize::MAX {
                self.until -= here;
            }
            left -= here;
        }
        Ok(count)
    }

    fn write(&mut self, from: &[IoSlice<'_>], deadline: Instant) -> Result<usize, TransportError> {
        self.inner.write(from, deadline)
    }

    fn shutdown(&mut self, how: Shutdown) {
        self.inner.shutdown(how);
    }

    fn peer(&self) -> &str {
        self.inner.peer()
    }
}

/// Sends a write of 500 bytes and two messages through a stream that flips bit `bit` of byte
/// `until`; says how many messages came, and how it ended.
fn through_damage(until: usize, bit: u32) -> (usize, LaneError) {
    let (out, into) = unix_streams();
    let damaged = Flip {
        inner: into,
        until,
        bit,
        armed: Arc::new(AtomicBool::new(true)),
    };
    send(over(out, Box::new(damaged), SMALL), &[b"a message", b""])
}

/// Sends a write and then `contents`; says how many of those came, and how it ended.
fn send(pair: Pair, contents: &[&[u8]]) -> (usize, LaneError) {
    let Pair {
        mut sender,
        mut receiver,
    } = pair;
    let region = Region::new(4096);
    receiver.grant(region.window(0..4096), soon()).unwrap();
    write(&mut *sender, 100, 500, 1).unwrap();
    for content in contents {
        sender.send(content, soon()).unwrap();
    }
    sender.complete(Ticket::ALL, soon()).unwrap();
    sender.close();
    let mut messages = 0;
    loop {
        match receiver.receive(&mut Vec::new(), soon()) {
            Ok(_) => messages += 1,
            Err(error) => return (messages, error),
        }
    }
}

#[test]
fn without_damage_all_messages_come() {
    let (messages, end) = through_damage(usize::MAX, 0);
    assert_eq!(messages, 2);
    assert!(matches!(end, LaneError::Closed { .. }), "{end}");
}

#[test]
fn every_damaged_byte_is_noticed_before_a_later_message() {
    // A write with one place, and two messages.
    let (first, second, third) = (28 + 12 + 500, 28 + 9, 28);
    for until in 0..first + second + third {
        let (messages, end) = through_damage(until, until as u32 % 8);
        assert!(
            matches!(end, LaneError::Corrupted { .. }),
            "byte {until}: {end}"
        );
        let whole = usize::from(until >= first) + usize::from(until >= first + second);
        assert_eq!(messages, whole.saturating_sub(1), "byte {until}");
    }
}

/// A damaged length may make a record wait for bytes that never come: then the end is the error.
#[test]
fn every_damaged_byte_of_a_record_is_noticed_before_what_it_carries_is_used() {
    // Header, type and tag are 22 bytes around what a plain lane would send.
    let message_end = (22 + 28 + 12 + 500) + (22 + 28 + 9);
    let close_end = message_end + 22 + 2;
    for until in (0..close_end).step_by(3) {
        let (out, into) = unix_streams();
        let armed = Arc::new(AtomicBool::new(false));
        let damaged = Flip {
            inner: into,
            until,
            bit: until as u32 % 8,
            armed: Arc::clone(&armed),
        };
        let pair = over_tls(out, Box::new(damaged), SMALL);
        armed.store(true, Ordering::Release);
        let (messages, end) = send(pair, &[b"a message"]);
        assert!(
            matches!(end, LaneError::Corrupted { .. } | LaneError::Closed { .. }),
            "byte {until}: {end}"
        );
        assert!(
            messages <= usize::from(until >= message_end),
            "byte {until}"
        );
    }
}

/// Disorder that never happens would test nothing.
#[test]
fn a_lane_in_memory_lands_writes_in_any_order_and_late() {
    let (mut late, mut overtaken) = (0, 0);
    for seed in 0..50 {
        let mut pair = in_memory(MemoryLane {
            sizes: SMALL,
            seed,
            ..MemoryLane::default()
        });
        let region = Region::new(64 << 10);
        pair.grant(&region, 0..64 << 10);
        for number in 0..3 {
            write(&mut *pair.sender, number * 20_000, 20_000, 1).unwrap();
        }
        let landed: Vec<_> = (0..60)
            .map(|part| region.is(part * 1_000..(part + 1) * 1_000, 1))
            .collect();
        late += usize::from(landed.contains(&false));
        overtaken += usize::from(landed.windows(2).any(|two| !two[0] && two[1]));
        pair.sender.send(b"all", soon()).unwrap();
        assert_eq!(receive(&mut *pair.receiver), b"all");
        assert!(region.is(0..60_000, 1));
    }
    assert!(late > 10, "all landed at once in {} of 50 runs", 50 - late);
    assert!(overtaken > 10, "out of order in {overtaken} of 50 runs");
}

fn faulty(fault: Fault, seed: u64) -> (Pair, Region) {
    let mut pair = in_memory(MemoryLane {
        sizes: SMALL,
        seed,
        registers: false,
        fault: Some(fault),
        ..MemoryLane::default()
    });
    let region = Region::new(64 << 10);
    pair.grant(&region, 0..64 << 10);
    (pair, region)
}

/// Posts `write, message` until something fails.
fn post_pairs(pair: &mut Pair) -> Result<(), LaneError> {
    for number in 0..4_u8 {
        write(
            &mut *pair.sender,
            u64::from(number) * 1000,
            1000,
            number + 1,
        )?;
        pair.sender.send(&[number], soon())?;
    }
    Ok(())
}

#[test]
fn a_damaged_operation_in_memory_is_noticed_where_it_is_received() {
    for damaged in 0..8 {
        let (mut pair, _region) = faulty(Fault::Corrupt(damaged), damaged);
        post_pairs(&mut pair).unwrap();
        for number in 0..damaged / 2 {
            let mut message = Vec::new();
            match pair.receiver.receive(&mut message, soon()) {
                Ok(_) => assert_eq!(message, [number as u8]),
                // Damage may show before its turn, since writes land ahead of messages.
                Err(LaneError::Corrupted { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
        let end = pair.receiver.receive(&mut Vec::new(), soon());
        assert!(matches!(end, Err(LaneError::Corrupted { .. })), "{end:?}");
    }
}

#[test]
fn a_cut_lane_in_memory_ends_for_both() {
    for cut in 0..8 {
        let (mut pair, region) = faulty(Fault::Cut(cut), cut);
        let end = post_pairs(&mut pair).unwrap_err();
        assert!(matches!(end, LaneError::Closed { .. }), "{end}");
        let mut message = Vec::new();
        let mut next = 0;
        let end = loop {
            match pair.receiver.receive(&mut message, soon()) {
                Ok(_) => {
                    assert_eq!(message, [next]);
                    let target = u64::from(next) * 1000;
                    assert!(region.is(target..target + 1000, next + 1));
                    next += 1;
                }
                Err(error) => break error,
            }
        };
        assert!(matches!(end, LaneError::Closed { .. }), "{end}");
        assert!(u64::from(next) <= cut / 2);
    }
}

#[test]
fn a_lane_in_memory_that_stands_still_times_out_at_both_ends() {
    let (mut pair, _region) = faulty(Fault::Stall(5), 1);
    post_pairs(&mut pair).unwrap();
    for number in 0..2 {
        assert_eq!(receive(&mut *pair.receiver), [number]);
    }
    let nothing = pair.receiver.receive(&mut Vec::new(), Instant::now());
    assert!(matches!(nothing, Err(LaneError::TimedOut { .. })));
    let held_up = (0..64).find_map(|_| pair.sender.send(b"", Instant::now()).err());
    assert!(matches!(held_up, Some(LaneError::TimedOut { .. })));
    let held_up = pair.sender.complete(Ticket::ALL, Instant::now());
    assert!(matches!(held_up, Err(LaneError::TimedOut { .. })));
}
