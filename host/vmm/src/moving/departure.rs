//! A guest that leaves: a thread that walks migration's source, and asks the lifecycle for the
//! pause as everybody does.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_api::migration::{MigrateRequest, MigrationReport, Verify};
use dunlin_api::plan::{Compression, MoveMode};
use dunlin_api::{ApiError, ErrorCode, VmConfig};
use dunlin_guest::{Authorship, Memory, SavedState};
use dunlin_hypervisor::Vm;
use dunlin_migration::handover::{Claimed, Right};
use dunlin_migration::transport::{Fencing, PeerProcess};
use dunlin_migration::{
    Compression as Squeeze, Doubt, MachineError, MigrationError, MigrationFailure,
    MigrationOptions, Mode, Slowdown, Source, SourceMachine, Verdict, Verification, Whereabouts,
    resolve,
};

use super::security::Route;
use super::{MoveEnd, MoveMonitor, MoveOutcome, call, encode_config, machine_error};
use crate::lifecycle::{Mailbox, Message, MoveCall, Reply};
use crate::machine::shares;

/// How the processors of a guest that leaves are slowed down.
#[derive(Debug, Default)]
pub(crate) struct Throttled {
    /// Who had written until the last change.
    seen: Authorship,
    /// Percent of its time that each processor sleeps.
    percent: Vec<u8>,
}

impl Throttled {
    /// Not at all; what was written before does not count.
    pub(crate) fn none(memory: &Memory) -> Self {
        Self {
            seen: memory.dirty_log().authorship(),
            percent: Vec::new(),
        }
    }

    /// What each processor sleeps from now on.
    pub(super) fn next(&mut self, memory: &Memory, cpus: u32, slowdown: Slowdown) -> Vec<u8> {
        let now = memory.dirty_log().authorship();
        let pages = now.since(&self.seen).of_vcpus(cpus);
        self.seen = now;
        self.percent = shares(slowdown.as_percent(), &pages, &self.percent);
        self.percent.clone()
    }
}

/// What a move needs of the machine.
pub(crate) struct Departure {
    pub(crate) memory: Memory,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) config: VmConfig,
    pub(crate) mailbox: Mailbox,
    pub(crate) monitor: Arc<MoveMonitor>,
    pub(crate) throttled: Throttled,
}

/// Begins a move on a thread of its own; its last message is `MoveEnded`.
pub(crate) fn start(
    mut departure: Departure,
    request: MigrateRequest,
) -> Result<JoinHandle<()>, ApiError> {
    let route = Route::new(request.to.clone(), &request.security)?;
    let cancel = departure.monitor.begin();
    let monitor = Arc::clone(&departure.monitor);
    let mailbox = departure.mailbox.clone();
    let work = move || {
        let mut guard = EndGuard {
            mailbox,
            end: Some(MoveEnd::lost()),
        };
        let mut connector = route.connector();
        let progress = Arc::clone(&departure.monitor);
        let source = Source::new(options(&request))
            .cancel(cancel)
            .progress(move |now| progress.progress(now));
        let result = source.run(&mut departure, &mut *connector);
        guard.end = Some(end(result, route));
    };
    std::thread::Builder::new()
        .name("migration".into())
        .spawn(work)
        .map_err(|error| {
            let refused = ApiError::from_chain(ErrorCode::Host, &error);
            monitor.finish(MoveEnd::refused(refused.clone()));
            refused
        })
}

/// Tells the lifecycle that the move is over, however its thread ends.
struct EndGuard {
    mailbox: Mailbox,
    end: Option<MoveEnd>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            self.mailbox.send(Message::MoveEnded(Box::new(end)));
        }
    }
}

/// A guest that was given away without an answer: what is needed to ask again.
#[derive(Debug, Clone)]
pub(crate) struct OpenQuestion {
    route: Route,
    doubt: Doubt,
    /// Of a guest that was given to a process of this host.
    successor: Option<Successor>,
}

/// A process of this host that was given the guest.
#[derive(Debug, Clone)]
pub(super) struct Successor {
    pub(super) pid: u32,
    pub(super) right: Arc<Right>,
    pub(super) process: Arc<Watched>,
}

