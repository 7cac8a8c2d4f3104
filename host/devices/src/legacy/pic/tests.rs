use proptest::prelude::*;

use super::*;
use crate::recorder::Line as Output;

struct Machine {
    ports: Bus,
    pic: Arc<Pic>,
    output: Arc<Output>,
}

impl Machine {
    fn new() -> Self {
        let (ports, pic, output) = (Bus::new(), Pic::new(), Arc::<Output>::default());
        pic.connect(output.clone());
        pic.attach(&ports).unwrap();
        Self { ports, pic, output }
    }

    /// As programs do it: vectors from 0x20 and 0x28, nothing masked.
    fn initialized(icw4: u8) -> Self {
        let machine = Self::new();
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 0x04),
            (0x21, icw4),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 0x02),
            (0xa1, icw4 & !0x10),
        ] {
            machine.write(port, value);
        }
        machine
    }

    fn write(&self, port: u64, value: u8) {
        assert!(self.ports.write(port, &[value]));
    }

    fn read(&self, port: u64) -> u8 {
        let mut data = [0];
        assert!(self.ports.read(port, &mut data));
        data[0]
    }

    fn raise(&self, lines: &[u32]) {
        for line in lines {
            self.pic.line(*line).set_level(true);
        }
    }

    fn pulse(&self, line: u32) {
        self.pic.line(line).pulse();
    }

    /// Takes what is announced; `None` when nothing is.
    fn take(&self) -> Option<u8> {
        self.output.is_high().then(|| self.pic.acknowledge())
    }

    fn in_service(&self) -> [u8; 2] {
        [0x20, 0xa0].map(|port| {
            self.write(port, 0x0b);
            self.read(port)
        })
    }

    fn requests(&self) -> [u8; 2] {
        [0x20, 0xa0].map(|port| {
            self.write(port, 0x0a);
            self.read(port)
        })
    }
}

#[test]
fn nothing_gets_through_before_initialization() {
    let machine = Machine::new();
    machine.raise(&[0, 1, 8, 15]);
    assert_eq!(machine.take(), None);
    assert_eq!([machine.read(0x21), machine.read(0xa1)], [0xff, 0xff]);
}

#[test]
fn priorities_are_those_of_the_cascade() {
    let machine = Machine::initialized(1);
    machine.raise(&[7, 15, 8, 3, 0, 1]);
    let mut order = Vec::new();
    while let Some(vector) = machine.take() {
        order.push(vector);
        if vector >= 0x28 {
            machine.write(0xa0, 0x20);
        }
        machine.write(0x20, 0x20);
    }
    assert_eq!(order, [0x20, 0x21, 0x28, 0x2f, 0x23, 0x27]);
    assert_eq!(machine.in_service(), [0, 0]);
}

#[test]
fn what_is_in_service_holds_back_the_same_and_lower_priorities() {
    let machine = Machine::initialized(1);
    machine.pulse(4);
    assert_eq!(machine.take(), Some(0x24));
    assert_eq!(machine.in_service(), [0x10, 0]);
    machine.pulse(4);
    machine.pulse(5);
    assert_eq!(machine.take(), None);
    machine.pulse(1);
    assert_eq!(machine.take(), Some(0x21));
    assert_eq!(machine.requests(), [0x30, 0]);
    // A command that names nothing ends the highest, one that names an input that one.
    machine.write(0x20, 0x20);
    assert_eq!(machine.in_service(), [0x10, 0]);
    machine.write(0x20, 0x64);
    assert_eq!(machine.take(), Some(0x24));
}

