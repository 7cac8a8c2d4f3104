//! A vCPU's thread: the one loop that runs a processor, for every engine.
//!
//! ```text
//!            Run                       Pause, or the machine must stop
//!   Parked ───────► Running ─► run() ──────────────────────────────► Parked
//!     │                ▲          │ exit: buses, I/O APIC
//!     └ save, restore  └──────────┘ kicked: commands, and perhaps a sleep
//! ```
//!
//! The thread owns its vCPU. Others send it a [`Command`] and kick it; it answers each.
//! [`throttle`] says when it sleeps.

mod ledger;
mod throttle;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Instant;

use dunlin_api::profile::DeviceTime;
use dunlin_devices::bus::Bus;
use dunlin_devices::ioapic::IoApic;
use dunlin_hypervisor::{
    EngineError, Exit, Sampled, Vcpu, VcpuExitCounts, VcpuHandle, VcpuId, VcpuProfile,
};
use dunlin_x86::state::CpuState;

use super::events::{MachineEvent, MachineEvents};
use ledger::{Access, Ledger};
use throttle::{Pace, Rhythm};
pub(crate) use throttle::{Pacer, SleepShare, shares};

/// What a vCPU's thread is asked to do. Every command is answered, or the thread is gone.
enum Command {
    Run,
    Pause(Sender<Result<(), EngineError>>),
    Save(Sender<Result<CpuState, EngineError>>),
    Restore(Box<CpuState>, Sender<Result<(), EngineError>>),
    Counts(Sender<VcpuExitCounts>),
    Throttle(SleepShare),
    BeginProfile(Sender<Result<Option<Arc<dyn Sampled>>, EngineError>>),
    CollectProfile,
    EndProfile(Sender<VcpuAccount>),
    End,
}

/// What a vCPU did while a profile was taken: its devices, and what its engine knows.
pub(crate) type VcpuAccount = (Vec<DeviceTime>, Option<VcpuProfile>);

/// Where a vCPU's accesses go.
#[derive(Debug, Clone)]
pub(crate) struct Buses {
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
    pub(crate) ioapic: Arc<IoApic>,
}

/// Why a vCPU could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The engine failed.
    #[error("processor {id} failed")]
    Engine {
        /// Which processor.
        id: u32,
        /// The engine's word.
        #[source]
        source: EngineError,
    },
    /// The host gave no thread.
    #[error("failed to start a thread for processor {id}")]
    Thread {
        /// Which processor.
        id: u32,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The host gave no thread for samples.
    #[error("failed to start a thread that samples processors")]
    Sampler {
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// Its thread has ended.
    #[error("the thread of processor {id} has ended")]
    Gone {
        /// Which processor.
        id: u32,
    },
}

/// A vCPU's thread, seen from outside.
#[derive(Debug)]
pub(crate) struct VcpuThread {
    id: VcpuId,
    commands: Sender<Command>,
    handle: Arc<dyn VcpuHandle>,
    end_of_interrupts: Arc<AtomicU64>,
    /// Percent of its time that it was last asked to sleep.
    sleep_share: AtomicU8,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Run => "Run",
            Self::Pause(_) => "Pause",
            Self::Save(_) => "Save",
            Self::Restore(..) => "Restore",
            Self::Counts(_) => "Counts",
            Self::Throttle(_) => "Throttle",
            Self::BeginProfile(_) => "BeginProfile",
            Self::CollectProfile => "CollectProfile",
            Self::EndProfile(_) => "EndProfile",
            Self::End => "End",
        })
    }
}

