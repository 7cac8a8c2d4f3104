//! Both engines run the same guest and must show the same.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dunlin_guest::{Doorbell, InterruptLine, Memory, Msi, PageIndex, PageSet, VectoredController};
use dunlin_guest_kvmtest::{self as guest, Program};
use dunlin_hypervisor::kvm::KvmVm;
use dunlin_hypervisor::probe::measure_ring0;
use dunlin_hypervisor::soft::SoftVm;
use dunlin_hypervisor::{Engine, Exit, Vcpu, VcpuHandle, VcpuId, Vm};
use dunlin_x86::cpuid::{Baseline, X86_64_V1, X86_64_V2, X86_64_V3};
use dunlin_x86::saved;
use dunlin_x86::state::{Activity, CpuState};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The engines that this host offers, and the strongest baseline that all of them give. What is
/// missing is said.
fn offered() -> (Vec<Engine>, &'static Baseline) {
    let memory = Memory::new(1 << 20).unwrap();
    let mut refused = None;
    for baseline in [&X86_64_V2, &X86_64_V1] {
        match KvmVm::new(&memory, baseline, 1) {
            Ok(_) => return (vec![Engine::Soft, Engine::Kvm], baseline),
            Err(error) => refused = Some(error),
        }
    }
    if let Some(error) = refused {
        eprintln!("SKIP: {error}");
    }
    (vec![Engine::Soft], &X86_64_V2)
}

fn engines() -> Vec<Engine> {
    offered().0
}

fn ring0_is_native() -> bool {
    measure_ring0().is_ok_and(|speed| speed.native)
}

struct Machine {
    memory: Memory,
    vm: Box<dyn Vm>,
    vcpus: Vec<Box<dyn Vcpu>>,
    /// Rounds that the guest reported last.
    rounds: u64,
}

/// What the guest did last.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Report,
    Doorbell,
    Ready,
    Interrupt(u8),
    Second,
    EndOfInterrupt(u8),
    Kicked,
    Shutdown,
}

fn vm(engine: Engine, memory: &Memory, baseline: &'static Baseline, cpus: u32) -> Box<dyn Vm> {
    match engine {
        Engine::Soft => Box::new(SoftVm::new(memory, baseline, cpus)),
        Engine::Kvm => Box::new(KvmVm::new(memory, baseline, cpus).unwrap()),
    }
}

impl Machine {
    fn new(engine: Engine, cpus: u32) -> Self {
        let memory = Memory::new(guest::MEMORY).unwrap();
        let vm = vm(engine, &memory, offered().1, cpus);
        let vcpus = (0..cpus)
            .map(|id| vm.create_vcpu(VcpuId(id)).unwrap())
            .collect();
        Self {
            memory,
            vm,
            vcpus,
            rounds: 0,
        }
    }

    fn booted(engine: Engine, program: Program, cpus: u32) -> Self {
        let mut machine = Self::new(engine, cpus);
        guest::load(&machine.memory, program);
        let reset = machine.vcpus[0].save().unwrap();
        machine.vcpus[0]
            .restore(&guest::boot_state(&reset))
            .unwrap();
        machine
    }

    /// Serves the guest's I/O until something is worth telling.
    fn next(&mut self) -> Event {
        next(self.vcpus[0].as_mut(), &mut self.rounds)
    }

    fn until_report(&mut self, reports: u64) {
        let rounds = reports * guest::ROUNDS_PER_REPORT;
        while self.rounds != rounds {
            assert!(matches!(self.next(), Event::Report | Event::Doorbell));
        }
    }

    fn harvest(&self) -> BTreeSet<PageIndex> {
        self.vm.collect_dirty().unwrap();
        let mut set = PageSet::new(self.memory.pages());
        self.memory.dirty_log().harvest(&mut set);
        set.iter().collect()
    }