#[test]
fn an_edge_waits_behind_the_mask() {
    let machine = Machine::initialized(1);
    machine.write(0x21, 0xfe);
    machine.write(0xa1, 0xff);
    machine.pulse(4);
    machine.raise(&[9]);
    assert_eq!(machine.take(), None);
    assert_eq!(machine.requests(), [0x10, 0x02]);
    assert_eq!([machine.read(0x21), machine.read(0xa1)], [0xfe, 0xff]);
    machine.write(0x21, 0xea);
    assert_eq!(machine.take(), Some(0x24));
    machine.write(0x21, 0);
    machine.write(0xa1, 0xfd);
    machine.write(0x20, 0x20);
    assert_eq!(machine.take(), Some(0x29));
    assert_eq!(machine.in_service(), [0x04, 0x02]);
}

#[test]
fn a_line_in_level_mode_repeats_until_it_falls() {
    let machine = Machine::initialized(1);
    machine.write(0x4d0, 0xff);
    machine.write(0x4d1, 0xff);
    // Timer, keyboard, cascade, clock and coprocessor stay with edges.
    assert_eq!([machine.read(0x4d0), machine.read(0x4d1)], [0xf8, 0xde]);
    for line in [5, 11] {
        machine.raise(&[line]);
        for _ in 0..2 {
            assert_eq!(machine.take(), Some(0x20 + line as u8));
            machine.write(0xa0, 0x20);
            machine.write(0x20, 0x20);
        }
        machine.pic.line(line).set_level(false);
        // The slave's request had reached the master already.
        while let Some(vector) = machine.take() {
            assert_eq!((line, vector), (11, 0x2f));
            machine.write(0x20, 0x20);
        }
    }
}

#[test]
fn an_input_that_falls_too_early_is_spurious_and_not_in_service() {
    let machine = Machine::initialized(1);
    assert_eq!(machine.pic.acknowledge(), 0x27);
    assert_eq!(machine.in_service(), [0, 0]);
    machine.write(0x4d1, 0x08);
    machine.raise(&[11]);
    machine.pic.line(11).set_level(false);
    // The master serves its slave, which has nothing.
    assert_eq!(machine.pic.acknowledge(), 0x2f);
    assert_eq!(machine.in_service(), [0x04, 0]);
}

#[test]
fn priorities_rotate() {
    let machine = Machine::initialized(1);
    // Set: input 4 is lowest, so 5 is highest.
    machine.write(0x20, 0xc4);
    machine.pulse(4);
    machine.pulse(5);
    machine.pulse(0);
    assert_eq!(machine.take(), Some(0x25));
    // End with rotation: 5 is lowest now.
    machine.write(0x20, 0xa0);
    machine.pulse(5);
    machine.pulse(6);
    assert_eq!(machine.take(), Some(0x26));
    // End of a named one with rotation: 6 is lowest, then come 7, 0.
    machine.write(0x20, 0xe6);
    assert_eq!(machine.take(), Some(0x20));
    machine.write(0x20, 0x20);
    assert_eq!(machine.take(), Some(0x24));
}

#[test]
fn automatic_ends_leave_nothing_in_service_and_may_rotate() {
    let machine = Machine::initialized(3);
    machine.pulse(3);
    assert_eq!(machine.take(), Some(0x23));
    assert_eq!(machine.in_service(), [0, 0]);
    machine.write(0x20, 0x80);
    machine.pulse(3);
    assert_eq!(machine.take(), Some(0x23));
    machine.pulse(3);
    machine.pulse(4);
    assert_eq!(machine.take(), Some(0x24));
    machine.write(0x20, 0x00);
    assert_eq!(machine.take(), Some(0x23));
    machine.pulse(4);
    machine.pulse(5);
    assert_eq!(machine.take(), Some(0x25));
}

#[test]
fn in_special_mask_mode_what_is_masked_holds_nothing_back() {
    let machine = Machine::initialized(1);
    machine.pulse(2 + 1);
    assert_eq!(machine.take(), Some(0x23));
    machine.pulse(6);
    assert_eq!(machine.take(), None);
    machine.write(0x21, 0x08);
    machine.write(0x20, 0x68);
    assert_eq!(machine.take(), Some(0x26));
    // The command that names nothing passes over the masked one.
    machine.write(0x20, 0x20);
    assert_eq!(machine.in_service(), [0x08, 0]);
    machine.pulse(6);
    machine.write(0x20, 0x48);
    assert_eq!(machine.take(), None);
}

