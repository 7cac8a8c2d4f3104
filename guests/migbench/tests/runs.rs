//! The guest runs on every machine at hand, notices what is lost, and goes on after a change of engine.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail like the test"
)]

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dunlin_boot::{EntryState, LoadContext};
use dunlin_guest::{Memory, PageIndex};
use dunlin_guest_migbench::{Event, Fill, Listener, PORT, Parameters, StreamError, Wait, elf};
use dunlin_hypervisor::kvm::KvmVm;
use dunlin_hypervisor::soft::SoftVm;
use dunlin_hypervisor::{Engine, Exit, Vcpu, VcpuId, Vm};
use dunlin_x86::cpuid::{Baseline, X86_64_V1, X86_64_V2};
use dunlin_x86::state::{CpuState, Segment, gpr, segment};

const MEMORY: u64 = 16 << 20;
/// First page of the working set.
const FIRST: PageIndex = PageIndex(0x200);
/// A guest that has not done by then what a test waits for hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// The engines that this host offers, and the strongest baseline that all of them give. What is
/// missing is said.
fn engines() -> (Vec<Engine>, &'static Baseline) {
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

fn parameters() -> Parameters {
    Parameters {
        fill_mebibytes: Some(4),
        working_set_mebibytes: 1,
        rate_mebibytes: 8,
        scrub_pages: 8,
        ..Parameters::default()
    }
}

struct Machine {
    memory: Memory,
    vcpu: Box<dyn Vcpu>,
    _vm: Box<dyn Vm>,
    listener: Listener,
}

impl Machine {
    fn new(engine: Engine) -> Self {
        let memory = Memory::new(MEMORY).unwrap();
        let baseline = engines().1;
        let vm: Box<dyn Vm> = match engine {
            Engine::Soft => Box::new(SoftVm::new(&memory, baseline, 1)),
            Engine::Kvm => Box::new(KvmVm::new(&memory, baseline, 1).unwrap()),
        };
        Self {
            vcpu: vm.create_vcpu(VcpuId(0)).unwrap(),
            _vm: vm,
            memory,
            listener: Listener::new(),
        }
    }

    fn booted(engine: Engine, parameters: Parameters) -> Self {
        let mut machine = Self::new(engine);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), elf()).unwrap();
        let entry = dunlin_boot::load(&LoadContext {
            memory: &machine.memory,
            kernel: file.path(),
            initrd: None,
            modules: &[],
            command_line: &parameters.to_string(),
            rsdp: dunlin_guest::GuestAddress(0),
        })
        .unwrap();
        let mut state = machine.vcpu.save().unwrap();
        enter(&mut state, entry);
        machine.vcpu.restore(&state).unwrap();
        machine
    }

    /// Runs until the guest says something.
    fn next(&mut self) -> Result<Event, StreamError> {
        let end = Instant::now() + LIMIT;
        loop {
            assert!(Instant::now() < end, "the guest says nothing");
            match self.vcpu.run().unwrap() {
                Exit::PortWrite { port: PORT, data } => {
                    if let Some(event) = self.listener.byte(data[0])? {
                        return Ok(event);
                    }
                }
                Exit::PortRead { data, .. } | Exit::MmioRead { data, .. } => data.fill(0xff),
                Exit::Shutdown => panic!("the guest ran into a triple fault"),
                _ => {}
            }
        }
    }

    /// Runs until all memory has been checked so often.
    fn until_scrubbed(&mut self, wanted: u64) -> Result<(), StreamError> {
        loop {
            if let Event::Scrubbed { passes } = self.next()?
                && passes >= wanted
            {
                return Ok(());
            }
        }
    }

    /// Moves to a fresh machine of another engine.
    fn moved(mut self, engine: Engine) -> Self {
        let mut other = Self::new(engine);
        self.vcpu.quiesce().unwrap();
        other.vcpu.restore(&self.vcpu.save().unwrap()).unwrap();
        let mut page = [0; 4096];
        for index in (0..self.memory.pages()).map(PageIndex) {
            assert!(self.memory.read_page(index, &mut page));
            assert!(other.memory.write_page(index, &page));
        }
        other.listener = self.listener;
        other
    }
}

fn enter(state: &mut CpuState, entry: EntryState) {
    let flat = |selector, access| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
        unusable: false,
    };
    state.rip = u64::from(entry.entry);
    state.gpr[gpr::RBX] = u64::from(entry.start_info);
    state.rflags = 2;
    state.cr0 = 0x11;
    state.segments[segment::CS] = flat(0x10, 0xc09b);
    for data in [segment::DS, segment::ES, segment::SS] {
        state.segments[data] = flat(0x18, 0xc093);
    }
}

