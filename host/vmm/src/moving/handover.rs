//! A guest that passes from one process of this host to another, without a copy of its memory.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use dunlin_api::handover::{HandOverReport, HandOverRequest};
use dunlin_api::migration::MigrationReport;
use dunlin_api::{ApiError, ErrorCode, VmName};
use dunlin_guest::{Memory, SavedState};
use dunlin_migration::handover::{
    self, DepartingMachine, Descriptors, Guest, HandOverFailure, HandOverOptions, Leftovers,
};
use dunlin_migration::transport::{PeerProcess, UnixConnector};
use dunlin_migration::{CancelToken, DestinationMachine, MachineError, Slowdown, SourceMachine};

use super::arrival::refusal;
use super::departure::{OpenQuestion, Successor, Watched, code_of, hint_paused};
use super::security::Route;
use super::{
    ArrivingMachine, Build, Departure, MoveEnd, MoveOutcome, decode_config, machine_error,
};
use crate::console::ConsoleHub;
use crate::files::{self, OpenFiles};
use crate::lifecycle::{Message, MoveCall};
use crate::machine::{Blueprint, Inheritance, assemble_around};
use crate::place::ClaimedPlace;

/// How a hand-over ended.
#[derive(Debug)]
pub(crate) struct HandOverEnd {
    pub(crate) end: MoveEnd,
    pub(crate) report: HandOverReport,
    /// The process that it was to go to.
    pub(crate) pid: u32,
}

/// What a hand-over needs of the process that has the guest.
pub(crate) struct HandingOver {
    pub(crate) departure: Departure,
    /// Copies of everything that the other process goes on with, RAM excepted.
    pub(crate) descriptors: Descriptors,
    pub(crate) console: Arc<ConsoleHub>,
    /// What the components said at the pause.
    pub(crate) states: Vec<SavedState>,
}

/// Begins a hand-over on a thread of its own; its last message is `HandOverEnded`.
pub(crate) fn start_hand_over(
    mut leaving: HandingOver,
    request: HandOverRequest,
) -> Result<JoinHandle<()>, ApiError> {
    let cancel = leaving.departure.monitor.begin();
    let monitor = Arc::clone(&leaving.departure.monitor);
    let work = move || {
        let mailbox = leaving.departure.mailbox.clone();
        let mut guard = EndGuard {
            tell: Some(move |end| mailbox.send(Message::HandOverEnded(Box::new(end)))),
            end: Some(HandOverEnd {
                end: MoveEnd::lost(),
                report: HandOverReport::default(),
                pid: request.pid,
            }),
        };
        guard.end = Some(run(&mut leaving, &request, cancel));
    };
    std::thread::Builder::new()
        .name("hand-over".into())
        .spawn(work)
        .map_err(|error| {
            let refused = ApiError::from_chain(ErrorCode::Host, &error);
            monitor.finish(MoveEnd::refused(refused.clone()));
            refused
        })
}

/// Tells the lifecycle that the hand-over is over, however its thread ends.
struct EndGuard<F: FnOnce(HandOverEnd)> {
    tell: Option<F>,
    end: Option<HandOverEnd>,
}

impl<F: FnOnce(HandOverEnd)> Drop for EndGuard<F> {
    fn drop(&mut self) {
        if let (Some(tell), Some(end)) = (self.tell.take(), self.end.take()) {
            tell(end);
        }
    }
}

fn run(leaving: &mut HandingOver, request: &HandOverRequest, cancel: CancelToken) -> HandOverEnd {
    let options = HandOverOptions {
        downtime_limit: Duration::from_millis(request.downtime_ms),
        ..HandOverOptions::default()
    };
    // Before anything is given to it: later another process may have its id.
    let process = Arc::new(Watched(PeerProcess::open(request.pid).ok()));
    let mut connector = UnixConnector::new(&request.to).with_descriptors();
    let result = handover::hand_over(leaving, &mut connector, &options, cancel);
    let (end, report) = match result {
        Ok(report) => {
            let end = MoveEnd {
                outcome: MoveOutcome::Moved,
                report: MigrationReport::default(),
                error: None,
                question: None,
            };
            (end, to_api(&report))
        }
        Err(failure) => (failed(&failure, request, process), to_api(&failure.report)),
    };
    let pid = request.pid;
    HandOverEnd { end, report, pid }
}