    fn counter(&self) -> (u64, u64) {
        let read = |address| {
            self.memory
                .mapping()
                .read_obj::<u64>(GuestAddress(address))
                .unwrap()
        };
        (read(guest::COUNTER), read(guest::COUNTER + 8))
    }

    fn msi(&self, data: u32) {
        self.vm.msi_sink().signal(Msi {
            address: 0xfee0_0000,
            data,
        });
    }

    /// Moves to a fresh machine of another engine, through bytes.
    fn moved(mut self, engine: Engine) -> Self {
        let mut other = Self::new(engine, self.vcpus.len() as u32);
        for (from, to) in self.vcpus.iter_mut().zip(&mut other.vcpus) {
            from.quiesce().unwrap();
            let state = from.save().unwrap();
            let state: CpuState = saved::decode(&saved::encode(&state)).unwrap();
            to.restore(&state).unwrap();
        }
        let mut page = [0; 4096];
        for index in (0..self.memory.pages()).map(PageIndex) {
            assert!(self.memory.read_page(index, &mut page));
            assert!(other.memory.write_page(index, &page));
        }
        other.rounds = self.rounds;
        other
    }
}

fn next(vcpu: &mut dyn Vcpu, rounds: &mut u64) -> Event {
    loop {
        match vcpu.run().unwrap() {
            Exit::MmioWrite {
                address: guest::MMIO_REPORT,
                data,
            } => {
                let reported = u64::from_le_bytes(data.try_into().unwrap());
                assert_eq!(reported, *rounds + guest::ROUNDS_PER_REPORT, "a gap");
                *rounds = reported;
                return Event::Report;
            }
            Exit::MmioRead {
                address: guest::MMIO_QUESTION,
                data,
            } => data.copy_from_slice(&guest::mmio_answer(*rounds).to_le_bytes()),
            Exit::MmioWrite {
                address: guest::MMIO_DOORBELL,
                data,
            } => {
                assert_eq!(data.len(), 4);
                return Event::Doorbell;
            }
            Exit::PortRead { data, .. } => {
                let size = data.len();
                data.copy_from_slice(&0x8765_4321u32.to_le_bytes()[..size]);
            }
            Exit::PortWrite { port, data } => match port {
                guest::PORT_ECHO => {
                    assert_eq!(data, &0x8765_4321u32.to_le_bytes()[..data.len()]);
                }
                guest::PORT_READY => return Event::Ready,
                guest::PORT_INTERRUPT => return Event::Interrupt(data[0]),
                guest::PORT_SECOND => return Event::Second,
                _ => panic!("the guest wrote {data:x?} to port {port:#x}"),
            },
            Exit::EndOfInterrupt { vector } => return Event::EndOfInterrupt(vector),
            Exit::Kicked => return Event::Kicked,
            Exit::Shutdown => return Event::Shutdown,
            other => panic!("unexpected {other:?}"),
        }
    }
}

/// Kicks a vCPU after a while, so that a test that waits in vain ends.
struct Watchdog {
    _alive: std::sync::mpsc::Sender<()>,
}

fn watchdog(handle: Arc<dyn VcpuHandle>) -> Watchdog {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        if receiver
            .recv_timeout(Duration::from_secs(20))
            .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            handle.kick();
        }
    });
    Watchdog { _alive: sender }
}

#[test]
fn the_guest_reaches_ring_3_and_its_io_gets_the_right_answers() {
    for engine in engines() {
        let mut machine = Machine::booted(engine, Program::Count, 1);
        machine.until_report(20);
        assert_eq!(machine.counter().0, machine.rounds, "{engine:?}");
        let counts = machine.vcpus[0].exit_counts();
        assert_eq!(counts.mmio_reads, 19, "{engine:?}");
        assert_eq!(counts.mmio_writes, 20 + 19, "{engine:?}");
        let state = machine.vcpus[0].save().unwrap();
        assert_eq!(state.segments[1].selector & 3, 3, "{engine:?}");
    }
}

