//! The host's side of the command line.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use dunlin_api::launch::LaunchSpec;
use dunlin_api::probe::ProbeReport;
use dunlin_api::snapshot::SnapshotReport;
use dunlin_api::{ApiError, ErrorCode};
use dunlin_cli::Host;
use dunlin_vswitch::{SwitchConfig, SwitchError, SwitchProcess};

/// The host that this process runs on.
pub(crate) struct ThisHost;

impl Host for ThisHost {
    fn run_vm(&self, spec: LaunchSpec) -> ExitCode {
        dunlin_vmm::run(spec)
    }

    fn run_switch(
        &self,
        configuration: &str,
        stop: OwnedFd,
        ready: &mut dyn FnMut(),
    ) -> Result<(), ApiError> {
        let config: SwitchConfig = serde_json::from_str(configuration).map_err(|error| {
            ApiError::new(
                ErrorCode::InvalidRequest,
                format!("the switch's configuration is unreadable: {error}"),
            )
        })?;
        let refused = |error: SwitchError| ApiError::from_chain(ErrorCode::Host, &error);
        let mut switch = SwitchProcess::new(config).map_err(refused)?;
        ready();
        switch.run(&stop).map_err(refused)
    }

    fn probe(&self) -> ProbeReport {
        crate::probe::probe()
    }

    fn describe_snapshot(&self, path: &Path) -> Result<SnapshotReport, ApiError> {
        dunlin_vmm::describe_snapshot(path)
    }
}