/// A process that is watched, if it can be.
#[derive(Debug)]
pub(super) struct Watched(pub(super) Option<PeerProcess>);

impl Fencing for Watched {
    fn peer_is_dead(&self) -> Option<bool> {
        self.0.as_ref()?.peer_is_dead()
    }
}

impl OpenQuestion {
    /// To a process of this host.
    pub(super) fn to_successor(route: Route, doubt: Doubt, successor: Successor) -> Self {
        Self {
            route,
            doubt,
            successor: Some(successor),
        }
    }

    /// Claims the guest for this process when nobody says who has it. Another host cannot be
    /// looked at: there it is the user who knows.
    pub(crate) fn claim(&self) -> Claimed {
        match &self.successor {
            Some(successor) => successor.right.claim(&*successor.process),
            None => Claimed::Here,
        }
    }

    /// The process of this host that may have the guest.
    pub(crate) fn successor(&self) -> Option<u32> {
        self.successor.as_ref().map(|successor| successor.pid)
    }

    /// Asks the destination, for as long as `patience`, whether it runs the guest.
    pub(crate) fn ask(&self, patience: Duration) -> Verdict {
        let mut connector = self.route.connector();
        resolve(&mut *connector, &self.doubt, Instant::now() + patience)
    }
}

/// What migration is told of a request.
pub(crate) fn options(request: &MigrateRequest) -> MigrationOptions {
    let defaults = MigrationOptions::default();
    let idle = request.peer_timeout_ms.map(Duration::from_millis);
    MigrationOptions {
        connect_timeout: idle.unwrap_or(defaults.connect_timeout),
        idle_timeout: idle.unwrap_or(defaults.idle_timeout),
        inquiry_timeout: idle.map_or(defaults.inquiry_timeout, |idle| idle.saturating_mul(3)),
        downtime_limit: Duration::from_millis(request.downtime_ms),
        bandwidth_limit: request.bandwidth,
        max_rounds: request.max_rounds.unwrap_or(defaults.max_rounds),
        verification: match request.verify {
            Verify::Off => Verification::Off,
            Verify::After => Verification::AfterHandOver,
            Verify::Before => Verification::BeforeHandOver,
        },
        mode: match request.mode {
            MoveMode::Auto => Mode::Auto,
            MoveMode::Pre => Mode::Pre,
            MoveMode::Post => Mode::Post,
        },
        streams: request.streams,
        compression: match request.compression {
            Compression::Auto => Squeeze::Auto,
            Compression::Off => Squeeze::Off,
            Compression::Lz4 => Squeeze::Lz4,
        },
        timeout: request.timeout_ms.map(Duration::from_millis),
        reconnect_window: request
            .reconnect_window_ms
            .map_or(defaults.reconnect_window, Duration::from_millis),
        ..defaults
    }
}

fn end(
    result: Result<dunlin_migration::MigrationReport, Box<MigrationFailure>>,
    route: Route,
) -> MoveEnd {
    match result {
        Ok(report) => MoveEnd {
            outcome: MoveOutcome::Moved,
            report: to_api(&report),
            error: None,
            question: None,
        },
        Err(failure) => {
            let code = code_of(&failure.error);
            MoveEnd {
                outcome: match failure.guest {
                    Whereabouts::RunsHere => MoveOutcome::Here,
                    Whereabouts::PausedHere => MoveOutcome::PausedHere,
                    Whereabouts::InDoubt(_) => MoveOutcome::InDoubt,
                    Whereabouts::Lost => MoveOutcome::Lost,
                },
                report: to_api(&failure.report),
                error: Some(match failure.guest {
                    Whereabouts::PausedHere => hint_paused(ApiError::from_chain(code, &*failure)),
                    _ => ApiError::from_chain(code, &*failure),
                }),
                question: match failure.guest {
                    Whereabouts::InDoubt(doubt) => Some(OpenQuestion {
                        route,
                        doubt,
                        successor: None,
                    }),
                    Whereabouts::RunsHere | Whereabouts::PausedHere | Whereabouts::Lost => None,
                },
            }
        }
    }
}

