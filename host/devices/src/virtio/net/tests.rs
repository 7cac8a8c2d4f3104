//! Tests of the card between a driver and a port of their own.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use dunlin_vswitch::{Frame, MAX_FRAME, MacAddress, Port, PortError};
use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::component::Component;
use crate::lock;
use crate::virtio::testing::{Driver, PATIENCE, Part, QUEUE_SIZE};

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const RX: usize = RECEIVE_QUEUE;
const TX: usize = TRANSMIT_QUEUE;

/// What a port tells the test.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Sent(Vec<u8>),
    Announced(MacAddress),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Takes(usize),
    Fails,
}

/// The switch's side of a port; outlives the ports that a card has before and after a move.
#[derive(Debug)]
struct Switch {
    waiting: Mutex<VecDeque<Vec<u8>>>,
    ready: EventFd,
    mood: Mutex<Mood>,
    events: Mutex<Sender<Event>>,
}

#[derive(Debug)]
struct TestPort(Arc<Switch>);

impl Switch {
    fn new() -> (Arc<Self>, Receiver<Event>) {
        let (sender, events) = channel();
        let switch = Arc::new(Self {
            waiting: Mutex::default(),
            ready: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            mood: Mutex::new(Mood::Takes(usize::MAX)),
            events: Mutex::new(sender),
        });
        (switch, events)
    }

    fn card(self: &Arc<Self>) -> Box<Net> {
        Box::new(Net::new(Box::new(TestPort(Arc::clone(self))), MAC))
    }

    fn push(&self, bytes: &[u8]) {
        lock(&self.waiting).push_back(bytes.to_vec());
        self.ready.write(1).unwrap();
    }

    fn set_mood(&self, mood: Mood) {
        *lock(&self.mood) = mood;
        self.ready.write(1).unwrap();
    }

    fn error(&self) -> PortError {
        PortError::Io {
            action: "send to",
            port: "test".into(),
            source: io::Error::other("gone"),
        }
    }
}

impl Port for TestPort {
    fn send(&mut self, frames: &[Frame]) -> Result<usize, PortError> {
        let Mood::Takes(limit) = *lock(&self.0.mood) else {
            return Err(self.0.error());
        };
        let count = frames.len().min(limit);
        for frame in &frames[..count] {
            let _ = lock(&self.0.events).send(Event::Sent(frame.bytes.clone()));
        }
        Ok(count)
    }

    fn receive(&mut self, into: &mut Vec<Frame>, limit: usize) -> Result<usize, PortError> {
        if *lock(&self.0.mood) == Mood::Fails {
            return Err(self.0.error());
        }
        let mut waiting = lock(&self.0.waiting);
        let count = waiting.len().min(limit);
        into.extend(waiting.drain(..count).map(|bytes| Frame { bytes }));
        if waiting.is_empty() {
            let _ = self.0.ready.read();
        }
        Ok(count)
    }

    fn readiness(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as the switch that `self` holds.
        #[expect(unsafe_code, reason = "the event type lends no descriptor")]
        unsafe {
            BorrowedFd::borrow_raw(self.0.ready.as_raw_fd())
        }
    }

    fn announce(&mut self, mac: MacAddress) -> Result<(), PortError> {
        let _ = lock(&self.0.events).send(Event::Announced(mac));
        Ok(())
    }
}

fn frame(number: u32, length: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8; length];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn packet(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_SIZE], frame].concat()
}