#[test]
fn in_special_fully_nested_mode_a_slave_interrupts_itself() {
    for (icw4, expected) in [(0x01, None), (0x11, Some(0x28))] {
        let machine = Machine::initialized(icw4);
        machine.pulse(12);
        assert_eq!(machine.take(), Some(0x2c));
        machine.pulse(8);
        assert_eq!(machine.take(), expected, "{icw4:#x}");
    }
}

#[test]
fn a_poll_acknowledges() {
    let machine = Machine::initialized(1);
    machine.write(0x20, 0x0c);
    assert_eq!(machine.read(0x20), 0);
    machine.pulse(5);
    machine.write(0x20, 0x0c);
    assert_eq!(machine.read(0x20), 0x85);
    assert_eq!(machine.take(), None);
    assert_eq!(machine.in_service(), [0x20, 0]);
}

#[test]
fn a_single_controller_without_fourth_word_takes_two_words() {
    let machine = Machine::new();
    machine.write(0x20, 0x12);
    machine.write(0x21, 0x47);
    machine.write(0x21, 0xf0);
    assert_eq!(machine.read(0x21), 0xf0);
    machine.pulse(1);
    assert_eq!(machine.take(), Some(0x41));
}

#[test]
fn the_state_survives_the_round_trip_and_drives_the_output() {
    let source = Machine::initialized(1);
    source.write(0x4d0, 0x20);
    source.pulse(4);
    source.take();
    source.raise(&[1, 10]);
    source.write(0x21, 0x02);
    source.write(0xa0, 0x11);
    let target = Machine::new();
    target.pic.restore(&source.pic.save()).unwrap();
    assert_eq!(target.pic.save(), source.pic.save());
    assert_eq!(target.output.is_high(), source.output.is_high());
    target.write(0x21, 0);
    assert_eq!(target.take(), Some(0x21));
}

#[test]
fn an_impossible_state_is_refused() {
    let machine = Machine::initialized(1);
    let good = machine.pic.save();
    let changed = |change: &dyn Fn(&mut ChipState)| {
        let mut state: PicState = good.decode(KIND, VERSION).unwrap();
        change(state.slave.as_mut().unwrap());
        state
    };
    let absent = PicState {
        slave: None,
        ..good.decode(KIND, VERSION).unwrap()
    };
    for state in [
        absent,
        changed(&|chip| chip.levels = 1),
        changed(&|chip| chip.base = 7),
        changed(&|chip| chip.top = 8),
        changed(&|chip| chip.stage = 4),
        changed(&|chip| chip.mask = 0x100),
        changed(&|chip| chip.lines = 0x100),
    ] {
        let state = SavedState::encode("pic", KIND, VERSION, &state);
        assert!(machine.pic.restore(&state).is_err());
    }
    assert_eq!(machine.pic.save(), good);
}

proptest! {
    #[test]
    fn no_access_panics_and_every_state_can_be_restored(
        steps in proptest::collection::vec((0u8..9, any::<u8>(), any::<bool>()), 0..200),
    ) {
        let machine = Machine::new();
        for (what, value, high) in steps {
            match what {
                0..=5 => {
                    let port = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1][usize::from(what)];
                    match high {
                        true => machine.write(port, value),
                        false => drop(machine.read(port)),
                    }
                }
                6 => machine.pic.line(u32::from(value) % 20).set_level(high),
                7 => drop(machine.take()),
                _ => drop(machine.pic.acknowledge()),
            }
        }
        let saved = machine.pic.save();
        prop_assert!(machine.pic.restore(&saved).is_ok());
        prop_assert_eq!(machine.pic.save(), saved);
    }
}