pub(super) fn code_of(error: &MigrationError) -> ErrorCode {
    match error {
        MigrationError::Cancelled => ErrorCode::Cancelled,
        MigrationError::Transport(_)
        | MigrationError::Protocol(_)
        | MigrationError::Lane(_)
        | MigrationError::LaneMessage(_)
        | MigrationError::Peer { .. }
        | MigrationError::InDoubt
        | MigrationError::Lost { .. } => ErrorCode::Peer,
        _ => ErrorCode::Host,
    }
}

pub(super) fn hint_paused(error: ApiError) -> ApiError {
    error.with_hint(
        "the guest is whole but paused, since it did not go on here: \
         \"dunlin resume\" tries again",
    )
}

/// The wire form of a report has the same fields; a test holds the two together.
fn to_api(report: &dunlin_migration::MigrationReport) -> MigrationReport {
    let value = serde_json::to_value(report);
    match value.and_then(serde_json::from_value) {
        Ok(report) => report,
        Err(error) => {
            tracing::error!(%error, "the report cannot be told");
            MigrationReport::default()
        }
    }
}

impl Departure {
    /// Asks the lifecycle and waits for its answer.
    pub(super) fn call<T>(
        &self,
        action: &'static str,
        request: impl FnOnce(Reply<T>) -> MoveCall,
    ) -> Result<T, MachineError> {
        call(&self.mailbox, action, request)
    }
}

impl SourceMachine for Departure {
    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn configuration(&self) -> Vec<u8> {
        encode_config(&self.config)
    }

    fn start_dirty_tracking(&mut self) -> Result<(), MachineError> {
        let started = self.vm.start_dirty_tracking();
        started.map_err(|error| machine_error("track written pages", error))
    }

    fn collect_dirty(&mut self) -> Result<(), MachineError> {
        let collected = self.vm.collect_dirty();
        collected.map_err(|error| machine_error("collect written pages", error))
    }

    fn stop_dirty_tracking(&mut self) -> Result<(), MachineError> {
        let stopped = self.vm.stop_dirty_tracking();
        stopped.map_err(|error| machine_error("end the tracking of written pages", error))
    }

    fn throttle(&mut self, slowdown: Slowdown) -> Result<(), MachineError> {
        let percent = self
            .throttled
            .next(&self.memory, self.config.cpus, slowdown);
        tracing::info!(%slowdown, ?percent, "the guest is slowed down");
        self.call("slow the guest down", |reply| {
            MoveCall::Throttle(percent, reply)
        })
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.call("pause", MoveCall::Suspend)
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.call("resume", MoveCall::TakeBack)
    }

    fn save(&mut self) -> Result<Vec<SavedState>, MachineError> {
        self.call("save its state", MoveCall::Save)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_field_of_a_report_is_lost_on_the_way() {
        let report = dunlin_migration::MigrationReport {
            rounds: vec![dunlin_migration::RoundReport {
                round: 3,
                kind: dunlin_migration::RoundKind::TakenBack,
                pages: 7,
                zero_pages: 8,
                same_pages: 11,
                bytes: 9,
                start_ms: 1.5,
                duration_ms: 2.5,
                goodput: 3.5,
                dirtied_pages: 10,
                dirty_rate: 4.5,
            }],
            blackout_ms: Some(12.5),
            switch_over: Some(dunlin_migration::SwitchOverReport::default()),
            destination: Some(dunlin_migration::DestinationReport::default()),
            verified: Some(true),
            ram_hash: Some("ab".into()),
            no_post_copy: Some("cd".into()),
            post_copy: Some(dunlin_migration::PostCopyReport {
                missing_pages: 1,
                recoveries: 2,
                duration_ms: 3.5,
                ..dunlin_migration::PostCopyReport::default()
            }),
            ..dunlin_migration::MigrationReport::default()
        };
        let there = serde_json::to_value(to_api(&report)).unwrap();
        assert_eq!(there, serde_json::to_value(&report).unwrap());
    }
}
