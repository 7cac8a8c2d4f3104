use super::*;
use crate::recorder::Line;
use proptest::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Debug, Default)]
struct Terminal {
    output: Mutex<Vec<u8>>,
    ready: AtomicUsize,
}

impl Console for Terminal {
    fn write(&self, bytes: &[u8]) {
        lock(&self.output).extend(bytes);
    }
    fn input_ready(&self) {
        self.ready.fetch_add(1, Ordering::Relaxed);
    }
}

struct Port {
    serial: Arc<Serial>,
    line: Arc<Line>,
    terminal: Arc<Terminal>,
}

impl Port {
    fn new() -> Self {
        let (line, terminal) = (Arc::<Line>::default(), Arc::<Terminal>::default());
        Self {
            serial: Serial::new(line.clone(), terminal.clone()),
            line,
            terminal,
        }
    }

    /// A port as Linux leaves it when it is open.
    fn open() -> Self {
        let port = Self::new();
        port.write(2, 0x87);
        port.write(3, 3);
        port.write(4, 0x0b);
        port.write(1, 5);
        port
    }

    fn read(&self, offset: u64) -> u8 {
        let mut data = [0];
        self.serial.read(offset, &mut data);
        data[0]
    }

    fn write(&self, offset: u64, value: u8) {
        self.serial.write(offset, &[value]);
    }
}

#[test]
fn output_reaches_the_console_in_order() {
    let port = Port::open();
    for byte in b"hello" {
        port.write(0, *byte);
        assert_eq!(port.read(5) & 0x60, 0x60);
    }
    assert_eq!(*lock(&port.terminal.output), b"hello");
}

#[test]
fn linux_finds_a_16550a() {
    let port = Port::new();
    // The interrupt enable register has four bits.
    port.write(1, 0xff);
    assert_eq!(port.read(1), 0x0f);
    port.write(1, 0);
    // The loop test: OUT2 and RTS come back as DCD and CTS.
    port.write(4, 0x1a);
    assert_eq!(port.read(6) & 0xf0, 0x90);
    port.write(4, 0);
    // With FIFO, without the 64-byte FIFO of a 16750.
    port.write(2, 1);
    assert_eq!(port.read(2) >> 6, 3);
    port.write(2, 0x21);
    assert_eq!(port.read(2) >> 5, 6);
    port.write(7, 0xa5);
    assert_eq!(port.read(7), 0xa5);
    // Divisor latch.
    port.write(3, 0x83);
    port.write(0, 1);
    port.write(1, 2);
    assert_eq!((port.read(0), port.read(1)), (1, 2));
    port.write(3, 3);
    assert_eq!(port.read(1), 0);
}

#[test]
fn an_empty_transmitter_interrupts_when_enabled_and_after_each_byte() {
    let port = Port::open();
    assert_eq!(port.read(2), 0xc1);
    port.write(1, 2);
    assert!(port.line.is_high());
    assert_eq!(port.read(2), 0xc2);
    assert!(!port.line.is_high());
    assert_eq!(port.read(2), 0xc1);
    // Enabling again without disabling tells nothing new.
    port.write(1, 2);
    assert_eq!(port.read(2), 0xc1);
    port.line.take_edges();
    for byte in 0..16 {
        port.write(0, byte);
    }
    assert_eq!(port.line.take_edges(), 1);
    assert_eq!(port.read(2), 0xc2);
    port.write(1, 0);
    port.write(1, 2);
    assert_eq!(port.read(2), 0xc2);
}

#[test]
fn input_interrupts_until_it_is_read() {
    let port = Port::open();
    assert_eq!(port.serial.push_input(b"ab"), 2);
    assert!(port.line.is_high());
    assert_eq!(port.read(2), 0xcc);
    assert_eq!(port.serial.push_input(&[b'c'; 12]), 12);
    assert_eq!(port.read(2), 0xc4);
    assert_eq!(port.read(5) & 1, 1);
    assert_eq!((port.read(0), port.read(0)), (b'a', b'b'));
    for _ in 0..12 {
        assert!(port.line.is_high());
        assert_eq!(port.read(0), b'c');
    }
    assert!(!port.line.is_high());
    assert_eq!(port.read(5) & 1, 0);
    assert_eq!(port.read(0), 0);
}

#[test]
fn input_waits_until_the_guest_requests_it() {
    let port = Port::new();
    port.write(1, 1);
    assert_eq!(port.serial.push_input(b"early"), 5);
    assert!(!port.line.is_high());
    // Opening the port clears the FIFO and then asks for input.
    port.write(2, 0x07);
    port.write(4, 0x1b);
    assert_eq!(port.read(5) & 1, 0);
    port.write(4, 0x0b);
    assert!(port.line.is_high());
    let read: Vec<u8> = (0..5).map(|_| port.read(0)).collect();
    assert_eq!(read, b"early");
}