impl VcpuThread {
    /// Starts a thread for `vcpu`, parked.
    pub(crate) fn start(
        id: VcpuId,
        vcpu: Box<dyn Vcpu>,
        buses: Buses,
        events: MachineEvents,
        pacer: Arc<Pacer>,
    ) -> Result<Self, VcpuError> {
        let (commands, receiver) = mpsc::channel();
        let handle = vcpu.handle();
        let end_of_interrupts = Arc::new(AtomicU64::new(0));
        let runner = Runner {
            id,
            vcpu,
            buses,
            events,
            commands: receiver,
            end_of_interrupts: Arc::clone(&end_of_interrupts),
            handle: Arc::clone(&handle),
            pacer,
            rhythm: Rhythm::default(),
            ledger: Ledger::default(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", id.0))
            .spawn(move || runner.run())
            .map_err(|source| VcpuError::Thread { id: id.0, source })?;
        Ok(Self {
            id,
            commands,
            handle,
            end_of_interrupts,
            sleep_share: AtomicU8::new(0),
            thread: Some(thread),
        })
    }

    fn gone(&self) -> VcpuError {
        VcpuError::Gone { id: self.id.0 }
    }

    fn send(&self, command: Command) -> Result<(), VcpuError> {
        let sent = self.commands.send(command);
        self.handle.kick();
        sent.map_err(|_gone| self.gone())
    }

    fn answer<T>(&self, receiver: &Receiver<Result<T, EngineError>>) -> Result<T, VcpuError> {
        let answer = receiver.recv().map_err(|_gone| self.gone())?;
        answer.map_err(|source| VcpuError::Engine {
            id: self.id.0,
            source,
        })
    }

    /// Lets the guest run.
    pub(crate) fn run(&self) -> Result<(), VcpuError> {
        self.send(Command::Run)
    }

    /// Asks the thread to park; the answer comes through [`PauseTicket::wait`].
    pub(crate) fn begin_pause(&self) -> Result<PauseTicket<'_>, VcpuError> {
        let (sender, receiver) = mpsc::channel();
        self.send(Command::Pause(sender))?;
        Ok(PauseTicket {
            vcpu: self,
            receiver,
        })
    }

    /// The architectural state, of a parked vCPU.
    pub(crate) fn save(&self) -> Result<CpuState, VcpuError> {
        let (sender, receiver) = mpsc::channel();
        self.send(Command::Save(sender))?;
        self.answer(&receiver)
    }

    /// Replaces the architectural state of a parked vCPU.
    pub(crate) fn restore(&self, state: CpuState) -> Result<(), VcpuError> {
        let (sender, receiver) = mpsc::channel();
        self.send(Command::Restore(Box::new(state), sender))?;
        self.answer(&receiver)
    }

    /// Makes it sleep for a share of its time from now on.
    pub(crate) fn throttle(&self, share: SleepShare) -> Result<(), VcpuError> {
        let percent = share.as_percent();
        if self.sleep_share.swap(percent, Ordering::Relaxed) == percent {
            return Ok(());
        }
        self.send(Command::Throttle(share))
    }

    /// The share of its time that it sleeps.
    pub(crate) fn sleep_share(&self) -> SleepShare {
        SleepShare::percent(self.sleep_share.load(Ordering::Relaxed))
    }

    /// Exits by kind, and the ends of level-triggered interrupts.
    pub(crate) fn counts(&self) -> Result<(VcpuExitCounts, u64), VcpuError> {
        let (sender, receiver) = mpsc::channel();
        self.send(Command::Counts(sender))?;
        let counts = receiver.recv().map_err(|_gone| self.gone())?;
        Ok((counts, self.end_of_interrupts.load(Ordering::Relaxed)))
    }

    /// Begins a profile; what has it sampled, if its engine can.
    pub(crate) fn begin_profile(&self) -> Result<Option<Arc<dyn Sampled>>, VcpuError> {
        let (sender, receiver) = mpsc::channel();
        self.send(Command::BeginProfile(sender))?;
        self.answer(&receiver)
    }

    /// Makes room for more samples.
    pub(crate) fn collect_profile(&self) -> Result<(), VcpuError> {
        self.send(Command::CollectProfile)
    }

    /// Ends a profile.
    pub(crate) fn end_profile(&self) -> Result<VcpuAccount, VcpuError> {
        let (sender, receiver) = mpsc::channel();
        self.send(Command::EndProfile(sender))?;
        receiver.recv().map_err(|_gone| self.gone())
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        let _already_ended = self.send(Command::End);
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _panicked = thread.join();
        }
    }
}

/// A pause that was asked for.
#[must_use]
pub(crate) struct PauseTicket<'a> {
    vcpu: &'a VcpuThread,
    receiver: Receiver<Result<(), EngineError>>,
}

impl PauseTicket<'_> {
    /// Waits until the vCPU is parked between two instructions.
    pub(crate) fn wait(self) -> Result<(), VcpuError> {
        self.vcpu.answer(&self.receiver)
    }
}

/// What runs on the thread.
struct Runner {
    id: VcpuId,
    vcpu: Box<dyn Vcpu>,
    buses: Buses,
    events: MachineEvents,
    commands: Receiver<Command>,
    end_of_interrupts: Arc<AtomicU64>,
    /// Its own, for the pacer.
    handle: Arc<dyn VcpuHandle>,
    pacer: Arc<Pacer>,
    rhythm: Rhythm,
    ledger: Ledger,
}

/// What the loop does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Parked,
    Running,
    Ended,
}

impl Runner {
    fn run(mut self) {
        let alive = Alive {
            id: self.id,
            events: self.events.clone(),
            ended: AtomicBool::new(false),
        };
        let mut mode = Mode::Parked;
        while mode != Mode::Ended {
            mode = match mode {
                Mode::Running => self.step(),
                _ => match self.commands.recv() {
                    Ok(command) => self.obey(command, mode),
                    Err(mpsc::RecvError) => Mode::Ended,
                },
            };
        }
        alive.ended.store(true, Ordering::Relaxed);
    }

