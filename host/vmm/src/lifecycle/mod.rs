//! One VM's life: a mailbox, a typed state, and the thread that owns the machine.
//!
//! ```text
//!   HTTP interface ──┐
//!   vCPU threads ────┤            ┌─► Phase (what is allowed when)
//!   a move's thread ─┼─► Mailbox ─┤
//!   signals, parent ─┘            └─► Machine (pause, resume, save, rebuild)
//! ```
//!
//! Only this thread touches the machine, so no two of these ever act at once. Every request is
//! answered. A move runs on a thread of its own and asks for the pause like everybody else.

mod handover;
mod profiling;
mod requests;
mod saving;
mod state;
mod survey;

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_api::error::chain;
use dunlin_api::handover::{HandOverReport, HandOverRequest};
use dunlin_api::migration::{MigrateRequest, MigrationStatus};
use dunlin_api::plan::MovePrediction;
use dunlin_api::profile::{ProfileReport, ProfileRequest};
use dunlin_api::snapshot::SaveRequest;
use dunlin_api::status::{ExitReport, VmStatus};
use dunlin_api::{ApiError, OnReboot, VmConfig};
use dunlin_devices::debug_exit;
use dunlin_guest::SavedState;
use dunlin_hypervisor::{EngineError, VcpuId};
use dunlin_migration::handover::Claimed;
use dunlin_migration::predict::Slice;
use dunlin_migration::{Following, Standing};
use tokio::sync::oneshot;

use crate::files::ProcessFiles;
use crate::interface::Doors;
use crate::machine::events::MachineEvent;
use crate::machine::{Blueprint, Machine, Profiling};
use crate::moving::{
    Faults, FromFile, HandOverEnd, MoveEnd, MoveMonitor, OpenQuestion, SaveEnd, SaveMonitor,
};
use requests::Look;
pub(crate) use state::{Phase, Transition};
use survey::{Survey, Way};

/// How long a process keeps the report of a guest that has moved away.
const LINGER: Duration = Duration::from_secs(60);

/// Where an answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// What the lifecycle is asked or told.
pub(crate) enum Message {
    /// What is the VM?
    Status(Reply<VmStatus>),
    /// What was asked for?
    Config(Reply<VmConfig>),
    /// Stop until resumed.
    Pause(Reply<VmStatus>),
    /// Go on.
    Resume(Reply<VmStatus>),
    /// End.
    Stop(Reply<VmStatus>),
    /// Save to a file.
    Save(SaveRequest, Reply<VmStatus>),
    /// Hand over to another process of this host; answered at the end.
    HandOver(HandOverRequest, Reply<HandOverReport>),
    /// A hand-over is over.
    HandOverEnded(Box<HandOverEnd>),
    /// Begin a move.
    Migrate(MigrateRequest, Reply<MigrationStatus>),
    /// Count exits and dirty pages from now on.
    BeginLook(Reply<()>),
    /// What was counted?
    EndLook(Reply<ExitReport>),
    /// Measure from now on what a move would take.
    BeginSurvey(Reply<()>),
    /// A slice of the measurement is over.
    Survey(Reply<Slice>),
    /// What would the move take?
    EndSurvey(MigrateRequest, Reply<MovePrediction>),
    /// Look where the processors' time goes from now on.
    BeginProfile(ProfileRequest, Reply<()>),
    /// Make room for more samples.
    CollectProfile(Reply<()>),
    /// Where did it go?
    EndProfile(Reply<ProfileReport>),
    /// A move asks.
    Move(MoveCall),
    /// A move is over.
    MoveEnded(Box<MoveEnd>),
    /// A save of the running guest is over.
    SaveEnded(Box<SaveEnd>),
    /// All pages of a guest are there that came before them, from a file or another host.
    PagesThere,
    /// Pages of such a guest cannot be had; whoever tells wants to know that it was heard.
    MemoryLost(ApiError, Sender<()>),
    /// The machine tells.
    Machine(MachineEvent),
    /// This process was told to end.
    End(&'static str),
}

/// What a move asks of the machine.
pub(crate) enum MoveCall {
    /// Stop for the hand-over.
    Suspend(Reply<()>),
    /// Stop for a moment: the guest stays in this process.
    Freeze(Reply<()>),
    /// Stop for another process of this host, and say the state of every component: one question,
    /// since each waits for a thread.
    Lend(Reply<Vec<SavedState>>),
    /// Go on: the hand-over is off.
    TakeBack(Reply<()>),
    /// The state of every component.
    Save(Reply<Vec<SavedState>>),
    /// Each processor sleeps for so many percent of its time.
    Throttle(Vec<u8>, Reply<()>),
}

/// Reaches the lifecycle from other threads.
#[derive(Debug, Clone)]
pub(crate) struct Mailbox(Sender<Message>);

impl Mailbox {
    /// A mailbox and its reading end.
    pub(crate) fn new() -> (Self, Receiver<Message>) {
        let (sender, receiver) = mpsc::channel();
        (Self(sender), receiver)
    }

