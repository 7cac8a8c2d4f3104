//! What holds for every page lane.

use std::thread;
use std::time::Instant;

use dunlin_lane::{LaneError, LaneEvent, Ticket};

use super::support::{Factory, Pair, Region, SMALL, at, receive, soon, write};

const KIB: u64 = 1024;

/// A lane with one window over all of a new region, each of `length` bytes.
fn open(factory: Factory, seed: u64, length: u64) -> (Pair, Region) {
    let mut pair = factory(SMALL, seed);
    let region = Region::new(length as usize);
    pair.grant(&region, 0..length);
    (pair, region)
}

pub(crate) fn writes_are_visible_behind_a_message(factory: Factory) {
    for seed in 0..20 {
        let (pair, region) = open(factory, seed, 256 * KIB);
        let Pair {
            mut sender,
            mut receiver,
        } = pair;
        let writer = thread::spawn(move || {
            for round in 1..=8_u8 {
                let target = u64::from(round - 1) * 32 * KIB;
                let mut buffer = sender.buffer(soon()).unwrap();
                buffer.extend(20_000).unwrap().fill(round);
                buffer.extend(1_000).unwrap().fill(round + 100);
                let places = [at(target, 20_000), at(target + 30_000, 1_000)];
                sender.write(buffer, &places, soon()).unwrap();
                write(&mut *sender, target + 20_000, 10_000, round + 200).unwrap();
                sender.send(&[round], soon()).unwrap();
            }
            sender.complete(Ticket::ALL, soon()).unwrap();
            sender
        });
        for round in 1..=8_u8 {
            assert_eq!(receive(&mut *receiver), [round]);
            let target = u64::from(round - 1) * 32 * KIB;
            assert!(region.is(target..target + 20_000, round));
            assert!(region.is(target + 20_000..target + 30_000, round + 200));
            assert!(region.is(target + 30_000..target + 31_000, round + 100));
        }
        writer.join().unwrap();
    }
}

/// What is written with a message in between lands in the order of posting.
pub(crate) fn a_later_write_over_an_earlier_one_wins(factory: Factory) {
    for seed in 0..20 {
        let (mut pair, region) = open(factory, seed, 64 * KIB);
        for byte in 1..=4 {
            write(&mut *pair.sender, 0, 10_000, byte).unwrap();
            pair.sender.send(&[byte], soon()).unwrap();
        }
        for byte in 1..=4 {
            assert_eq!(pair.message(), [byte]);
        }
        assert!(region.is(0..10_000, 4));
    }
}

/// Memory that was lent is written without a copy by the caller, and nothing else is.
pub(crate) fn only_lent_memory_is_read(factory: Factory) {
    let (mut pair, region) = open(factory, 1, 256 * KIB);
    let source = Region::new(256 << 10);
    for page in 0..64 {
        source.fill(page * 4 * KIB..(page + 1) * 4 * KIB, page as u8 + 1);
    }
    let window = source.window(0..128 * KIB);
    if !pair.sender.lend(window, soon()).unwrap() {
        let refused = pair.sender.write_lent(&[at(0, 4096)], soon());
        assert!(
            matches!(refused, Err(LaneError::NotGranted { .. })),
            "{refused:?}"
        );
        return;
    }
    let places = [at(0, 3), at(64 * KIB, 40_000), at(8 * KIB, 20_000)];
    pair.sender.write_lent(&places, soon()).unwrap();
    pair.sender.send(b"written", soon()).unwrap();
    assert_eq!(pair.message(), b"written");
    for place in places {
        let range = place.target..place.target + u64::from(place.length);
        assert_eq!(region.get(range.clone()), source.get(range.clone()));
        let behind = range.end..range.end + 1;
        assert!(
            region.is(behind, 0),
            "something was written behind {range:?}"
        );
    }
    for outside in [at(128 * KIB - 1, 2), at(200 * KIB, 1), at(u64::MAX, 2)] {
        let refused = pair.sender.write_lent(&[at(0, 1), outside], soon());
        assert!(
            matches!(refused, Err(LaneError::NotGranted { .. })),
            "{refused:?}"
        );
    }
    let refused = pair.sender.write_lent(&[at(0, 65_537)], soon());
    assert!(
        matches!(refused, Err(LaneError::TooLarge { .. })),
        "{refused:?}"
    );
    pair.sender.send(b"still there", soon()).unwrap();
    assert_eq!(pair.message(), b"still there");
}

