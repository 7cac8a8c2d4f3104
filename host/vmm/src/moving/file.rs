//! A guest in a file.

use std::path::Path;

use dunlin_api::error::chain;
use dunlin_api::snapshot::{SnapshotComponent, SnapshotReport};
use dunlin_api::{ApiError, ErrorCode};
use dunlin_guest::{Memory, SavedState};
use dunlin_migration::file::{self, SnapshotError};
use dunlin_migration::{MachineError, Slowdown, SourceMachine};

use super::{ArrivingMachine, Build, decode_config, encode_config, machine_error};
use crate::machine::Machine;

/// A paused machine, as migration reads it into a file. It neither stops nor goes on meanwhile.
struct PausedMachine<'a>(&'a Machine);

impl SourceMachine for PausedMachine<'_> {
    fn memory(&self) -> &Memory {
        self.0.memory()
    }

    fn configuration(&self) -> Vec<u8> {
        encode_config(self.0.config())
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
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<SavedState>, MachineError> {
        let states = self.0.save();
        states.map_err(|error| machine_error("save its state", error))
    }
}

fn refused(action: &str, path: &Path, error: &SnapshotError) -> ApiError {
    let cause = chain(error);
    let path = path.display();
    ApiError::new(
        ErrorCode::Host,
        format!("failed to {action} \"{path}\": {cause}"),
    )
}

/// Can a guest be saved there, as far as that shows beforehand?
pub(crate) fn check_target(path: &Path) -> Result<(), ApiError> {
    if path.symlink_metadata().is_ok() {
        return Err(ApiError::new(
            ErrorCode::InvalidRequest,
            format!("\"{}\" exists already", path.display()),
        )
        .with_hint("choose another file: a saved guest is not overwritten"));
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        let folder = folder.display();
        return Err(ApiError::new(
            ErrorCode::InvalidRequest,
            format!("\"{folder}\" is not a folder"),
        ));
    }
    Ok(())
}

/// Saves a paused machine.
pub(crate) fn save_to_file(machine: &Machine, path: &Path) -> Result<(), ApiError> {
    check_target(path)?;
    file::save(&mut PausedMachine(machine), path)
        .map(drop)
        .map_err(|error| refused("save the guest to", path, &error))
}

/// Builds a machine from a file; it is paused.
pub(crate) fn restore_from_file(build: &Build, path: &Path) -> Result<ArrivingMachine, ApiError> {
    let built = file::restore(path, |configuration| build.build_for_peer(configuration));
    built.map_err(|error| refused("restore the guest in", path, &error))
}

/// Looks into a file.
///
/// # Errors
/// [`ApiError`] when it is not a whole saved guest, or of a newer version.
pub fn describe_snapshot(path: &Path) -> Result<SnapshotReport, ApiError> {
    let summary = file::inspect(path).map_err(|error| refused("inspect", path, &error))?;
    Ok(SnapshotReport {
        config: decode_config(&summary.configuration)?,
        file_bytes: summary.file_bytes,
        components: (summary.components.into_iter())
            .map(|component| SnapshotComponent {
                name: component.name,
                kind: component.kind,
                version: component.version,
                bytes: component.bytes,
            })
            .collect(),
    })
}