    /// Sends; when the lifecycle is over, whoever waits for an answer learns it from the reply.
    pub(crate) fn send(&self, message: Message) {
        let _over = self.0.send(message);
    }
}

/// Why a VM ended.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The guest switched itself off.
    PowerOff,
    /// The guest wrote this to its debug exit port.
    DebugExit(u32),
    /// It rebooted, and was to end then.
    Rebooted,
    /// A user asked, or this process was told to end.
    Stopped(&'static str),
    /// It runs elsewhere.
    Moved,
    /// It runs in that process of this host.
    HandedOver(u32),
    /// It was handed to that process of this host, which died with it.
    DiedIn(u32),
    /// A processor met a triple fault.
    TripleFault,
    /// The engine failed.
    Engine(EngineError),
    /// A vCPU's thread panicked.
    ThreadLost(VcpuId),
    /// The reboot failed.
    Reboot(ApiError),
    /// Some of its memory cannot be had. Whatever touches that waits for ever.
    MemoryLost(ApiError),
}

impl Ending {
    /// Is it what somebody wanted?
    pub(crate) fn is_orderly(&self) -> bool {
        matches!(
            self,
            Self::PowerOff
                | Self::DebugExit(_)
                | Self::Rebooted
                | Self::Stopped(_)
                | Self::Moved
                | Self::HandedOver(_)
        )
    }

    /// The exit status that the guest chose, if it did.
    pub(crate) fn exit_status(&self) -> Option<u8> {
        match self {
            Self::DebugExit(value) => Some(debug_exit::exit_status(*value)),
            _ => None,
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::PowerOff => "the guest switched itself off".into(),
            Self::DebugExit(value) => {
                format!("the guest wrote {value:#x} to its debug exit port")
            }
            Self::Rebooted => "the guest rebooted".into(),
            Self::Stopped(why) => (*why).into(),
            Self::Moved => "the guest runs on another host".into(),
            Self::HandedOver(pid) => format!("handed over: the guest goes on in process {pid}"),
            Self::DiedIn(pid) => {
                format!("process {pid}, which had been given the guest, died with it")
            }
            Self::TripleFault => "a processor of the guest met a triple fault".into(),
            Self::Engine(error) => chain(error),
            Self::ThreadLost(id) => format!("the thread of processor {} failed", id.0),
            Self::Reboot(error) => format!("the guest could not be rebooted: {error}"),
            Self::MemoryLost(error) => format!("the guest's memory is lost: {error}"),
        }
    }
}

/// The owner of one machine.
pub(crate) struct Lifecycle {
    phase: Phase,
    machine: Machine,
    blueprint: Blueprint,
    inbox: Receiver<Message>,
    mailbox: Mailbox,
    monitor: Arc<MoveMonitor>,
    faults: Faults,
    // Behind the machine, whose parts may touch pages until they have ended.
    from_file: Option<FromFile>,
    /// The rest of the memory of a guest that came from another host before it.
    following: Option<Following>,
    moving: Option<JoinHandle<()>>,
    saves: Arc<SaveMonitor>,
    saving: Option<JoinHandle<()>>,
    look: Option<Look>,
    survey: Option<Survey>,
    profiling: Option<Profiling>,
    /// The way of the last move, which its report tells the goodput of.
    last_way: Option<Way>,
    since: Instant,
    ending: Option<Ending>,
    /// A guest in doubt: whom to ask.
    question: Option<OpenQuestion>,
    /// The guest asked for a reset while it was being moved.
    reset_pending: bool,
    /// When the process ends although nobody fetched the report.
    linger_until: Option<Instant>,
    /// Whoever asked for the hand-over that is under way.
    hand_over_asked: Option<Reply<HandOverReport>>,
    doors: Doors,
    files: Arc<ProcessFiles>,
}

/// What a lifecycle needs besides its machine.
pub(crate) struct Surroundings {
    pub(crate) blueprint: Blueprint,
    pub(crate) inbox: Receiver<Message>,
    /// Held shut while the guest may pass to another process.
    pub(crate) doors: Doors,
    pub(crate) files: Arc<ProcessFiles>,
    pub(crate) mailbox: Mailbox,
    pub(crate) monitor: Arc<MoveMonitor>,
    /// Serves faults of guest memory, or why it cannot.
    pub(crate) faults: Faults,
    pub(crate) saves: Arc<SaveMonitor>,
    /// How the guest came, when it came from a file.
    pub(crate) from_file: Option<FromFile>,
    /// The rest of its memory, when it came from another host before that.
    pub(crate) following: Option<Following>,
}

impl Lifecycle {
    /// The life of `machine`, which is in `phase`.
    pub(crate) fn new(machine: Machine, phase: Phase, surroundings: Surroundings) -> Self {
        let Surroundings {
            blueprint,
            inbox,
            doors,
            files,
            mailbox,
            monitor,
            faults,
            saves,
            from_file,
            following,
        } = surroundings;
        Self {
            phase,
            machine,
            blueprint,
            inbox,
            mailbox,
            monitor,
            faults,
            from_file,
            following,
            moving: None,
            saves,
            saving: None,
            look: None,
            survey: None,
            profiling: None,
            last_way: None,
            since: Instant::now(),
            ending: None,
            question: None,
            reset_pending: false,
            linger_until: None,
            hand_over_asked: None,
            doors,
            files,
        }
    }

