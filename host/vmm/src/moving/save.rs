//! A guest that is saved while it runs: a thread that walks migration's save, and asks the
//! lifecycle for the pause as everybody does.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use dunlin_api::snapshot::{SavePhase, SaveReport, SaveStatus};
use dunlin_api::{ApiError, ErrorCode, VmConfig};
use dunlin_guest::{Memory, SavedState};
use dunlin_migration::file::{self, AfterFailure, LiveProgress, LiveSave, SnapshotError};
use dunlin_migration::{CancelToken, MachineError, Slowdown, SourceMachine, Userfaultfd};

use super::file::refused;
use super::{call, encode_config};
use crate::lifecycle::{Mailbox, Message, MoveCall};

/// What others see of the save of a running guest.
#[derive(Debug, Default)]
pub(crate) struct SaveMonitor(Mutex<(SaveStatus, CancelToken)>);

impl SaveMonitor {
    fn lock(&self) -> MutexGuard<'_, (SaveStatus, CancelToken)> {
        // The status is valid after each statement that changes it.
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The current or last save.
    pub(crate) fn status(&self) -> SaveStatus {
        self.lock().0.clone()
    }

    /// Asks the current save to end. Without one, nothing happens.
    pub(crate) fn cancel(&self) {
        self.lock().1.cancel();
    }

    fn begin(&self, pages_total: u64) -> CancelToken {
        let mut state = self.lock();
        state.0 = SaveStatus {
            phase: SavePhase::Writing,
            pages_total,
            ..SaveStatus::default()
        };
        state.1 = CancelToken::new();
        state.1.clone()
    }

    fn progress(&self, progress: LiveProgress) {
        let LiveProgress {
            pages_done,
            pages_total,
            bytes,
        } = progress;
        let status = &mut self.lock().0;
        (status.pages_done, status.pages_total) = (pages_done, pages_total);
        status.bytes = bytes;
    }

    /// It is over.
    pub(crate) fn finish(&self, result: Result<SaveReport, ApiError>) {
        let status = &mut self.lock().0;
        match result {
            Ok(report) => {
                status.phase = SavePhase::Done;
                status.pages_done = status.pages_total;
                status.bytes = report.file_bytes;
                status.report = Some(report);
            }
            Err(error) => {
                status.phase = match error.code {
                    ErrorCode::Cancelled => SavePhase::Cancelled,
                    _ => SavePhase::Failed,
                };
                status.error = Some(error);
            }
        }
    }
}

/// How a save of a running guest ended.
#[derive(Debug)]
pub(crate) struct SaveEnd {
    pub(crate) result: Result<SaveReport, ApiError>,
    /// The guest did not go on after the pause.
    pub(crate) stranded: bool,
}

/// What a save needs of a running machine.
pub(crate) struct Saving {
    pub(crate) to: PathBuf,
    pub(crate) memory: Memory,
    pub(crate) config: VmConfig,
    pub(crate) faults: Arc<Userfaultfd>,
    pub(crate) mailbox: Mailbox,
    pub(crate) monitor: Arc<SaveMonitor>,
}

/// Begins a save on a thread of its own; its last message is `SaveEnded`.
pub(crate) fn start(mut saving: Saving) -> Result<JoinHandle<()>, ApiError> {
    let monitor = Arc::clone(&saving.monitor);
    let cancel = monitor.begin(saving.memory.pages());
    let work = move || {
        let mut guard = EndGuard {
            mailbox: saving.mailbox.clone(),
            end: Some(lost()),
        };
        let progress = Arc::clone(&saving.monitor);
        let live = LiveSave {
            faults: Arc::clone(&saving.faults),
            cancel,
            progress: Box::new(move |now| progress.progress(now)),
        };
        let to = saving.to.clone();
        guard.end = Some(match file::save_live(&mut saving, &to, live) {
            Ok(report) => SaveEnd {
                result: Ok(to_api(report)),
                stranded: false,
            },
            Err(failure) => failed(&saving, &failure),
        });
    };
    let thread = std::thread::Builder::new().name("save".into());
    thread.spawn(work).map_err(|error| {
        let refused = ApiError::from_chain(ErrorCode::Host, &error);
        monitor.finish(Err(refused.clone()));
        refused
    })
}

/// Tells the lifecycle that the save is over, however its thread ends.
struct EndGuard {
    mailbox: Mailbox,
    end: Option<SaveEnd>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            self.mailbox.send(Message::SaveEnded(Box::new(end)));
        }
    }
}

/// The end of a save whose thread panicked: whether the guest runs, the lifecycle's phase knows.
fn lost() -> SaveEnd {
    SaveEnd {
        result: Err(ApiError::new(
            ErrorCode::Host,
            "the thread that saved the guest failed",
        )),
        stranded: true,
    }
}

fn failed(saving: &Saving, failure: &file::LiveFailure) -> SaveEnd {
    let name = &saving.config.name;
    let mut error = refused("save the running guest to", &saving.to, &failure.error);
    if matches!(failure.error, SnapshotError::Cancelled) {
        error = ApiError::new(ErrorCode::Cancelled, "the save was cancelled");
    }
    let stranded = failure.guest == AfterFailure::Paused;
    if stranded {
        error = error.with_hint(format!(
            "the guest is whole but paused, since it did not go on: \"dunlin resume {name}\" tries \
             again"
        ));
    }
    SaveEnd {
        result: Err(error),
        stranded,
    }
}

/// The report as it is told to others.
pub(super) fn to_api(report: file::SaveReport) -> SaveReport {
    let file::SaveReport {
        file_bytes,
        ram_bytes,
        pages,
        zero_pages,
        total_ms,
        ram_hash,
        pause_ms,
        writers_held,
    } = report;
    SaveReport {
        file_bytes,
        ram_bytes,
        pages,
        zero_pages,
        total_ms,
        ram_hash,
        pause_ms,
        writers_held,
    }
}

impl SourceMachine for Saving {
    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn configuration(&self) -> Vec<u8> {
        encode_config(&self.config)
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
        call(&self.mailbox, "pause", MoveCall::Freeze)
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        call(&self.mailbox, "resume", MoveCall::TakeBack)
    }

    fn save(&mut self) -> Result<Vec<SavedState>, MachineError> {
        call(&self.mailbox, "save its state", MoveCall::Save)
    }
}
