//! The loop with a scripted processor.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use dunlin_devices::bus::BusDevice;
use dunlin_guest::{Msi, MsiSink};

use super::*;

/// What the scripted processor does at each `run`.
#[derive(Debug, Clone, Copy)]
enum Step {
    Out(u16, u8),
    In(u16),
    EndOfInterrupt(u8),
    Fail,
    Panic,
    /// Waits to be kicked, as a halted processor does.
    Halt,
    /// Computes until it is kicked.
    Compute,
}

#[derive(Debug, Default)]
struct Kick {
    pending: Mutex<bool>,
    changed: Condvar,
}

impl VcpuHandle for Kick {
    fn kick(&self) {
        *self.pending.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

#[derive(Debug)]
struct Scripted {
    steps: Vec<Step>,
    next: usize,
    data: [u8; 1],
    kick: Arc<Kick>,
    state: CpuState,
    /// Hears at each kick amid computing what processor time was used.
    computed: Sender<Duration>,
}

impl Vcpu for Scripted {
    fn run(&mut self) -> Result<Exit<'_>, EngineError> {
        let step = self.steps.get(self.next).copied().unwrap_or(Step::Halt);
        let mut pending = self.kick.pending.lock().unwrap();
        if matches!(step, Step::Compute) {
            while !*pending {
                drop(pending);
                (0..1000).for_each(|_| std::hint::spin_loop());
                pending = self.kick.pending.lock().unwrap();
            }
            let _unheard = self.computed.send(throttle::used());
        }
        if matches!(step, Step::Halt) {
            while !*pending {
                pending = self.kick.changed.wait(pending).unwrap();
            }
        }
        if std::mem::take(&mut *pending) {
            return Ok(Exit::Kicked);
        }
        drop(pending);
        self.next += 1;
        Ok(match step {
            Step::Out(port, byte) => {
                self.data = [byte];
                Exit::PortWrite {
                    port,
                    data: &self.data,
                }
            }
            Step::In(port) => Exit::PortRead {
                port,
                data: &mut self.data,
            },
            Step::EndOfInterrupt(vector) => Exit::EndOfInterrupt { vector },
            Step::Fail => {
                return Err(EngineError::Stuck {
                    vcpu: 0,
                    reason: "scripted".into(),
                });
            }
            Step::Panic => panic!("scripted"),
            Step::Halt | Step::Compute => Exit::Kicked,
        })
    }

    fn quiesce(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.kick.clone()
    }

    fn save(&mut self) -> Result<CpuState, EngineError> {
        let mut state = self.state.clone();
        state.gpr[0] = u64::from(self.data[0]);
        Ok(state)
    }

    fn restore(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.state = state.clone();
        Ok(())
    }

    fn exit_counts(&self) -> VcpuExitCounts {
        VcpuExitCounts {
            instructions: self.next as u64,
            ..VcpuExitCounts::default()
        }
    }
}

#[derive(Debug)]
struct NoSink;

impl MsiSink for NoSink {
    fn signal(&self, _msi: Msi) {}
}

/// A device that tells what was written to it and answers 7.
#[derive(Debug)]
struct Recorder(Mutex<Sender<u8>>);

impl BusDevice for Recorder {
    fn label(&self) -> String {
        "recorder".into()
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(7);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        self.0.lock().unwrap().send(data[0]).unwrap();
    }
}

struct Bench {
    vcpu: VcpuThread,
    written: Receiver<u8>,
    events: Receiver<MachineEvent>,
    machine: MachineEvents,
    computed: Receiver<Duration>,
}

const LIMIT: Duration = Duration::from_secs(20);

fn bench(steps: &[Step]) -> Bench {
    let (sender, events) = mpsc::channel();
    let sender = Mutex::new(sender);
    let machine = MachineEvents::new(move |event| {
        let _gone = sender.lock().unwrap().send(event);
    });
    let (sender, written) = mpsc::channel();
    let ports = Bus::new();
    ports
        .insert(0x10, 1, Arc::new(Recorder(Mutex::new(sender))))
        .unwrap();
    let buses = Buses {
        ports,
        mmio: Bus::new(),
        ioapic: IoApic::new(Arc::new(NoSink)),
    };
    let (sender, computed) = mpsc::channel();
    let vcpu = Scripted {
        steps: steps.to_vec(),
        next: 0,
        data: [0],
        kick: Arc::default(),
        state: CpuState::default(),
        computed: sender,
    };
    let vcpu = VcpuThread::start(
        VcpuId(0),
        Box::new(vcpu),
        buses,
        machine.clone(),
        Arc::default(),
    )
    .unwrap();
    Bench {
        vcpu,
        written,
        events,
        machine,
        computed,
    }
}

#[test]
fn a_vcpu_is_born_parked_and_answers_while_parked() {
    let bench = bench(&[Step::Out(0x10, 1)]);
    assert_eq!(bench.vcpu.counts().unwrap().0.instructions, 0);
    bench.vcpu.begin_pause().unwrap().wait().unwrap();
    assert!(bench.written.try_recv().is_err());
}

#[test]
fn exits_reach_the_buses_and_answers_reach_the_processor() {
    let bench = bench(&[
        Step::Out(0x10, 5),
        Step::EndOfInterrupt(0x30),
        Step::In(0x10),
        Step::Out(0x10, 6),
        Step::In(0x10),
    ]);
    bench.vcpu.run().unwrap();
    assert_eq!(bench.written.recv_timeout(LIMIT), Ok(5));
    assert_eq!(bench.written.recv_timeout(LIMIT), Ok(6));
    bench.vcpu.begin_pause().unwrap().wait().unwrap();
    let (counts, ends) = bench.vcpu.counts().unwrap();
    assert_eq!(ends, 1);
    if counts.instructions == 5 {
        assert_eq!(bench.vcpu.save().unwrap().gpr[0], 7);
    }
}

#[test]
fn a_paused_vcpu_goes_on_where_it_was() {
    let bench = bench(&[Step::Out(0x10, 1), Step::Halt]);
    bench.vcpu.run().unwrap();
    assert_eq!(bench.written.recv_timeout(LIMIT), Ok(1));
    bench.vcpu.begin_pause().unwrap().wait().unwrap();
    bench.vcpu.begin_pause().unwrap().wait().unwrap();
    bench.vcpu.run().unwrap();
    bench.vcpu.begin_pause().unwrap().wait().unwrap();
    assert!(bench.written.try_recv().is_err());
}

#[test]
fn a_failed_engine_and_a_panic_are_told() {
    let failing = bench(&[Step::Fail]);
    failing.vcpu.run().unwrap();
    let event = failing.events.recv_timeout(LIMIT).unwrap();
    assert!(matches!(event, MachineEvent::EngineFailed(_)), "{event:?}");
    // Its thread lives and can still be asked.
    failing.vcpu.save().unwrap();

    let panicking = bench(&[Step::Panic]);
    panicking.vcpu.run().unwrap();
    let event = panicking.events.recv_timeout(LIMIT).unwrap();
    assert!(
        matches!(event, MachineEvent::ThreadLost(VcpuId(0))),
        "{event:?}"
    );
    assert!(panicking.vcpu.save().is_err());
}

#[test]
fn after_a_request_to_end_no_further_step_is_made() {
    let bench = bench(&[Step::Out(0x10, 1), Step::Out(0x10, 2)]);
    bench.machine.send(MachineEvent::PowerOff);
    bench.vcpu.run().unwrap();
    assert_eq!(bench.written.recv_timeout(LIMIT), Ok(1));
    bench.vcpu.begin_pause().unwrap().wait().unwrap();
    assert!(bench.written.try_recv().is_err());
}

#[test]
fn a_throttled_processor_uses_no_more_than_its_share() {
    let bench = bench(&[Step::Compute]);
    bench.vcpu.throttle(SleepShare::percent(80)).unwrap();
    bench.vcpu.run().unwrap();
    let first = bench.computed.recv_timeout(LIMIT).unwrap();
    let begun = Instant::now();
    let mut last = first;
    for _ in 0..40 {
        last = bench.computed.recv_timeout(LIMIT).unwrap();
    }
    let used = last - first;
    // A busy host takes time from it, but gives none.
    let share = used.as_secs_f64() / begun.elapsed().as_secs_f64();
    assert!(share < 0.4, "{share}");
    assert_eq!(bench.vcpu.sleep_share().as_percent(), 80);
}

#[test]
fn a_sleeping_processor_obeys_at_once_and_runs_freely_afterwards() {
    let bench = bench(&[Step::Compute]);
    bench.vcpu.throttle(SleepShare::percent(99)).unwrap();
    bench.vcpu.run().unwrap();
    for _ in 0..5 {
        bench.computed.recv_timeout(LIMIT).unwrap();
        bench.vcpu.begin_pause().unwrap().wait().unwrap();
        bench.vcpu.save().unwrap();
        bench.vcpu.run().unwrap();
    }
    bench.vcpu.throttle(SleepShare::default()).unwrap();
    bench.vcpu.begin_pause().unwrap().wait().unwrap();
    while bench.computed.try_recv().is_ok() {}
    bench.vcpu.run().unwrap();
    // Only the command's own kick, and one that the pacer may have sent before, are left.
    bench.vcpu.begin_pause().unwrap().wait().unwrap();
    assert!(bench.computed.try_iter().count() <= 3);
}