#[test]
fn a_full_backlog_pushes_back_and_says_when_there_is_room() {
    let port = Port::open();
    let input: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
    let mut pushed = port.serial.push_input(&input);
    assert!(pushed < input.len());
    let mut read = Vec::new();
    while read.len() < input.len() {
        read.push(port.read(0));
        if port.terminal.ready.swap(0, Ordering::Relaxed) > 0 {
            pushed += port.serial.push_input(&input[pushed..]);
        }
    }
    assert_eq!(read, input);
    assert_eq!(port.read(5) & 1, 0);
}

#[test]
fn the_loop_returns_what_is_sent_and_reports_an_overrun() {
    let port = Port::open();
    port.write(4, 0x10);
    port.write(1, 4);
    for byte in 0..17 {
        port.write(0, byte);
    }
    assert!(lock(&port.terminal.output).is_empty());
    assert_eq!(port.read(2), 0xc6);
    assert_eq!(port.read(5) & 3, 3);
    assert_eq!(port.read(5) & 3, 1);
    assert!(!port.line.is_high());
    let read: Vec<u8> = (0..16).map(|_| port.read(0)).collect();
    assert_eq!(read, (0..16).collect::<Vec<_>>());
}

#[test]
fn changes_of_the_modem_lines_interrupt_until_they_are_read() {
    let port = Port::new();
    port.write(4, 0x10);
    assert_eq!(port.read(6), 0x0b);
    port.write(1, 8);
    assert!(!port.line.is_high());
    // The ring indicator counts when it ends.
    port.write(4, 0x14);
    assert!(!port.line.is_high());
    port.write(4, 0x10);
    assert!(port.line.is_high());
    assert_eq!(port.read(2), 0);
    assert_eq!(port.read(6), 0x04);
    assert!(!port.line.is_high());
}

#[test]
fn the_state_survives_the_round_trip_with_all_input() {
    let source = Port::open();
    source.write(1, 7);
    source.write(7, 0x77);
    source.serial.push_input(&[b'x'; 100]);
    let target = Port::new();
    target.serial.restore(&source.serial.save()).unwrap();
    assert_eq!(target.serial.save(), source.serial.save());
    assert!(target.line.is_high());
    let read = (0..101)
        .map(|_| target.read(0))
        .filter(|byte| *byte == b'x');
    assert_eq!(read.count(), 100);
    assert_eq!(target.read(2), 0xc2);
}

#[test]
fn an_impossible_state_is_refused() {
    let port = Port::open();
    let good = port.serial.save();
    let state: UartState = good.decode(KIND, VERSION).unwrap();
    let change = |f: &dyn Fn(&mut UartState)| {
        let mut state = state.clone();
        f(&mut state);
        state
    };
    let bad = [
        change(&|s| s.interrupt_enable = 0x10),
        change(&|s| s.fifo_control = 2),
        change(&|s| s.line_control = 0x100),
        change(&|s| s.modem_control = 0x20),
        change(&|s| s.modem_status = 0x100),
        change(&|s| s.scratch = u32::MAX),
        change(&|s| s.divisor = 0x1_0000),
        change(&|s| s.received = vec![0; 17]),
        change(&|s| s.backlog = vec![0; uart::BACKLOG_SIZE + 1]),
    ];
    for body in bad {
        let state = SavedState::encode("serial", KIND, VERSION, &body);
        let refused = port.serial.restore(&state);
        assert!(
            matches!(refused, Err(RestoreError::Invalid { .. })),
            "{body:?}"
        );
    }
    assert_eq!(port.serial.save(), good);
}

proptest! {
    #[test]
    fn no_access_panics_and_every_state_can_be_restored(
        accesses in proptest::collection::vec((0u8..3, 0u64..9, any::<u8>(), 0usize..600), 0..300),
    ) {
        let port = Port::new();
        for (what, offset, value, length) in accesses {
            match what {
                0 => { port.read(offset); }
                1 => port.write(offset, value),
                _ => { port.serial.push_input(&vec![value; length]); }
            }
        }
        let other = Port::new();
        prop_assert!(other.serial.restore(&port.serial.save()).is_ok());
        prop_assert_eq!(other.serial.save(), port.serial.save());
        prop_assert_eq!(other.line.is_high(), port.line.is_high());
    }
}
