//! Tests of the console between a driver and a terminal of their own.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::component::Component;
use crate::virtio::testing::{Driver, PATIENCE};

const RX: usize = RECEIVE_QUEUE;
const TX: usize = TRANSMIT_QUEUE;

#[derive(Debug, PartialEq, Eq)]
enum Event {
    Output(Vec<u8>),
    Ready,
}

#[derive(Debug)]
struct Terminal(Mutex<Sender<Event>>);

impl serial::Console for Terminal {
    fn write(&self, bytes: &[u8]) {
        let _ = lock(&self.0).send(Event::Output(bytes.to_vec()));
    }

    fn input_ready(&self) {
        let _ = lock(&self.0).send(Event::Ready);
    }
}

fn terminal() -> (Arc<Terminal>, Receiver<Event>) {
    let (sender, events) = channel();
    (Arc::new(Terminal(Mutex::new(sender))), events)
}

fn console(terminal: &Arc<Terminal>) -> Box<Console> {
    Box::new(Console::new(Arc::clone(terminal) as _).unwrap())
}

#[test]
fn output_arrives_in_order() {
    let (terminal, events) = terminal();
    let mut driver = Driver::start(console(&terminal));
    for text in ["one ", "two ", "three"] {
        let buffer = driver.buffer(text.as_bytes());
        driver.send(TX, &[buffer]);
    }
    driver.wait_used(TX, 3);
    let mut output = Vec::new();
    while output.len() < 13 {
        match events.recv_timeout(PATIENCE).unwrap() {
            Event::Output(bytes) => output.extend(bytes),
            Event::Ready => panic!("nothing was refused"),
        }
    }
    assert_eq!(output, b"one two three");
}

#[test]
fn input_waits_for_buffers_and_fills_them() {
    let (terminal, _events) = terminal();
    let device = console(&terminal);
    let input = device.input();
    let mut driver = Driver::start(device);
    assert_eq!(input.push(b"hello world"), 11);
    let rooms = [driver.room(5), driver.room(64)];
    driver.send(RX, &rooms[..1]);
    driver.send(RX, &rooms[1..]);
    let lengths: Vec<u32> = driver.wait_used(RX, 2).into_iter().map(|u| u.1).collect();
    assert_eq!(lengths, [5, 6]);
    assert_eq!(driver.bytes(rooms[0]), b"hello");
    assert_eq!(&driver.bytes(rooms[1])[..6], b" world");
    let room = driver.room(8);
    driver.send(RX, &[room]);
    assert_eq!(input.push(b"!"), 1);
    assert_eq!(driver.wait_used(RX, 1)[0].1, 1);
}

#[test]
fn input_beyond_the_backlog_is_refused_until_there_is_room() {
    let (terminal, events) = terminal();
    let device = console(&terminal);
    let input = device.input();
    let mut driver = Driver::start(device);
    assert_eq!(input.push(&vec![b'x'; BACKLOG + 10]), BACKLOG);
    assert_eq!(input.push(b"y"), 0);
    let room = driver.room(100);
    driver.send(RX, &[room]);
    driver.wait_used(RX, 1);
    assert_eq!(events.recv_timeout(PATIENCE), Ok(Event::Ready));
    assert_eq!(input.push(&[b'y'; 200]), 100);
}

#[test]
fn input_that_waits_moves_with_the_guest() {
    let (terminal, _events) = terminal();
    let device = console(&terminal);
    device.input().push(b"typed before");
    let mut driver = Driver::start(device);
    driver.move_to(console(&terminal));
    let room = driver.room(64);
    driver.send(RX, &[room]);
    assert_eq!(driver.wait_used(RX, 1)[0].1, 12);
    assert_eq!(&driver.bytes(room)[..12], b"typed before");
}

#[test]
fn a_backlog_that_no_console_holds_is_refused() {
    let (terminal, _events) = terminal();
    let mut device = console(&terminal);
    let state = ConsoleState {
        backlog: vec![0; BACKLOG + 1],
    };
    assert!(device.restore(0, &state.encode_to_vec()).is_err());
    assert!(device.restore(0, &[0xff; 5]).is_err());
}

#[test]
fn buffers_of_the_wrong_direction_are_returned_empty() {
    let (terminal, events) = terminal();
    let device = console(&terminal);
    let input = device.input();
    let mut driver = Driver::start(device);
    let wrong = driver.room(16);
    driver.send(TX, &[wrong]);
    assert_eq!(driver.wait_used(TX, 1)[0].1, 0);
    let wrong = driver.buffer(b"read me");
    driver.send(RX, &[wrong]);
    input.push(b"z");
    assert_eq!(driver.wait_used(RX, 1)[0].1, 0);
    let room = driver.room(4);
    driver.send(RX, &[room]);
    assert_eq!(driver.wait_used(RX, 1)[0].1, 1);
    assert!(events.try_recv().is_err());
    driver.device.pause(Reach::AnyHost);
}
