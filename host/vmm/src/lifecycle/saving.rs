//! What the lifecycle does for a save of the running guest.

use dunlin_api::snapshot::SaveRequest;
use dunlin_api::status::VmStatus;
use dunlin_api::{ApiError, ErrorCode};

use super::{Lifecycle, Phase, Transition};
use crate::moving::{self, SaveEnd, Saving};

impl Lifecycle {
    /// Begins to save the running guest, which runs on.
    pub(super) fn save_live(&mut self, request: &SaveRequest) -> Result<VmStatus, ApiError> {
        let config = self.machine.config();
        let name = &config.name;
        if self.phase != Phase::Running {
            return Err(ApiError::new(
                ErrorCode::WrongState,
                format!("cannot save VM \"{name}\" while it runs: it does not run"),
            )
            .with_hint("without --live a paused VM is saved"));
        }
        let faults = self.faults.clone().map_err(|reason| {
            ApiError::new(
                ErrorCode::Host,
                format!("cannot save VM \"{name}\" while it runs: {reason}"),
            )
            .with_hint("without --live the VM is paused and saved")
        })?;
        let written = config.disks.iter().find(|disk| !disk.read_only);
        if let Some(disk) = written.filter(|_| !request.without_disks) {
            return Err(ApiError::new(
                ErrorCode::InvalidRequest,
                format!(
                    "VM \"{name}\" writes to disk \"{}\", which is not in the file: what the guest \
                     writes to it from now on would not fit the memory that is saved",
                    disk.path.display()
                ),
            )
            .with_hint(
                "without --live the VM stops writing when it is saved; --without-disks saves its \
                 memory all the same",
            ));
        }
        let saving = Saving {
            to: request.to.clone(),
            memory: self.machine.memory().clone(),
            config: config.clone(),
            faults,
            mailbox: self.mailbox.clone(),
            monitor: self.saves.clone(),
        };
        self.saving = Some(moving::start_save(saving)?);
        Ok(self.status())
    }

    pub(super) fn save_ended(&mut self, end: SaveEnd) {
        if let Some(thread) = self.saving.take() {
            // Its last act was to send this message.
            let _panicked = thread.join();
        }
        let SaveEnd { result, stranded } = end;
        if stranded && self.phase == Phase::Suspended {
            match self.phase.after(Transition::Strand) {
                Ok(next) => self.phase = next,
                Err(error) => tracing::error!(%error, "the save's end does not fit"),
            }
        }
        self.saves.finish(result);
        self.reset_if_pending();
    }
}
