//! What others see of a move.

use std::sync::{Mutex, MutexGuard};

use dunlin_api::migration::{MigrationPhase, MigrationReport, MigrationStatus};
use dunlin_api::{ApiError, ErrorCode};
use dunlin_migration::{CancelToken, Progress, Step};

use super::departure::OpenQuestion;

/// Where the guest is after a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MoveOutcome {
    /// It runs there.
    Moved,
    /// It runs here.
    Here,
    /// It is here, and did not go on after the switch-over's pause.
    PausedHere,
    /// It is paused here and may run there.
    InDoubt,
    /// It went there, which cannot get the rest of its memory.
    Lost,
    /// It ran in another process of this host, and ended with it.
    Gone,
}

/// How a move ended.
#[derive(Debug)]
pub(crate) struct MoveEnd {
    pub(crate) outcome: MoveOutcome,
    pub(crate) report: MigrationReport,
    pub(crate) error: Option<ApiError>,
    /// What is needed to ask the destination again.
    pub(crate) question: Option<OpenQuestion>,
}

impl MoveEnd {
    /// The end of a move whose thread panicked: where the guest is, the lifecycle's phase knows.
    pub(super) fn lost() -> Self {
        Self {
            outcome: MoveOutcome::InDoubt,
            report: MigrationReport::default(),
            error: Some(ApiError::new(
                ErrorCode::Host,
                "the thread that moved the guest failed",
            )),
            question: None,
        }
    }

    /// The end of a move that did not begin.
    pub(super) fn refused(error: ApiError) -> Self {
        Self {
            outcome: MoveOutcome::Here,
            report: MigrationReport::default(),
            error: Some(error),
            question: None,
        }
    }
}

#[derive(Debug)]
struct State {
    status: MigrationStatus,
    cancel: CancelToken,
}

/// The current or last move, for everybody to look at.
#[derive(Debug)]
pub(crate) struct MoveMonitor {
    state: Mutex<State>,
}

impl MoveMonitor {
    /// No move yet.
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                status: MigrationStatus::none(),
                cancel: CancelToken::new(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is valid after each statement that changes it.
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The status.
    pub(crate) fn status(&self) -> MigrationStatus {
        self.lock().status.clone()
    }

    /// A move begins; its token.
    pub(super) fn begin(&self) -> CancelToken {
        let mut state = self.lock();
        state.cancel = CancelToken::new();
        state.status = MigrationStatus {
            phase: MigrationPhase::Connecting,
            ..MigrationStatus::none()
        };
        state.cancel.clone()
    }

    /// It has come so far.
    pub(super) fn progress(&self, progress: Progress) {
        let Progress {
            step,
            round,
            pages_done,
            pages_total,
            bytes_sent,
        } = progress;
        let phase = match step {
            Step::Connecting => MigrationPhase::Connecting,
            Step::Copying => MigrationPhase::Copying,
            Step::SwitchingOver => MigrationPhase::SwitchingOver,
            Step::HandingOver => MigrationPhase::HandingOver,
            Step::Following => MigrationPhase::Following,
        };
        self.lock().status = MigrationStatus {
            phase,
            round,
            pages_total,
            pages_done,
            bytes_sent,
            report: None,
            error: None,
        };
    }

    /// Asks the current move to end. Without one, nothing happens.
    pub(crate) fn cancel(&self) {
        self.lock().cancel.cancel();
    }

    /// The destination was asked again and runs the guest after all.
    pub(crate) fn resolve_as_moved(&self) {
        let mut state = self.lock();
        state.status.phase = MigrationPhase::Done;
        state.status.error = None;
    }

    /// It is over.
    pub(crate) fn finish(&self, end: MoveEnd) {
        let MoveEnd {
            outcome,
            report,
            error,
            question: _,
        } = end;
        let cancelled = error
            .as_ref()
            .is_some_and(|error| error.code == ErrorCode::Cancelled);
        let mut state = self.lock();
        state.status.phase = match outcome {
            MoveOutcome::Moved => MigrationPhase::Done,
            MoveOutcome::InDoubt => MigrationPhase::InDoubt,
            MoveOutcome::Lost => MigrationPhase::Lost,
            MoveOutcome::Here if cancelled => MigrationPhase::Cancelled,
            MoveOutcome::Here | MoveOutcome::PausedHere | MoveOutcome::Gone => {
                MigrationPhase::Failed
            }
        };
        state.status.bytes_sent = report.bytes_sent;
        state.status.report = Some(report);
        state.status.error = error;
    }
}
