//! What the command line asks of the host's side, given to it by the binary.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use dunlin_api::ApiError;
use dunlin_api::launch::LaunchSpec;
use dunlin_api::probe::ProbeReport;
use dunlin_api::snapshot::SnapshotReport;

/// The parts that need the host's crates.
pub trait Host {
    /// Is this process's one VM, until it ends.
    fn run_vm(&self, spec: LaunchSpec) -> ExitCode;

    /// Is a switch, until `stop` is readable. `ready` is called once all ports are open.
    ///
    /// # Errors
    /// What is wrong with the configuration, or what the host refused.
    fn run_switch(
        &self,
        configuration: &str,
        stop: OwnedFd,
        ready: &mut dyn FnMut(),
    ) -> Result<(), ApiError>;

    /// Looks at what this host offers.
    fn probe(&self) -> ProbeReport;

    /// Looks into a saved file.
    ///
    /// # Errors
    /// What is wrong with it.
    fn describe_snapshot(&self, path: &Path) -> Result<SnapshotReport, ApiError>;
}
