//! The program runs on the software CPU with the devices that it uses, and prints what it should.
#![expect(
    clippy::unwrap_used,
    reason = "a test may stop at what it cannot do without"
)]
#![cfg(target_arch = "x86_64")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use dunlin_boot::{EntryState, LoadContext, Module};
use dunlin_devices::bus::Bus;
use dunlin_devices::component::{Component, Reach};
use dunlin_devices::debug_exit::{self, DebugExit, DebugExitEvents};
use dunlin_devices::ioapic::IoApic;
use dunlin_devices::legacy::Fork;
use dunlin_devices::legacy::pic::Pic;
use dunlin_devices::legacy::pit::Pit;
use dunlin_devices::serial::{Console, Serial};
use dunlin_guest::{GuestAddress, Memory, layout};
use dunlin_hypervisor::soft::SoftVm;
use dunlin_hypervisor::{Exit, Vcpu, VcpuId, Vm};
use dunlin_x86::cpuid::X86_64_V1;
use dunlin_x86::state::{CpuState, Segment, gpr, segment};

/// How long the program may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// What the guest said.
#[derive(Debug, Default)]
struct Said {
    text: Mutex<Vec<u8>>,
    exit: Mutex<Option<u32>>,
}

impl Console for Said {
    fn write(&self, bytes: &[u8]) {
        self.text.lock().unwrap().extend_from_slice(bytes);
    }

    fn input_ready(&self) {}
}

impl DebugExitEvents for Said {
    fn debug_exit(&self, value: u32) {
        *self.exit.lock().unwrap() = Some(value);
    }
}

struct Machine {
    ports: Bus,
    vcpu: Box<dyn Vcpu>,
    said: Arc<Said>,
    pit: Arc<Pit>,
    pic: Arc<Pic>,
    serial: Arc<Serial>,
    memory: Memory,
}

impl Machine {
    fn new() -> Self {
        let memory = Memory::new(16 << 20).unwrap();
        let vm = SoftVm::new(&memory, &X86_64_V1, 1);
        let (ports, said, pic) = (Bus::new(), Arc::<Said>::default(), Pic::new());
        let ioapic = IoApic::new(vm.msi_sink());
        pic.connect(vm.connect_controller(pic.clone()).unwrap());
        let fork = |pin, line| Arc::new(Fork([ioapic.pin(pin), pic.line(line)]));
        let pit = Pit::new(fork(layout::TIMER_PIN, 0)).unwrap();
        let serial = Serial::new(fork(layout::SERIAL_IRQ, 4), said.clone());
        pic.attach(&ports).unwrap();
        pit.attach(&ports).unwrap();
        serial.attach(&ports).unwrap();
        DebugExit::new(said.clone())
            .attach(&ports, 0xf4, 4)
            .unwrap();
        Self {
            ports,
            vcpu: vm.create_vcpu(VcpuId(0)).unwrap(),
            said,
            pit,
            pic,
            serial,
            memory,
        }
    }

    fn boot(&mut self, command_line: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let module = Module {
            path: file("one", b"abc"),
            arguments: "x=1".into(),
        };
        let kernel = file("program", &dunlin_guest_baremetal::elf());
        let entry = dunlin_boot::load(&LoadContext {
            memory: &self.memory,
            kernel: &kernel,
            initrd: None,
            modules: &[module],
            command_line,
            rsdp: GuestAddress(0),
        });
        let mut state = self.vcpu.save().unwrap();
        enter(&mut state, entry.unwrap());
        self.vcpu.restore(&state).unwrap();
        for component in self.components() {
            component.resume();
        }
        folder.path().display().to_string()
    }

    fn components(&self) -> [&dyn Component; 3] {
        [&*self.serial, &*self.pit, &*self.pic]
    }