#[test]
fn an_sse_register_keeps_its_sum() {
    for engine in engines() {
        let mut machine = Machine::booted(engine, Program::Count, 1);
        machine.until_report(3);
        let n = machine.rounds;
        assert_eq!(machine.counter().1, n * (n + 1) / 2, "{engine:?}");
    }
}

#[test]
fn the_dirty_log_is_what_the_guest_wrote() {
    for engine in engines() {
        let mut machine = Machine::booted(engine, Program::Count, 1);
        machine.until_report(1);
        machine.vm.start_dirty_tracking().unwrap();
        machine.harvest();
        let own = guest::own_pages();
        let mut seen = machine.rounds;
        for reports in [2, 3, 5, 9] {
            machine.until_report(reports);
            let found: BTreeSet<_> = machine.harvest().difference(&own).copied().collect();
            let expected = guest::dirty_pages(seen, machine.rounds);
            assert_eq!(found, expected, "{engine:?}, report {reports}");
            seen = machine.rounds;
        }
        assert!(machine.harvest().is_empty(), "{engine:?}: nothing has run");
        machine.vm.stop_dirty_tracking().unwrap();
    }
}

#[test]
fn a_saved_guest_goes_on_under_every_engine() {
    for from in engines() {
        for to in engines() {
            let mut machine = Machine::booted(from, Program::Count, 1);
            machine.until_report(7);
            machine = machine.moved(to);
            machine.until_report(12);
            // In the middle of the accesses that follow a report, too.
            assert_eq!(machine.next(), Event::Doorbell);
            machine = machine.moved(from);
            machine.until_report(20);
            let n = machine.rounds;
            assert_eq!(
                machine.counter(),
                (n, n * (n + 1) / 2),
                "{from:?} to {to:?}"
            );
        }
    }
}

/// The lines in which two states differ.
fn differences(left: &CpuState, right: &CpuState) -> Vec<(usize, String, String)> {
    let (left, right) = (format!("{left:#?}"), format!("{right:#?}"));
    left.lines()
        .zip(right.lines())
        .enumerate()
        .filter(|(_, (left, right))| left != right)
        .map(|(line, (left, right))| (line, left.trim().to_owned(), right.trim().to_owned()))
        .collect()
}

#[test]
fn a_state_read_back_is_the_state_written() {
    for from in engines() {
        for to in engines() {
            let mut machine = Machine::booted(from, Program::Count, 1);
            machine.until_report(2);
            machine.vcpus[0].quiesce().unwrap();
            let saved = machine.vcpus[0].save().unwrap();
            let mut other = Machine::new(to, 1);
            other.vcpus[0].restore(&saved).unwrap();
            let again = other.vcpus[0].save().unwrap();
            assert!(again.tsc >= saved.tsc, "{from:?} to {to:?}: TSC went back");
            assert!(
                again.kvmclock_ns >= saved.kvmclock_ns,
                "{from:?} to {to:?}: kvmclock went back from {} to {}",
                saved.kvmclock_ns,
                again.kvmclock_ns
            );
            let clockless = |state: CpuState| {
                let mut state = CpuState {
                    tsc: 0,
                    realtime_ns: 0,
                    kvmclock_ns: 0,
                    ..state
                };
                // The version register is the engine's.
                state.apic.registers[0x30..0x34].fill(0);
                state
            };
            let differences = differences(&clockless(again), &clockless(saved));
            assert!(
                differences.is_empty(),
                "{from:?} to {to:?}: {differences:#?}"
            );
        }
    }
}