pub(crate) fn nothing_is_written_outside_of_windows(factory: Factory) {
    let outside = [
        (0, 1),
        (4 * KIB - 1, 2),
        (8 * KIB - 1, 2),
        (8 * KIB, 1),
        (7 * KIB, 6_000),
        (16 * KIB, 1),
        (u64::MAX - 1, 1),
        (u64::MAX, 2),
    ];
    for (seed, (target, length)) in outside.into_iter().enumerate() {
        let mut pair = factory(SMALL, seed as u64);
        let region = Region::new(16 << 10);
        pair.grant(&region, 4 * KIB..8 * KIB);
        pair.grant(&region, 12 * KIB..13 * KIB);
        let registers = pair.sender.traits().registers;
        match write(&mut *pair.sender, target, length, 9) {
            Err(LaneError::NotGranted { .. }) => {
                // Nothing was posted, and the lane goes on.
                write(&mut *pair.sender, 4 * KIB, 10, 1).unwrap();
                pair.sender.send(b"on", soon()).unwrap();
                assert_eq!(pair.message(), b"on");
                assert!(region.is(4 * KIB..4 * KIB + 10, 1));
            }
            Ok(_) if !registers => {
                pair.sender.send(b"never", soon()).unwrap();
                let result = pair.receiver.receive(&mut Vec::new(), soon());
                assert!(
                    matches!(result, Err(LaneError::Corrupted { .. })),
                    "{result:?}"
                );
                let again = pair.receiver.receive(&mut Vec::new(), soon());
                assert!(
                    matches!(again, Err(LaneError::Corrupted { .. })),
                    "{again:?}"
                );
            }
            other => panic!("a write of {length} bytes to {target:#x}: {other:?}"),
        }
        assert!(region.is(0..4 * KIB, 0));
        assert!(region.is(8 * KIB..12 * KIB, 0));
        assert!(region.is(13 * KIB..16 * KIB, 0));
    }
}

pub(crate) fn buffers_are_owned_by_the_lane_until_they_come_back(factory: Factory) {
    let (pair, region) = open(factory, 1, 64 * KIB);
    let Pair {
        mut sender,
        mut receiver,
    } = pair;
    let held: Vec<_> = (0..SMALL.buffers)
        .map(|_| sender.buffer(soon()).unwrap())
        .collect();
    let mut slots: Vec<_> = held.iter().map(|buffer| buffer.slot()).collect();
    slots.sort_unstable();
    assert_eq!(slots, [0, 1, 2]);
    let none = sender.buffer(Instant::now());
    assert!(matches!(none, Err(LaneError::TimedOut { .. })), "{none:?}");
    for buffer in held {
        assert_eq!(buffer.room(), SMALL.buffer_bytes);
        sender.recycle(buffer);
    }
    let writer = thread::spawn(move || {
        for round in 0..50_u8 {
            let mut buffer = sender.buffer(soon()).unwrap();
            assert!(buffer.slot() < SMALL.buffers && buffer.filled().is_empty());
            // Whatever is done to a buffer that came back, no earlier write shows it.
            buffer.extend(1_000).unwrap().fill(round);
            let places = [at(u64::from(round) * 1_000, 1_000)];
            sender.write(buffer, &places, soon()).unwrap();
        }
        sender.send(b"end", soon()).unwrap();
        sender.complete(Ticket::ALL, soon()).unwrap();
        sender
    });
    assert_eq!(receive(&mut *receiver), b"end");
    for round in 0..50_u8 {
        let target = u64::from(round) * 1_000;
        assert!(region.is(target..target + 1_000, round), "write {round}");
    }
    writer.join().unwrap();
}