    /// Runs the guest until its next exit, and handles that.
    fn step(&mut self) -> Mode {
        match self.vcpu.run() {
            Ok(Exit::PortRead { port, data }) => {
                let begun = self.ledger.begin();
                self.buses.ports.read(u64::from(port), data);
                self.ledger.end(begun, Access::PortRead, port.into());
            }
            Ok(Exit::PortWrite { port, data }) => {
                let begun = self.ledger.begin();
                self.buses.ports.write(u64::from(port), data);
                self.ledger.end(begun, Access::PortWrite, port.into());
                // A guest that switched itself off must not execute what follows.
                if self.events.machine_must_stop() {
                    return Mode::Parked;
                }
            }
            Ok(Exit::MmioRead { address, data }) => {
                let begun = self.ledger.begin();
                self.buses.mmio.read(address, data);
                self.ledger.end(begun, Access::MmioRead, address);
            }
            Ok(Exit::MmioWrite { address, data }) => {
                let begun = self.ledger.begin();
                self.buses.mmio.write(address, data);
                self.ledger.end(begun, Access::MmioWrite, address);
            }
            Ok(Exit::EndOfInterrupt { vector }) => {
                self.end_of_interrupts.fetch_add(1, Ordering::Relaxed);
                self.buses.ioapic.end_of_interrupt(vector);
            }
            Ok(Exit::Kicked) => {
                return match self.obey_waiting() {
                    Mode::Running => self.keep_pace(),
                    mode => mode,
                };
            }
            Ok(Exit::Shutdown) => {
                self.events.send(MachineEvent::TripleFault);
                return Mode::Parked;
            }
            Err(error) => {
                self.events.send(MachineEvent::EngineFailed(error));
                return Mode::Parked;
            }
        }
        Mode::Running
    }

    fn obey_waiting(&mut self) -> Mode {
        let mut mode = Mode::Running;
        while mode != Mode::Ended {
            match self.commands.try_recv() {
                Ok(command) => mode = self.obey(command, mode),
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => mode = Mode::Ended,
            }
        }
        mode
    }

    /// Sleeps when it has run for as long as it may; between two instructions, with no lock held.
    fn keep_pace(&mut self) -> Mode {
        let Pace::Sleep(time) = self.rhythm.pace(throttle::used()) else {
            self.set_pacer();
            return Mode::Running;
        };
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let mode = match self.commands.recv_timeout(left) {
                Ok(command @ Command::Throttle(_)) => {
                    self.obey(command, Mode::Running);
                    break;
                }
                Ok(command) => self.obey(command, Mode::Running),
                Err(mpsc::RecvTimeoutError::Timeout) => break,
                Err(mpsc::RecvTimeoutError::Disconnected) => Mode::Ended,
            };
            if mode != Mode::Running {
                return mode;
            }
        }
        self.rhythm.woke(throttle::used());
        self.set_pacer();
        Mode::Running
    }

    /// Has itself kicked when its slice is used.
    fn set_pacer(&self) {
        if let Pace::Run(time) = self.rhythm.pace(throttle::used()) {
            self.pacer.kick_after(time, &self.handle);
        }
    }

    /// Whoever asked may have stopped waiting: an answer that nobody takes is dropped.
    fn obey(&mut self, command: Command, mode: Mode) -> Mode {
        match command {
            Command::Run => {
                self.rhythm.woke(throttle::used());
                self.set_pacer();
                return Mode::Running;
            }
            Command::Throttle(share) => {
                self.rhythm.set(share, throttle::used());
                if mode == Mode::Running {
                    self.set_pacer();
                }
            }
            Command::End => return Mode::Ended,
            Command::Pause(answer) => {
                let _unheard = answer.send(self.vcpu.quiesce());
                return Mode::Parked;
            }
            Command::Save(answer) => {
                let _unheard = answer.send(self.vcpu.save());
            }
            Command::Restore(state, answer) => {
                let _unheard = answer.send(self.vcpu.restore(&state));
            }
            Command::Counts(answer) => {
                let _unheard = answer.send(self.vcpu.exit_counts());
            }
            Command::BeginProfile(answer) => {
                self.ledger.open();
                let _unheard = answer.send(self.vcpu.begin_profile());
            }
            Command::CollectProfile => self.vcpu.collect_profile(),
            Command::EndProfile(answer) => {
                let devices = self.ledger.close(&self.buses.ports, &self.buses.mmio);
                let _unheard = answer.send((devices, self.vcpu.end_profile()));
            }
        }
        mode
    }
}

/// Tells when the thread ends by a panic.
struct Alive {
    id: VcpuId,
    events: MachineEvents,
    ended: AtomicBool,
}

impl Drop for Alive {
    fn drop(&mut self) {
        if !self.ended.load(Ordering::Relaxed) {
            self.events.send(MachineEvent::ThreadLost(self.id));
        }
    }
}

#[cfg(test)]
mod tests;