#[test]
fn ymm_registers_pass_between_the_engines() {
    const UPPER: std::ops::Range<usize> = 576..832;
    if !dunlin_x86::Cpu::missing_features(&X86_64_V3).is_empty() {
        eprintln!("SKIP: the host's processor lacks AVX2");
        return;
    }
    let memory = Memory::new(1 << 20).unwrap();
    if let Err(error) = KvmVm::new(&memory, &X86_64_V3, 1) {
        eprintln!("SKIP: {error}");
        return;
    }
    let mut state: Option<CpuState> = None;
    for engine in [Engine::Soft, Engine::Kvm, Engine::Soft] {
        let memory = Memory::new(guest::MEMORY).unwrap();
        let vm = vm(engine, &memory, &X86_64_V3, 1);
        let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        let moved = state.take().unwrap_or_else(|| {
            let mut state = guest::boot_state(&vcpu.save().unwrap());
            state.cr4 |= 1 << 18;
            state.xcr0 = 7;
            state.xsave.resize(UPPER.end, 0);
            state.xsave[512] = 7;
            for (index, byte) in state.xsave[UPPER].iter_mut().enumerate() {
                *byte = !(index as u8);
            }
            state
        });
        vcpu.restore(&moved).unwrap();
        let read = vcpu.save().unwrap();
        assert_eq!(read.xsave[UPPER], moved.xsave[UPPER], "{engine:?}");
        assert_eq!((read.xcr0, read.cr4), (moved.xcr0, moved.cr4), "{engine:?}");
        assert_eq!(read.xsave[512], 7, "{engine:?}");
        state = Some(read);
    }
}

#[test]
fn clocks_of_two_engines_keep_time_together() {
    for from in engines() {
        for to in engines() {
            let mut machine = Machine::booted(from, Program::Count, 1);
            machine.until_report(1);
            machine.vcpus[0].quiesce().unwrap();
            let saved = machine.vcpus[0].save().unwrap();
            let mut other = Machine::new(to, 1);
            other.vcpus[0].restore(&saved).unwrap();
            let again = other.vcpus[0].save().unwrap();
            let real = (again.realtime_ns - saved.realtime_ns) as i64;
            let tsc =
                ((again.tsc - saved.tsc) as u128 * 1_000_000 / u128::from(saved.tsc_khz)) as i64;
            let kvmclock = (again.kvmclock_ns - saved.kvmclock_ns) as i64;
            for (name, passed) in [("tsc", tsc), ("kvmclock", kvmclock)] {
                assert!(
                    (passed - real).abs() < 2_000_000,
                    "{from:?} to {to:?}: {name} passed {passed} ns, real time {real} ns"
                );
            }
        }
    }
}

#[test]
fn a_doorbell_rings_without_an_exit_until_it_is_removed() {
    for engine in engines() {
        let mut machine = Machine::booted(engine, Program::Count, 1);
        let doorbell = Doorbell {
            address: guest::MMIO_DOORBELL,
            event: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        };
        machine.vm.add_doorbell(&doorbell).unwrap();
        for _ in 0..4 {
            assert_eq!(machine.next(), Event::Report, "{engine:?}");
        }
        assert_eq!(doorbell.event.read().unwrap(), 3, "{engine:?}");
        machine.vm.remove_doorbell(&doorbell).unwrap();
        assert_eq!(machine.next(), Event::Doorbell, "{engine:?}");
    }
}

#[test]
fn ports_answer_in_their_widths() {
    for engine in engines() {
        let mut machine = Machine::booted(engine, Program::Interrupts, 1);
        assert_eq!(machine.next(), Event::Ready);
        let counts = machine.vcpus[0].exit_counts();
        assert_eq!(
            (counts.port_reads, counts.port_writes),
            (2, 3),
            "{engine:?}"
        );
    }
}

#[test]
fn a_kick_ends_a_run_and_none_is_lost() {
    for engine in engines() {
        let mut machine = Machine::booted(engine, Program::Count, 1);
        let handle = machine.vcpus[0].handle();
        handle.kick();
        while machine.next() != Event::Kicked {}
        let kicker = std::thread::spawn({
            let handle = Arc::clone(&handle);
            move || handle.kick()
        });
        while machine.next() != Event::Kicked {}
        kicker.join().unwrap();
        drop(machine);
        handle.kick();
    }
}

