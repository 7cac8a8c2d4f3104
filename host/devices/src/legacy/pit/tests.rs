use proptest::prelude::*;

use super::*;
use crate::recorder::Line;

/// How long an interrupt may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

struct Machine {
    ports: Bus,
    line: Arc<Line>,
    pit: Arc<Pit>,
}

impl Machine {
    fn new() -> Self {
        let (ports, line) = (Bus::new(), Arc::<Line>::default());
        let pit = Pit::new(line.clone()).unwrap();
        pit.attach(&ports).unwrap();
        Self { ports, line, pit }
    }

    fn write(&self, port: u64, value: u8) {
        assert!(self.ports.write(port, &[value]));
    }

    fn read(&self, port: u64) -> u8 {
        let mut data = [0];
        assert!(self.ports.read(port, &mut data));
        data[0]
    }

    /// Sets the clock, which stands.
    fn set_clock(&self, ticks: u64) {
        lock(&self.pit.shared.state).clock.ticks = ticks;
    }

    /// Waits until the line has risen `count` times more.
    fn wait_for(&self, count: usize) {
        let (start, mut seen) = (Instant::now(), 0);
        while seen < count {
            assert!(start.elapsed() < LIMIT, "{seen} of {count}");
            seen += self.line.take_edges();
            std::thread::yield_now();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.ports.clear();
    }
}

#[test]
fn counter_0_interrupts_at_its_rate_and_only_while_the_machine_runs() {
    let machine = Machine::new();
    machine.write(0x43, 0x34);
    // 1193 ticks are a millisecond.
    machine.write(0x40, 0xa9);
    machine.write(0x40, 0x04);
    let before = machine.line.take_edges();
    assert!(before <= 1, "the idle output is high");
    let start = Instant::now();
    machine.pit.resume();
    machine.wait_for(20);
    assert!(start.elapsed() >= Duration::from_millis(19));
    machine.pit.pause(Reach::AnyHost);
    machine.line.take_edges();
    let now = lock(&machine.pit.shared.state).clock.now();
    machine.set_clock(now + 10_000);
    assert_eq!(machine.line.take_edges(), 0);
}

#[test]
fn a_one_shot_comes_once() {
    let machine = Machine::new();
    machine.pit.resume();
    machine.write(0x43, 0x10);
    machine.write(0x40, 100);
    machine.wait_for(1);
    assert_eq!(machine.line.take_edges(), 0);
    assert!(machine.line.is_high());
    // The next count lets the output fall.
    machine.write(0x43, 0x30);
    machine.write(0x40, 0xff);
    assert!(!machine.line.is_high());
}

#[test]
fn a_tiny_count_does_not_occupy_the_host() {
    let machine = Machine::new();
    machine.pit.resume();
    machine.write(0x43, 0x14);
    machine.write(0x40, 2);
    let start = Instant::now();
    machine.wait_for(20);
    assert!(start.elapsed() >= 18 * CLOSEST);
}

#[test]
fn port_0x61_gates_counter_2_and_shows_its_output() {
    let machine = Machine::new();
    machine.write(0x43, 0xb0);
    machine.write(0x42, 100);
    machine.write(0x42, 0);
    machine.set_clock(1000);
    assert_eq!(machine.read(0x61) & 0x23, 0);
    machine.write(0x61, 3);
    machine.set_clock(1099);
    assert_eq!(machine.read(0x61) & 0x23, 3);
    machine.set_clock(1100);
    assert_eq!(machine.read(0x61) & 0x23, 0x23);
    // The refresh bit changes with time.
    let now = machine.read(0x61) & 0x10;
    machine.set_clock(1100 + REFRESH_TICKS);
    assert_eq!(machine.read(0x61) & 0x10, now ^ 0x10);
}

#[test]
fn the_read_back_command_latches_several_counters_at_once() {
    let machine = Machine::new();
    for (port, word) in [(0x40, 0x34), (0x42, 0xb4)] {
        machine.write(0x43, word);
        machine.write(port, 0);
        machine.write(port, 1);
    }
    machine.write(0x61, 1);
    machine.set_clock(6);
    // Count and status of counters 0 and 2.
    machine.write(0x43, 0xca);
    machine.set_clock(16);
    for port in [0x40, 0x42] {
        assert_eq!(machine.read(port), 0xb4);
        assert_eq!([machine.read(port), machine.read(port)], [250, 0]);
        assert_eq!([machine.read(port), machine.read(port)], [240, 0]);
    }
    assert_eq!(machine.read(0x43), 0xff);
    // The latch command holds a count, too.
    machine.write(0x43, 0);
    machine.set_clock(20);
    assert_eq!([machine.read(0x40), machine.read(0x40)], [240, 0]);
}

#[test]
fn the_state_survives_the_round_trip_and_the_clock_goes_on_from_there() {
    let source = Machine::new();
    source.write(0x43, 0x34);
    source.write(0x40, 0);
    source.write(0x40, 0x10);
    source.write(0x61, 2);
    source.set_clock(100);
    source.write(0x43, 0);
    let target = Machine::new();
    target.pit.restore(&source.pit.save()).unwrap();
    assert_eq!(target.pit.save(), source.pit.save());
    assert_eq!(target.line.take_edges(), 0);
    assert_eq!([target.read(0x40), target.read(0x40)], [0x9c, 0x0f]);
    target.pit.resume();
    target.wait_for(1);
}

#[test]
fn an_impossible_state_is_refused() {
    let machine = Machine::new();
    let good = machine.pit.save();
    let changed = |change: &dyn Fn(&mut PitState)| {
        let mut state: PitState = good.decode(KIND, VERSION).unwrap();
        change(&mut state);
        state
    };
    for state in [
        changed(&|state| state.counters.truncate(2)),
        changed(&|state| state.ticks = u64::MAX),
        changed(&|state| state.told = 1),
        changed(&|state| state.counters[0].mode = 6),
        changed(&|state| state.counters[0].access = 0),
        changed(&|state| state.counters[0].access = 5),
        changed(&|state| state.counters[0].reload = 0),
        changed(&|state| state.counters[0].next = Some(0x1_0001)),
        changed(&|state| state.counters[1].start = Some(1)),
        changed(&|state| state.counters[1].next_at = u64::MAX),
        changed(&|state| state.counters[2].held = Some(1)),
        changed(&|state| state.counters[2].latched_count = Some(0x1_0000)),
        changed(&|state| state.counters[2].written_low = Some(0x100)),
    ] {
        let state = SavedState::encode("pit", KIND, VERSION, &state);
        assert!(machine.pit.restore(&state).is_err());
    }
    assert_eq!(machine.pit.save(), good);
}

proptest! {
    #[test]
    fn no_access_panics_and_every_state_can_be_restored(
        steps in proptest::collection::vec((0u64..5, any::<u8>(), any::<bool>(), 0u64..0x2_0000), 0..60),
    ) {
        let (machine, mut now) = (Machine::new(), 0);
        for (port, value, write, later) in steps {
            now += later;
            machine.set_clock(now);
            let port = if port == 4 { 0x61 } else { 0x40 + port };
            match write {
                true => machine.write(port, value),
                false => drop(machine.read(port)),
            }
        }
        let saved = machine.pit.save();
        prop_assert!(machine.pit.restore(&saved).is_ok());
        prop_assert_eq!(machine.pit.save(), saved);
    }
}