fn next_sent(events: &Receiver<Event>) -> Vec<u8> {
    loop {
        match events.recv_timeout(PATIENCE) {
            Ok(Event::Sent(bytes)) => return bytes,
            Ok(Event::Announced(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

fn count_of(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn the_configuration_names_address_link_and_mtu() {
    let (switch, _events) = Switch::new();
    let driver = Driver::start(switch.card());
    let mac = driver.read_bar(0x2000, 4) | driver.read_bar(0x2004, 2) << 32;
    assert_eq!(mac.to_le_bytes()[..6], MAC.0);
    assert_eq!(driver.read_bar(0x2006, 2), 1);
    assert_eq!(driver.read_bar(0x200a, 2), 1500);
    let generation = driver.read(0x15, 1);
    let (offset, down) = Net::link_change(Link::Down);
    driver.device.change_config(offset, &down);
    driver.wait_config_interrupt();
    assert_eq!(driver.read_bar(0x2006, 2), 0);
    assert_ne!(driver.read(0x15, 1), generation);
}

#[test]
fn a_frame_of_the_guest_reaches_the_port() {
    let (switch, events) = Switch::new();
    let card = switch.card();
    let counters = card.counters();
    let mut driver = Driver::start(card);
    let packet = packet(&frame(7, 100));
    // Header and frame cut at an odd place.
    let parts = [driver.buffer(&packet[..5]), driver.buffer(&packet[5..])];
    driver.send(TX, &parts);
    assert_eq!(next_sent(&events), frame(7, 100));
    assert_eq!(driver.wait_used(TX, 1)[0].1, 0);
    assert_eq!(count_of(&counters.sent_bytes), 100);
}

#[test]
fn a_frame_of_the_switch_reaches_the_guest() {
    let (switch, _events) = Switch::new();
    let mut driver = Driver::start(switch.card());
    let room = driver.room(HEADER_SIZE + MAX_FRAME);
    driver.send(RX, &[room]);
    switch.push(&frame(1, MAX_FRAME));
    let used = driver.wait_used(RX, 1);
    assert_eq!(used[0].1 as usize, HEADER_SIZE + MAX_FRAME);
    let bytes = driver.bytes(room);
    assert_eq!(bytes[..HEADER_SIZE], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(bytes[HEADER_SIZE..], frame(1, MAX_FRAME));
}

#[test]
fn a_frame_is_spread_over_buffers_that_merge() {
    let (switch, _events) = Switch::new();
    let mut driver = Driver::start(switch.card());
    let rooms: Vec<Part> = (0..3).map(|_| driver.room(40)).collect();
    driver.send(RX, &rooms[..1]);
    switch.push(&frame(5, 100));
    // One buffer is too few: the frame waits for more.
    driver.send(RX, &rooms[1..2]);
    driver.send(RX, &rooms[2..3]);
    let used = driver.wait_used(RX, 3);
    let lengths: Vec<u32> = used.iter().map(|used| used.1).collect();
    assert_eq!(lengths, [40, 40, 32]);
    let bytes: Vec<u8> = rooms.iter().flat_map(|room| driver.bytes(*room)).collect();
    assert_eq!(bytes[10], 3);
    assert_eq!(bytes[HEADER_SIZE..HEADER_SIZE + 100], frame(5, 100));
}

#[test]
fn without_merging_a_frame_that_is_too_large_is_dropped() {
    let (switch, _events) = Switch::new();
    let card = switch.card();
    let counters = card.counters();
    let mut driver = Driver::start_with(card, !feature::MERGEABLE_BUFFERS);
    let room = driver.room(64);
    driver.send(RX, &[room]);
    switch.push(&frame(1, 100));
    switch.push(&frame(2, 50));
    driver.wait_used(RX, 1);
    assert_eq!(driver.bytes(room)[HEADER_SIZE..][..50], frame(2, 50));
    assert_eq!(count_of(&counters.received_dropped), 1);
}

#[test]
fn frames_of_impossible_length_are_dropped_in_both_directions() {
    let (switch, events) = Switch::new();
    let card = switch.card();
    let counters = card.counters();
    let mut driver = Driver::start(card);
    for length in [MAX_FRAME + 1, 9000, MIN_FRAME - 1, 4] {
        let buffer = driver.buffer(&packet(&frame(0, length)));
        driver.send(TX, &[buffer]);
    }
    let short = driver.buffer(&[0; 3]);
    driver.send(TX, &[short]);
    let nothing = driver.room(64);
    driver.send(TX, &[nothing]);
    let good = driver.buffer(&packet(&frame(9, 60)));
    driver.send(TX, &[good]);
    assert_eq!(next_sent(&events), frame(9, 60));
    assert_eq!(driver.wait_used(TX, 7).len(), 7);
    assert_eq!(count_of(&counters.sent_dropped), 6);
    let room = driver.room(2048);
    driver.send(RX, &[room]);
    switch.push(&frame(0, MAX_FRAME + 1));
    switch.push(&frame(0, 13));
    switch.push(&frame(3, 60));
    driver.wait_used(RX, 1);
    assert_eq!(driver.bytes(room)[HEADER_SIZE..][..60], frame(3, 60));
    assert_eq!(count_of(&counters.received_dropped), 2);
}

#[test]
fn a_full_port_delays_frames_and_loses_none() {
    let (switch, events) = Switch::new();
    switch.set_mood(Mood::Takes(0));
    let mut driver = Driver::start(switch.card());
    for number in 0..10 {
        let buffer = driver.buffer(&packet(&frame(number, 60)));
        driver.send(TX, &[buffer]);
    }
    assert!(driver.used(TX).is_empty());
    switch.set_mood(Mood::Takes(3));
    for number in 0..10 {
        assert_eq!(next_sent(&events), frame(number, 60));
    }
    driver.wait_used(TX, 10);
}

#[test]
fn a_failed_port_drops_frames_and_the_card_goes_on() {
    let (switch, events) = Switch::new();
    switch.set_mood(Mood::Fails);
    let card = switch.card();
    let counters = card.counters();
    let mut driver = Driver::start(card);
    let buffer = driver.buffer(&packet(&frame(1, 60)));
    driver.send(TX, &[buffer]);
    driver.wait_used(TX, 1);
    assert_eq!(count_of(&counters.sent_dropped), 1);
    assert!(count_of(&counters.port_errors) > 0);
    switch.set_mood(Mood::Takes(8));
    let buffer = driver.buffer(&packet(&frame(2, 60)));
    driver.send(TX, &[buffer]);
    assert_eq!(next_sent(&events), frame(2, 60));
}

#[test]
fn a_move_in_the_middle_of_traffic_loses_and_repeats_nothing() {
    let (switch, events) = Switch::new();
    switch.set_mood(Mood::Takes(3));
    let mut driver = Driver::start(switch.card());
    let (mut sent, mut delivered) = (Vec::new(), Vec::new());
    let mut rooms = std::collections::HashMap::new();
    for turn in 0..40u32 {
        for number in turn * 4..turn * 4 + 4 {
            switch.push(&frame(number, 60));
            let buffer = driver.buffer(&packet(&frame(number, 60)));
            while driver.add(TX, &[buffer]).is_none() {
                driver.wait_used(TX, 1);
            }
            driver.ring(TX);
            let room = driver.room(128);
            if let Some(head) = driver.add(RX, &[room]) {
                rooms.insert(head, room);
                driver.ring(RX);
            }
        }
        if turn % 4 == 3 {
            driver.move_to(switch.card());
        }
        delivered.extend(driver.used(RX).into_iter().map(|(head, _)| rooms[&head]));
        let bytes = delivered.drain(..).map(|room| driver.bytes(room));
        sent.extend(bytes.map(|bytes| bytes[HEADER_SIZE..][..60].to_vec()));
    }
    while sent.len() < 160 {
        let room = driver.room(128);
        if let Some(head) = driver.add(RX, &[room]) {
            rooms.insert(head, room);
            driver.ring(RX);
        }
        for (head, _) in driver.wait_used(RX, 1) {
            sent.push(driver.bytes(rooms[&head])[HEADER_SIZE..][..60].to_vec());
        }
    }
    let expected: Vec<Vec<u8>> = (0..160).map(|number| frame(number, 60)).collect();
    assert_eq!(sent, expected);
    let mut to_switch = Vec::new();
    while to_switch.len() < 160 {
        match events.recv_timeout(PATIENCE).unwrap() {
            Event::Sent(bytes) => to_switch.push(bytes),
            Event::Announced(_) => {}
        }
    }
    assert_eq!(to_switch, expected);
}

#[test]
fn a_card_announces_its_address_where_it_goes_on() {
    let (switch, events) = Switch::new();
    let mut driver = Driver::start(switch.card());
    driver.device.pause(Reach::AnyHost);
    driver.device.resume();
    driver.move_to(switch.card());
    assert_eq!(events.recv_timeout(PATIENCE), Ok(Event::Announced(MAC)));
    let buffer = driver.buffer(&packet(&frame(1, 60)));
    driver.send(TX, &[buffer]);
    assert_eq!(next_sent(&events), frame(1, 60));
}

#[test]
fn states_of_another_card_are_refused() {
    let (switch, _events) = Switch::new();
    let driver = Driver::start(switch.card());
    driver.device.pause(Reach::AnyHost);
    let state = driver.save();
    let other = Net::new(Box::new(TestPort(Arc::clone(&switch))), MacAddress([2; 6]));
    let target = driver.another(Box::new(other));
    assert!(target.restore(&state).is_err());
    let mut net = switch.card();
    let valid = NetState {
        mac: MAC.0.to_vec(),
        received: vec![frame(1, 60)],
        counters: vec![1; 20],
    };
    use prost::Message;
    net.restore(0, &valid.encode_to_vec()).unwrap();
    for received in [
        vec![vec![0; MAX_FRAME + 1]],
        vec![vec![0; 3]],
        vec![frame(1, 60); 65],
    ] {
        let state = NetState {
            received,
            ..valid.clone()
        };
        assert!(net.restore(0, &state.encode_to_vec()).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn garbage_in_the_queues_ends_in_a_reset_and_not_worse(
        table in proptest::collection::vec(
            (0u64..0x90_0000, 0u32..4000, 0u16..8, 0u16..QUEUE_SIZE + 1), 16),
        index in 0u16..QUEUE_SIZE * 2,
        frames in proptest::collection::vec(0usize..2000, 0..20),
    ) {
        let (switch, events) = Switch::new();
        let mut driver = Driver::start(switch.card());
        for queue in [RX, TX] {
            let (descriptors, available, _) = Driver::rings_of(queue);
            for (at, (address, length, flags, next)) in table.iter().enumerate() {
                let mut bytes = Vec::new();
                bytes.extend(address.to_le_bytes());
                bytes.extend(length.to_le_bytes());
                bytes.extend(flags.to_le_bytes());
                bytes.extend(next.to_le_bytes());
                driver.put(descriptors + 16 * at as u64, &bytes);
                driver.put(available + 4 + 2 * at as u64, &(at as u16).to_le_bytes());
            }
            driver.put(available + 2, &index.to_le_bytes());
            driver.ring(queue);
        }
        for length in frames {
            switch.push(&vec![0; length]);
        }
        driver.move_to(switch.card());
        // Whatever the card made of it: after a reset it works.
        let features = driver.offered();
        driver.initialise(features);
        while events.try_recv().is_ok() {}
        let mine = [frame(0xfeed, 60), frame(0xbeef, 61)];
        for bytes in &mine {
            let buffer = driver.buffer(&packet(bytes));
            driver.send(TX, &[buffer]);
        }
        for bytes in &mine {
            prop_assert_eq!(&next_sent(&events), bytes);
        }
    }
}