#[test]
fn a_kick_wakes_a_halted_guest() {
    for engine in engines() {
        let mut machine = Machine::booted(engine, Program::Interrupts, 1);
        assert_eq!(machine.next(), Event::Ready);
        let handle = machine.vcpus[0].handle();
        for _ in 0..50 {
            let handle = Arc::clone(&handle);
            let kicker = std::thread::spawn(move || handle.kick());
            assert_eq!(machine.next(), Event::Kicked, "{engine:?}");
            kicker.join().unwrap();
        }
    }
}

#[test]
fn messages_interrupt_a_halted_guest_and_level_ones_report_their_end() {
    for engine in engines() {
        let mut machine = Machine::booted(engine, Program::Interrupts, 1);
        let _watchdog = watchdog(machine.vcpus[0].handle());
        assert_eq!(machine.next(), Event::Ready);
        for _ in 0..3 {
            machine.msi(guest::VECTOR_PLAIN.into());
            let expected = Event::Interrupt(guest::VECTOR_PLAIN);
            assert_eq!(machine.next(), expected, "{engine:?}");
            machine.msi(0xc000 | u32::from(guest::VECTOR_LEVEL));
            let mut found = [machine.next(), machine.next()];
            if engine == Engine::Kvm && !ring0_is_native() {
                // A kernel that emulates ring 0 in batches may report the later exit first.
                found.sort_by_key(|event| matches!(event, Event::EndOfInterrupt(_)));
            }
            let expected = [
                Event::Interrupt(guest::VECTOR_LEVEL),
                Event::EndOfInterrupt(guest::VECTOR_LEVEL),
            ];
            assert_eq!(found, expected, "{engine:?}");
        }
    }
}

/// A controller with one vector, which counts how often it was taken.
#[derive(Debug, Default)]
struct OneVector {
    intr: OnceLock<Arc<dyn InterruptLine>>,
    taken: AtomicUsize,
}

impl VectoredController for OneVector {
    fn acknowledge(&self) -> u8 {
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.intr.get().unwrap().set_level(false);
        guest::VECTOR_PLAIN
    }
}

#[test]
fn a_controller_outside_gives_vectors_while_lint0_lets_it() {
    const LINT0: usize = 0x350;
    const EXTERNAL: u32 = 7 << 8;
    const MASKED: u32 = 1 << 16;
    let mut machine = Machine::new(Engine::Soft, 1);
    let controller = Arc::new(OneVector::default());
    let intr = machine.vm.connect_controller(controller.clone()).unwrap();
    controller.intr.set(intr.clone()).unwrap();
    guest::load(&machine.memory, Program::Interrupts);
    let reset = machine.vcpus[0].save().unwrap();
    let mut state = guest::boot_state(&reset);
    machine.vcpus[0].restore(&state).unwrap();
    let _watchdog = watchdog(machine.vcpus[0].handle());
    assert_eq!(machine.next(), Event::Ready);
    let mut set_lint0 = |machine: &mut Machine, entry: u32| {
        machine.vcpus[0].quiesce().unwrap();
        state = machine.vcpus[0].save().unwrap();
        state.apic.registers[LINT0..LINT0 + 4].copy_from_slice(&entry.to_le_bytes());
        machine.vcpus[0].restore(&state).unwrap();
    };
    set_lint0(&mut machine, EXTERNAL);
    for round in 1..=3 {
        let intr = intr.clone();
        let raiser = std::thread::spawn(move || intr.set_level(true));
        assert_eq!(machine.next(), Event::Interrupt(guest::VECTOR_PLAIN));
        raiser.join().unwrap();
        assert_eq!(controller.taken.load(Ordering::Relaxed), round);
    }
    set_lint0(&mut machine, EXTERNAL | MASKED);
    intr.set_level(true);
    machine.vcpus[0].handle().kick();
    assert_eq!(machine.next(), Event::Kicked);
    machine.msi(guest::VECTOR_LEVEL.into());
    assert_eq!(machine.next(), Event::Interrupt(guest::VECTOR_LEVEL));
    assert_eq!(controller.taken.load(Ordering::Relaxed), 3);
    // The level that waited is seen once it may be.
    set_lint0(&mut machine, EXTERNAL);
    assert_eq!(machine.next(), Event::Interrupt(guest::VECTOR_PLAIN));
    // Line and controller own each other in one direction only.
    let weak = Arc::downgrade(&controller);
    drop((controller, machine));
    assert!(weak.upgrade().is_none());
}

