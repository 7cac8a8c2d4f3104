//! A guest in a file.

use std::path::Path;

use dunlin_api::snapshot::SnapshotReport;
use dunlin_api::{ApiError, ErrorCode};

use super::{ArrivingMachine, Build};
use crate::machine::Machine;

fn not_yet(path: &Path) -> ApiError {
    ApiError::new(
        ErrorCode::Host,
        format!("cannot use \"{}\": no file format yet", path.display()),
    )
}

/// Saves a paused machine.
pub(crate) fn save_to_file(_machine: &Machine, path: &Path) -> Result<(), ApiError> {
    Err(not_yet(path))
}

/// Builds a machine from a file; it is paused.
pub(crate) fn restore_from_file(_build: &Build, path: &Path) -> Result<ArrivingMachine, ApiError> {
    Err(not_yet(path))
}

/// Looks into a file.
pub fn describe_snapshot(path: &Path) -> Result<SnapshotReport, ApiError> {
    Err(not_yet(path))
}