fn failed(failure: &HandOverFailure, request: &HandOverRequest, process: Arc<Watched>) -> MoveEnd {
    let refused = ApiError::from_chain(code_of(&failure.error), failure);
    let route = Route::to_process(&request.to);
    let pid = request.pid;
    let (outcome, error, question) = match failure.guest {
        Guest::RunsHere => (MoveOutcome::Here, refused, None),
        Guest::PausedHere => (MoveOutcome::PausedHere, hint_paused(refused), None),
        Guest::InDoubt(doubt) => {
            let question = failure.right.clone().map(|right| {
                let successor = Successor {
                    pid,
                    right,
                    process,
                };
                OpenQuestion::to_successor(route, doubt, successor)
            });
            let refused = refused.with_hint(format!(
                "process {pid} has the guest and does not answer; \"dunlin resume\" asks it again, \
                 and once it has ended tells what became of the guest"
            ));
            (MoveOutcome::InDoubt, refused, question)
        }
        Guest::Gone => {
            let refused = refused.with_hint("\"dunlin run\" boots it anew from its disks");
            (MoveOutcome::Gone, refused, None)
        }
    };
    MoveEnd {
        outcome,
        report: MigrationReport::default(),
        error: Some(error),
        question,
    }
}

/// The wire form of a report has the same fields; a test holds the two together.
fn to_api(report: &handover::HandOverReport) -> HandOverReport {
    let value = serde_json::to_value(report);
    match value.and_then(serde_json::from_value) {
        Ok(report) => report,
        Err(error) => {
            tracing::error!(%error, "the report cannot be told");
            HandOverReport::default()
        }
    }
}

impl SourceMachine for HandingOver {
    fn memory(&self) -> &Memory {
        self.departure.memory()
    }

    fn configuration(&self) -> Vec<u8> {
        self.departure.configuration()
    }

    fn start_dirty_tracking(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn collect_dirty(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn stop_dirty_tracking(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn throttle(&mut self, _slowdown: Slowdown) -> Result<(), MachineError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.states = self.departure.call("pause", MoveCall::Lend)?;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.departure.resume()
    }

    fn save(&mut self) -> Result<Vec<SavedState>, MachineError> {
        Ok(std::mem::take(&mut self.states))
    }
}

impl DepartingMachine for HandingOver {
    fn descriptors(&mut self) -> Result<Descriptors, MachineError> {
        Ok(std::mem::take(&mut self.descriptors))
    }

    fn leftovers(&mut self) -> Leftovers {
        Leftovers {
            body: self.console.history(),
            descriptors: Descriptors::new(),
        }
    }
}

/// A machine built around what another process has, which runs the guest meanwhile.
#[derive(Debug)]
pub(crate) struct AdoptedMachine {
    pub(crate) guest: ArrivingMachine,
    pub(crate) files: OpenFiles,
}

impl Build {
    /// A machine for VM `name`, around what another process of this host sent.
    pub(crate) fn adopt(
        &self,
        name: &VmName,
        configuration: &[u8],
        descriptors: Descriptors,
    ) -> Result<AdoptedMachine, MachineError> {
        let built = self.adopt_all(name, configuration, descriptors);
        built.map_err(|error| machine_error("be built", error))
    }

    fn adopt_all(
        &self,
        name: &VmName,
        configuration: &[u8],
        mut descriptors: Descriptors,
    ) -> Result<AdoptedMachine, ApiError> {
        let config = decode_config(configuration)?;
        if config.name != *name {
            return Err(ApiError::new(
                ErrorCode::Peer,
                format!("VM \"{}\" came where \"{name}\" was expected", config.name),
            ));
        }
        let claimed = files::claimed_file(&mut descriptors)?;
        let place = ClaimedPlace::adopt(&self.runtime, name, claimed)
            .map_err(|error| ApiError::from_chain(ErrorCode::Host, &error))?;
        let files = OpenFiles::adopt(&mut descriptors)?;
        let blueprint = Blueprint {
            config,
            directory: place.place().directory().to_owned(),
            console: Arc::clone(&self.console),
            events: self.events.renew(),
        };
        let machine = assemble_around(&blueprint, Inheritance::From(&mut descriptors))
            .map_err(|error| refusal(&error))?;
        Ok(AdoptedMachine {
            guest: ArrivingMachine {
                machine,
                blueprint,
                place,
            },
            files,
        })
    }
}

impl DestinationMachine for AdoptedMachine {
    fn memory(&self) -> &Memory {
        self.guest.memory()
    }

    fn restore(&mut self, states: Vec<SavedState>) -> Result<(), MachineError> {
        self.guest.restore(states)
    }

    fn start(&mut self) -> Result<(), MachineError> {
        self.guest.start()?;
        self.guest.machine.keep();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_field_of_a_report_is_lost_on_the_way() {
        let report = handover::HandOverReport {
            outcome: dunlin_migration::Outcome::Moved,
            ram_bytes: 7,
            descriptors: vec!["ram".into()],
            built_ms: 1.5,
            aborted_pauses_ms: vec![2.5],
            paused_at_ms: Some(3.5),
            blackout_ms: Some(4.5),
            switch_over: Some(dunlin_migration::SwitchOverReport::default()),
            destination: Some(dunlin_migration::DestinationReport::default()),
            total_ms: 5.5,
        };
        let there = serde_json::to_value(to_api(&report)).unwrap();
        assert_eq!(there, serde_json::to_value(&report).unwrap());
    }
}