#[test]
fn a_level_interrupt_in_service_reports_its_end_after_a_move() {
    for from in engines() {
        for to in engines() {
            if [from, to].contains(&Engine::Kvm) && !ring0_is_native() {
                eprintln!("SKIP: {from:?} to {to:?}: this kernel emulates ring 0 in batches");
                continue;
            }
            let mut machine = Machine::booted(from, Program::Interrupts, 1);
            assert_eq!(machine.next(), Event::Ready);
            machine.msi(0xc000 | u32::from(guest::VECTOR_LEVEL));
            let expected = Event::Interrupt(guest::VECTOR_LEVEL);
            assert_eq!(machine.next(), expected);
            machine.vcpus[0].quiesce().unwrap();
            let state = machine.vcpus[0].save().unwrap();
            if state.apic.registers[0x120] & 2 == 0 {
                eprintln!("SKIP: {from:?} to {to:?}: this kernel runs on past the handler's OUT");
                continue;
            }
            machine = machine.moved(to);
            let _watchdog = watchdog(machine.vcpus[0].handle());
            let expected = Event::EndOfInterrupt(guest::VECTOR_LEVEL);
            assert_eq!(machine.next(), expected, "{from:?} to {to:?}");
        }
    }
}

#[test]
fn an_armed_timer_fires_on_time_also_after_a_move() {
    for from in engines() {
        for to in engines() {
            let mut machine = Machine::booted(from, Program::Interrupts, 1);
            assert_eq!(machine.next(), Event::Ready);
            machine.msi(guest::VECTOR_ARM_TIMER.into());
            let expected = Event::Interrupt(guest::VECTOR_ARM_TIMER);
            assert_eq!(machine.next(), expected);
            let armed = Instant::now();
            // The handler arms it and returns; then the guest sleeps, or is on its way to.
            machine = machine.moved(to);
            let _watchdog = watchdog(machine.vcpus[0].handle());
            let expected = Event::Interrupt(guest::VECTOR_TIMER);
            assert_eq!(machine.next(), expected, "{from:?} to {to:?}");
            assert!(armed.elapsed() >= Duration::from_micros(200));
        }
    }
}

#[test]
fn a_second_processor_starts_by_init_and_start_up() {
    for engine in engines() {
        let mut machine = Machine::booted(engine, Program::Interrupts, 2);
        assert_eq!(machine.next(), Event::Ready);
        let mut second = machine.vcpus.pop().unwrap();
        assert_eq!(second.save().unwrap().activity, Activity::WaitForSipi);
        let handle = second.handle();
        let _watchdog = watchdog(Arc::clone(&handle));
        let runner = std::thread::spawn(move || {
            let mut rounds = 0;
            let event = next(second.as_mut(), &mut rounds);
            (event, next(second.as_mut(), &mut rounds))
        });
        machine.msi(guest::VECTOR_START_SECOND.into());
        let expected = Event::Interrupt(guest::VECTOR_START_SECOND);
        assert_eq!(machine.next(), expected);
        machine.msi(guest::VECTOR_PLAIN.into());
        let expected = Event::Interrupt(guest::VECTOR_PLAIN);
        assert_eq!(machine.next(), expected);
        handle.kick();
        let (first, then) = runner.join().unwrap();
        // A kick may come first.
        let events = [first, then];
        assert!(events.contains(&Event::Second), "{engine:?}: {events:?}");
    }
}