/// Both ends only ever try, with deadlines that have passed: whatever they were in the middle of
/// goes on with the next call.
pub(crate) fn timeouts_leave_the_lane_whole(factory: Factory) {
    let length = 200 * 60_000;
    let (mut pair, region) = open(factory, 7, length);
    let mut posted = 0;
    let (mut send_timeouts, mut receive_timeouts) = (0, 0);
    let mut message = Vec::new();
    let mut received = 0;
    while received < 200_u8 {
        while posted < 200_u8 {
            let Ok(mut buffer) = pair.sender.buffer(Instant::now()) else {
                send_timeouts += 1;
                break;
            };
            buffer.extend(60_000).unwrap().fill(posted + 1);
            let places = [at(u64::from(posted) * 60_000, 60_000)];
            let written = pair.sender.write(buffer, &places, Instant::now());
            let sent = pair.sender.send(&[posted; 9_999], Instant::now());
            for result in [written, sent] {
                match result {
                    Ok(_) => {}
                    Err(LaneError::TimedOut { .. }) => send_timeouts += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            posted += 1;
        }
        match pair.receiver.receive(&mut message, Instant::now()) {
            Ok(event) => {
                assert_eq!(event, LaneEvent::Message);
                assert!(message == [received; 9_999], "message {received}");
                let target = u64::from(received) * 60_000;
                assert!(region.is(target..target + 60_000, received + 1));
                received += 1;
            }
            Err(LaneError::TimedOut { .. }) => {
                receive_timeouts += 1;
                match pair.sender.complete(Ticket::ALL, Instant::now()) {
                    Ok(()) => {}
                    Err(LaneError::TimedOut { .. }) => send_timeouts += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(send_timeouts > 0, "the sender was never held up");
    let nothing = pair.receiver.receive(&mut message, Instant::now());
    assert!(matches!(nothing, Err(LaneError::TimedOut { .. })));
    // Everything is through.
    assert!(receive_timeouts < 1_000_000);
    pair.sender.complete(Ticket::ALL, soon()).unwrap();
}

pub(crate) fn what_is_revoked_is_not_written(factory: Factory) {
    let mut pair = factory(SMALL, 3);
    let region = Region::new(32 << 10);
    pair.grant(&region, 0..8 * KIB);
    pair.grant(&region, 8 * KIB..16 * KIB);
    write(&mut *pair.sender, 0, 16, 1).unwrap();
    write(&mut *pair.sender, 8 * KIB, 16, 2).unwrap();
    pair.sender.send(b"one", soon()).unwrap();
    assert_eq!(pair.message(), b"one");
    // A range that holds no whole window takes nothing back.
    pair.receiver.revoke(0..4 * KIB).unwrap();
    write(&mut *pair.sender, 0, 16, 3).unwrap();
    pair.sender.send(b"two", soon()).unwrap();
    assert_eq!(pair.message(), b"two");
    assert!(region.is(0..16, 3));
    pair.receiver.revoke(0..9 * KIB).unwrap();
    write(&mut *pair.sender, 8 * KIB, 16, 4).unwrap();
    pair.sender.send(b"three", soon()).unwrap();
    assert_eq!(pair.message(), b"three");
    assert!(region.is(8 * KIB..8 * KIB + 16, 4));
    match write(&mut *pair.sender, 0, 16, 5) {
        Err(LaneError::NotGranted { .. }) => assert!(pair.sender.traits().registers),
        Ok(_) => {
            assert!(!pair.sender.traits().registers);
            pair.sender.send(b"four", soon()).unwrap();
            let result = pair.receiver.receive(&mut Vec::new(), soon());
            assert!(matches!(result, Err(LaneError::Corrupted { .. })));
        }
        Err(error) => panic!("{error}"),
    }
    assert!(region.is(0..16, 3));
}

pub(crate) fn what_is_too_large_is_refused_and_the_lane_goes_on(factory: Factory) {
    let (mut pair, region) = open(factory, 5, 64 * KIB);
    let too_long = vec![1; SMALL.message_bytes + 1];
    let result = pair.sender.send(&too_long, soon());
    assert!(
        matches!(result, Err(LaneError::TooLarge { .. })),
        "{result:?}"
    );
    for places in [
        &[at(0, 99)][..],
        &[at(0, 101)],
        &[at(0, u32::MAX), at(0, u32::MAX)],
        &[at(0, 50), at(100, 51)],
        &[at(0, 5); 20],
        &[],
    ] {
        let mut buffer = pair.sender.buffer(soon()).unwrap();
        assert!(buffer.extend(SMALL.buffer_bytes + 1).is_none());
        buffer.extend(100).unwrap().fill(1);
        let result = pair.sender.write(buffer, places, soon());
        assert!(
            matches!(result, Err(LaneError::TooLarge { .. })),
            "{result:?}"
        );
    }
    let longest = vec![2; SMALL.message_bytes];
    let sender = &mut pair.sender;
    write(&mut **sender, 0, SMALL.buffer_bytes as u32, 3).unwrap();
    let receiver = &mut pair.receiver;
    thread::scope(|scope| {
        scope.spawn(|| sender.send(&longest, soon()).unwrap());
        assert!(receive(&mut **receiver) == longest);
    });
    assert!(region.is(0..64 * KIB, 3));
}

pub(crate) fn the_end_comes_after_what_is_complete(factory: Factory) {
    let (mut pair, _region) = open(factory, 6, 4 * KIB);
    write(&mut *pair.sender, 0, 100, 1).unwrap();
    let ticket = pair.sender.send(b"last", soon()).unwrap();
    pair.sender.complete(ticket, soon()).unwrap();
    pair.sender.close();
    assert_eq!(pair.message(), b"last");
    for _ in 0..2 {
        let result = pair.receiver.receive(&mut Vec::new(), soon());
        assert!(
            matches!(result, Err(LaneError::Closed { .. })),
            "{result:?}"
        );
    }
}

pub(crate) fn a_sender_learns_that_its_peer_is_gone(factory: Factory) {
    let (pair, _region) = open(factory, 8, 64 * KIB);
    let Pair {
        mut sender,
        receiver,
    } = pair;
    drop(receiver);
    for _ in 0..1_000 {
        match write(&mut *sender, 0, 60_000, 1) {
            Ok(_) => {}
            Err(LaneError::Closed { .. }) => return,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the peer is gone, and nobody noticed");
}

pub(crate) fn messages_come_in_order_and_whole(factory: Factory) {
    let (pair, _region) = open(factory, 9, 4 * KIB);
    let Pair {
        mut sender,
        mut receiver,
    } = pair;
    let content = |number: usize| {
        let length = number * 7919 % (SMALL.message_bytes + 1);
        vec![number as u8; if number.is_multiple_of(5) { 0 } else { length }]
    };
    let writer = thread::spawn(move || {
        let mut last = None;
        for number in 0..500 {
            let ticket = sender.send(&content(number), soon()).unwrap();
            assert!(last.is_none_or(|last| last < ticket));
            last = Some(ticket);
        }
        sender.complete(Ticket::ALL, soon()).unwrap();
        assert!(sender.bytes_sent() >= (0..500).map(|n| content(n).len() as u64).sum());
        sender
    });
    for number in 0..500 {
        assert!(receive(&mut *receiver) == content(number), "{number}");
    }
    writer.join().unwrap();
}

pub(crate) fn grants_are_waited_for_where_memory_is_registered(factory: Factory) {
    let mut pair = factory(SMALL, 11);
    let region = Region::new(8 << 10);
    pair.sender.announce(0..8 * KIB, soon()).unwrap();
    if !pair.sender.traits().registers {
        pair.sender.await_grant(0..8 * KIB, soon()).unwrap();
        return;
    }
    let early = pair.sender.await_grant(0..8 * KIB, Instant::now());
    assert!(matches!(early, Err(LaneError::TimedOut { .. })));
    let event = pair.receiver.receive(&mut Vec::new(), soon()).unwrap();
    assert_eq!(event, LaneEvent::Announced(0..8 * KIB));
    let half = region.window(0..4 * KIB);
    pair.receiver.grant(half, soon()).unwrap();
    pair.sender.await_grant(0..4 * KIB, soon()).unwrap();
    let early = pair.sender.await_grant(0..8 * KIB, Instant::now());
    assert!(matches!(early, Err(LaneError::TimedOut { .. })));
    let rest = region.window(4 * KIB..8 * KIB);
    pair.receiver.grant(rest, soon()).unwrap();
    pair.sender.await_grant(0..8 * KIB, soon()).unwrap();
}