#[test]
fn it_fills_ticks_writes_and_finds_its_memory_whole() {
    for engine in engines().0 {
        for fill in [Fill::Zero, Fill::Random, Fill::Compressible] {
            for wait in [Wait::Halt, Wait::Spin] {
                let parameters = Parameters {
                    fill,
                    wait,
                    ..parameters()
                };
                let mut machine = Machine::booted(engine, parameters);
                let Event::Ready { pages, .. } = machine.next().unwrap() else {
                    panic!("the first event is that memory is filled");
                };
                assert_eq!(pages, 1024);
                machine.until_scrubbed(2).unwrap();
                assert!(machine.listener.ticks() >= 2 * 1024 / 8, "{engine:?}");
            }
        }
    }
}

#[test]
fn all_pages_of_the_working_set_are_written() {
    for engine in engines().0 {
        let mut machine = Machine::booted(engine, parameters());
        let mut written = 0;
        // Two passes, so that each write of the second finds those of the first.
        while written < 2 * 256 {
            if let Event::Count { writes, .. } = machine.next().unwrap() {
                written = writes;
            }
        }
        let mut page = [0; 4096];
        for index in 0..256 {
            assert!(
                machine
                    .memory
                    .read_page(PageIndex(FIRST.0 + index), &mut page)
            );
            let number = u64::from_le_bytes(page[..8].try_into().unwrap());
            assert!(number >= 256, "{engine:?}: page {index} has {number}");
        }
    }
}

#[test]
fn a_lost_write_and_a_changed_page_are_noticed() {
    // In the working set the first bytes count, elsewhere all.
    for (page, at) in [(FIRST, 0), (PageIndex(FIRST.0 + 700), 1234)] {
        let mut machine = Machine::booted(Engine::Soft, parameters());
        machine.until_scrubbed(1).unwrap();
        let mut content = [0; 4096];
        assert!(machine.memory.read_page(page, &mut content));
        content[at] ^= 1;
        assert!(machine.memory.write_page(page, &content));
        let noticed = machine.until_scrubbed(4);
        assert!(
            matches!(noticed, Err(StreamError::Wrong { page: found, .. }) if found == page.0),
            "{noticed:?}"
        );
    }
}

#[test]
fn it_goes_on_under_another_engine() {
    for from in engines().0 {
        for to in engines().0 {
            let mut machine = Machine::booted(from, parameters());
            machine.until_scrubbed(1).unwrap();
            for _ in 0..3 {
                machine = machine.moved(to);
                for _ in 0..200 {
                    machine.next().unwrap();
                }
                machine = machine.moved(from);
                for _ in 0..200 {
                    machine.next().unwrap();
                }
            }
            machine.until_scrubbed(4).unwrap();
        }
    }
}

#[test]
fn it_runs_in_another_machine() {
    let program = "qemu-system-x86_64";
    let folder = tempfile::tempdir().unwrap();
    let (kernel, socket) = (folder.path().join("elf"), folder.path().join("port"));
    std::fs::write(&kernel, elf()).unwrap();
    let door = UnixListener::bind(&socket).unwrap();
    let child = Command::new(program)
        .args(["-accel", "tcg", "-machine", "q35", "-m", "64"])
        .args(["-nodefaults", "-no-reboot", "-display", "none"])
        .arg("-kernel")
        .arg(&kernel)
        .args(["-append", &parameters().to_string()])
        .args([
            "-chardev",
            &format!("socket,id=port,path={}", socket.display()),
        ])
        .args(["-device", "isa-debugcon,iobase=0xe9,chardev=port"])
        .stdin(Stdio::null())
        .spawn();
    let Ok(mut child) = child else {
        eprintln!("SKIP: {program} is not installed");
        return;
    };
    let (mut stream, _) = door.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut listener = Listener::new();
    let scrubbed = loop {
        let mut byte = [0];
        if let Err(error) = stream.read_exact(&mut byte) {
            break Err(error.to_string());
        }
        match listener.byte(byte[0]) {
            Ok(Some(Event::Scrubbed { passes: 2 })) => break Ok(()),
            Ok(_) => {}
            Err(error) => break Err(error.to_string()),
        }
    };
    child.kill().unwrap();
    child.wait().unwrap();
    scrubbed.unwrap();
}