    /// Runs until the program has exited, or has printed `until`.
    fn run(&mut self, until: Option<&str>) -> Option<u32> {
        let handle = self.vcpu.handle();
        let (alive, ended) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            if ended.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                handle.kick();
            }
        });
        loop {
            match self.vcpu.run().unwrap() {
                Exit::PortRead { port, data } => drop(self.ports.read(port.into(), data)),
                Exit::PortWrite { port, data } => drop(self.ports.write(port.into(), data)),
                Exit::EndOfInterrupt { .. } => {}
                other => panic!("unexpected {other:?}"),
            }
            let exit = *self.said.exit.lock().unwrap();
            if exit.is_some() || until.is_some_and(|text| self.text().ends_with(text)) {
                drop(alive);
                return exit;
            }
        }
    }

    fn text(&self) -> String {
        String::from_utf8(self.said.text.lock().unwrap().clone()).unwrap()
    }
}

/// As the machine starts a program, in virtual wire mode.
fn enter(state: &mut CpuState, entry: EntryState) {
    let flat = |access| Segment {
        selector: 8,
        base: 0,
        limit: u32::MAX,
        access,
        unusable: false,
    };
    state.rip = entry.entry.into();
    state.gpr[gpr::RAX] = entry.magic.into();
    state.gpr[gpr::RBX] = entry.start_info.into();
    state.rflags = 2;
    state.cr0 = 0x11;
    state.segments[segment::CS] = flat(0xc09b);
    for data in [segment::DS, segment::ES, segment::SS] {
        state.segments[data] = flat(0xc093);
    }
    for (register, value) in [(0xf0, 0x1ffu32), (0x350, 0x700)] {
        state.apic.registers[register..register + 4].copy_from_slice(&value.to_le_bytes());
    }
}

const LAST_LINES: &str = "ticks 0000000a 00000001\noutput 00000000\n\
                          serial interrupts 00000001\nend\n";

#[test]
fn the_program_prints_what_it_was_told_and_exits() {
    let mut machine = Machine::new();
    let folder = machine.boot("a b");
    let exit = machine.run(None).unwrap();
    let status = debug_exit::exit_status(exit);
    assert_eq!(i32::from(status), dunlin_guest_baremetal::EXIT_STATUS);
    let expected = format!(
        "magic 2badb002\n\
         command line {folder}/program a b\n\
         module 00000003 00000126 {folder}/one x=1\n\
         memory 00000280 00003c00\n\
         map 0000000000000000 00000000000a0000 00000001\n\
         map 00000000000a0000 0000000000040000 00000002\n\
         map 00000000000e0000 0000000000020000 00000003\n\
         map 0000000000100000 0000000000f00000 00000001\n\
         map 00000000e0000000 0000000010000000 00000002\n\
         {LAST_LINES}"
    );
    assert_eq!(machine.text(), expected);
}

#[test]
fn a_program_that_counts_ticks_goes_on_after_a_move() {
    let mut machine = Machine::new();
    machine.boot("a b");
    // In the middle of the line about ticks and behind it, the devices are at work.
    for until in ["ticks ", "output "] {
        assert_eq!(machine.run(Some(until)), None);
        let mut other = Machine::new();
        machine.vcpu.quiesce().unwrap();
        let state = machine.vcpu.save().unwrap();
        for component in machine.components() {
            component.pause(Reach::AnyHost);
        }
        other.vcpu.restore(&state).unwrap();
        for (to, from) in other.components().into_iter().zip(machine.components()) {
            to.restore(&from.save()).unwrap();
        }
        let mut page = [0; 4096];
        for index in (0..machine.memory.pages()).map(dunlin_guest::PageIndex) {
            assert!(machine.memory.read_page(index, &mut page));
            assert!(other.memory.write_page(index, &page));
        }
        for component in other.components() {
            component.resume();
        }
        let text = machine.text().into_bytes();
        *other.said.text.lock().unwrap() = text;
        machine = other;
    }
    assert_eq!(machine.run(None), Some(0x10));
    assert!(machine.text().ends_with(LAST_LINES), "{}", machine.text());
}