    /// Lets the guest run for the first time here, after `idle` was spent waiting for a watcher.
    pub(crate) fn start(&mut self, idle: Duration) -> Result<(), ApiError> {
        let next = self.phase.after(Transition::Start)?;
        self.machine
            .resume()
            .map_err(|error| requests::host(&error))?;
        self.phase = next;
        if let Some(from_file) = &mut self.from_file {
            from_file.runs(idle);
        }
        Ok(())
    }

    /// Was the machine built but not started?
    pub(crate) fn needs_start(&self) -> bool {
        self.phase == Phase::Created
    }

    /// Serves the mailbox until the VM has ended.
    pub(crate) fn run(mut self) -> (Ending, VmStatus) {
        // While a move or a save runs its thread holds the guest's memory, and a move may have
        // given it away: nothing ends before it has said what came of it.
        while self.ending.is_none() || self.moving.is_some() || self.saving.is_some() {
            match self.next_message() {
                Some(message) => self.handle(message),
                None => self.ending = Some(Ending::Moved),
            }
        }
        let ending = self
            .ending
            .take()
            .unwrap_or(Ending::Stopped("the process ended"));
        // Whatever touches memory then waits, perhaps for ever.
        let lost = matches!(ending, Ending::MemoryLost(_)) || self.waits_for_its_source();
        if self.phase == Phase::Running && !lost {
            // Devices flush what they hold.
            if let Err(error) = self.machine.pause(crate::machine::DiskLocks::Release) {
                tracing::error!(error = chain(&error), "devices did not stop in order");
            }
        }
        if let Some(following) = self.following.take_if(|_| !lost) {
            // Nothing touches memory any more: the host that it came from may forget the rest.
            following.end(&ending.describe());
        }
        if let Some(question) = &self.question
            && question.claim() == Claimed::There
        {
            // A process of this host may go on with it.
            self.give_away();
        }
        if self.phase != Phase::Moved {
            self.phase = Phase::Stopped;
        }
        let mut status = self.status();
        status.reason = Some(ending.describe());
        status.exit_status = ending.exit_status();
        if let Ending::HandedOver(pid) = ending {
            status.successor = Some(pid);
            // What is left is to let go of memory, on processors that the guest may need.
            dunlin_migration::step_back();
            if let Err(error) = self.machine.memory().unmap_pages() {
                tracing::debug!(%error, "memory is let go at once");
            }
        }
        if lost {
            // Its threads may wait for memory, and cannot be waited for: they end with the process.
            std::mem::forget(self.machine);
            std::mem::forget(self.from_file);
        }
        (ending, status)
    }

