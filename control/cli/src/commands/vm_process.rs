//! `vm-process`: this process is one VM.

use std::process::ExitCode;

use dunlin_api::launch::LaunchSpec;

use crate::error::CliError;
use crate::host::Host;

/// Becomes the VM that `spec` describes.
pub(super) fn run(spec: &str, host: &dyn Host) -> Result<ExitCode, CliError> {
    let spec: LaunchSpec = serde_json::from_str(spec)
        .map_err(|error| CliError::Argument(format!("not a launch specification: {error}")))?;
    Ok(host.run_vm(spec))
}