#[test]
fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
    for engine in engines() {
        let mut machine = Machine::booted(engine, Program::Count, 1);
        machine.until_report(2);
        machine.vcpus[0].quiesce().unwrap();
        let good = machine.vcpus[0].save().unwrap();
        let mut other_id = good.clone();
        other_id.apic.registers[0x23] = 5;
        let mut paging = good.clone();
        paging.cr4 = 0;
        let mut clock = good.clone();
        clock.tsc_khz = 1;
        let mut floating = good.clone();
        floating.xsave.truncate(100);
        for bad in [other_id, paging, clock, floating] {
            assert!(machine.vcpus[0].restore(&bad).is_err(), "{engine:?}");
        }
        machine.until_report(4);
    }
}

#[test]
fn a_processor_beyond_the_count_is_refused() {
    for engine in engines() {
        let memory = Memory::new(1 << 20).unwrap();
        let vm = vm(engine, &memory, &X86_64_V1, 1);
        assert!(vm.create_vcpu(VcpuId(1)).is_err());
        let first = vm.create_vcpu(VcpuId(0)).unwrap();
        assert!(vm.create_vcpu(VcpuId(0)).is_err(), "twice");
        drop(first);
    }
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    for engine in engines() {
        // No program is loaded: zeros are executed in 32-bit mode until memory ends, where
        // nothing can be fetched and there is no IDT.
        let mut machine = Machine::new(engine, 1);
        let reset = machine.vcpus[0].save().unwrap();
        let mut state = guest::boot_state(&reset);
        machine
            .memory
            .mapping()
            .write_slice(&[0x0f, 0x0b], GuestAddress(state.rip))
            .unwrap();
        state.gpr = [0; 16];
        machine.vcpus[0].restore(&state).unwrap();
        assert_eq!(machine.next(), Event::Shutdown, "{engine:?}");
    }
}

/// Runs a vCPU until it has printed `letters` letters, and then until an instruction border.
fn print(vcpu: &mut dyn Vcpu, letters: usize) -> String {
    let mut printed = String::new();
    while printed.len() < letters {
        match vcpu.run().unwrap() {
            Exit::PortWrite { data, .. } => printed.push(char::from(data[0])),
            Exit::Kicked => {}
            other => panic!("unexpected {other:?} after {printed:?}"),
        }
    }
    vcpu.quiesce().unwrap();
    printed
}

/// Two processors as [`guest::pair`] starts them, each run in turn on this thread.
fn pair(engine: Engine) -> Machine {
    let mut machine = Machine::new(engine, 2);
    guest::pair::load(&machine.memory);
    let reset = machine.vcpus[0].save().unwrap();
    let boot = guest::pair::boot_state(&reset);
    machine.vcpus[0].restore(&boot).unwrap();
    machine
}

#[test]
fn a_second_processor_reaches_ring_3_and_moves_with_the_first() {
    for from in engines() {
        for to in engines() {
            let mut machine = pair(from);
            assert_eq!(print(machine.vcpus[0].as_mut(), 3), "bcd", "{from:?}");
            assert_eq!(print(machine.vcpus[1].as_mut(), 2), "BC", "{from:?}");
            for index in 0..2 {
                let state = machine.vcpus[index].save().unwrap();
                assert_eq!(state.segments[1].selector & 3, 3, "{from:?}: {index}");
            }
            machine = machine.moved(to);
            assert_eq!(
                print(machine.vcpus[1].as_mut(), 3),
                "DEF",
                "{from:?} to {to:?}"
            );
            assert_eq!(
                print(machine.vcpus[0].as_mut(), 1),
                "e",
                "{from:?} to {to:?}"
            );
        }
    }
}