    /// The next message; `None` when the time to wait for it is over.
    fn next_message(&self) -> Option<Message> {
        let Some(until) = self.linger_until else {
            // We hold a sender ourselves, so the channel cannot close.
            return self.inbox.recv().ok();
        };
        let left = until.saturating_duration_since(Instant::now());
        self.inbox.recv_timeout(left).ok()
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Status(reply) => answer(reply, Ok(self.status())),
            Message::Config(reply) => answer(reply, Ok(self.machine.config().clone())),
            Message::Pause(reply) => answer(reply, self.pause()),
            Message::Resume(reply) => answer(reply, self.resume()),
            Message::Stop(reply) => answer(reply, self.stop()),
            Message::Save(request, reply) => answer(reply, self.save(&request)),
            Message::HandOver(request, reply) => self.hand_over(request, reply),
            Message::HandOverEnded(end) => self.hand_over_ended(*end),
            Message::Migrate(request, reply) => answer(reply, self.migrate(request)),
            Message::BeginLook(reply) => answer(reply, self.begin_look()),
            Message::EndLook(reply) => answer(reply, self.end_look()),
            Message::BeginSurvey(reply) => answer(reply, self.begin_survey()),
            Message::Survey(reply) => answer(reply, self.survey()),
            Message::EndSurvey(request, reply) => answer(reply, self.end_survey(&request)),
            Message::BeginProfile(request, reply) => answer(reply, self.begin_profile(&request)),
            Message::CollectProfile(reply) => answer(reply, self.collect_profile()),
            Message::EndProfile(reply) => answer(reply, self.end_profile()),
            Message::Move(call) => self.serve_move(call),
            Message::MoveEnded(end) => self.move_ended(*end),
            Message::SaveEnded(end) => self.save_ended(*end),
            Message::PagesThere => self.pages_there(),
            Message::MemoryLost(error, heard) => {
                let _gone = heard.send(());
                // After a reboot the guest has another memory.
                if self.from_file.is_some() || self.following.is_some() {
                    self.end(Ending::MemoryLost(error));
                }
            }
            Message::Machine(event) => self.machine_event(event),
            Message::End(why) => self.end(Ending::Stopped(why)),
        }
    }

    /// The VM ends as soon as no move is under way.
    fn end(&mut self, ending: Ending) {
        tracing::info!(reason = ending.describe(), "the VM ends");
        self.monitor.cancel();
        self.saves.cancel();
        // The first reason is the cause of the others.
        self.ending.get_or_insert(ending);
    }

    fn pages_there(&mut self) {
        tracing::info!("all pages of the guest are there");
        if let Some(from_file) = &mut self.from_file {
            from_file.let_go();
        }
        if self.following.take().is_some() {
            self.reset_if_pending();
        }
    }

    /// Is the guest's memory at another host that cannot be reached now?
    fn waits_for_its_source(&self) -> bool {
        let standing = self.following.as_ref().map(Following::standing);
        matches!(
            standing,
            Some(Standing::Waiting { .. } | Standing::Lost { .. })
        )
    }

    fn machine_event(&mut self, event: MachineEvent) {
        match event {
            MachineEvent::PowerOff => self.end(Ending::PowerOff),
            MachineEvent::DebugExit(value) => self.end(Ending::DebugExit(value)),
            MachineEvent::Reset => self.reset(),
            MachineEvent::TripleFault => self.end(Ending::TripleFault),
            MachineEvent::EngineFailed(error) => self.end(Ending::Engine(error)),
            MachineEvent::ThreadLost(id) => self.end(Ending::ThreadLost(id)),
        }
    }

    /// The guest asked for a reset: everything is built anew, which leaves nothing over.
    fn reset(&mut self) {
        if self.machine.config().on_reboot == OnReboot::Stop {
            return self.end(Ending::Rebooted);
        }
        if self.moving.is_some() || self.saving.is_some() || self.following.is_some() {
            // It works on this machine's memory: it must let go first. What brings the guest here
            // does so soon.
            self.reset_pending = true;
            self.monitor.cancel();
            self.saves.cancel();
            return;
        }
        self.reset_pending = false;
        tracing::info!("the guest reboots");
        if let Err(error) = self.rebuild() {
            self.end(Ending::Reboot(error));
        }
    }

    /// The VM now.
    pub(crate) fn status(&self) -> VmStatus {
        let config = self.machine.config();
        VmStatus {
            version: dunlin_api::VERSION,
            name: config.name.clone(),
            pid: std::process::id(),
            program: env!("CARGO_PKG_VERSION").into(),
            state: self.phase.to_api(),
            engine: self.machine.engine_name().into(),
            engine_reason: self.machine.engine_reason().into(),
            cpus: config.cpus,
            memory_bytes: config.memory_bytes,
            throttled_percent: self.machine.throttled(),
            restore: self.from_file.as_ref().map(FromFile::report),
            missing_pages: self.following.as_ref().map(Following::missing_pages),
            waits_for_source: self.waits_for_its_source(),
            uptime_ms: u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX),
            successor: match self.ending {
                Some(Ending::HandedOver(pid)) => Some(pid),
                _ => None,
            },
            reason: self.ending.as_ref().map(Ending::describe),
            exit_status: self.ending.as_ref().and_then(Ending::exit_status),
        }
    }
}

/// Answers; whoever asked may be gone.
fn answer<T>(reply: Reply<T>, result: Result<T, ApiError>) {
    let _gone = reply.send(result);
}
