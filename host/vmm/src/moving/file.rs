//! A guest in a file.

use std::path::Path;
use std::time::{Duration, Instant};

use dunlin_api::error::chain;
use dunlin_api::snapshot::{Reading, RestoreReport, SnapshotComponent, SnapshotReport};
use dunlin_api::{ApiError, ErrorCode};
use dunlin_guest::{Memory, SavedState};
use dunlin_migration::file::{self, LazyRestore, Rest, Restored, SnapshotError};
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

pub(super) fn refused(action: &str, path: &Path, error: &SnapshotError) -> ApiError {
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

/// A guest that came from a file.
#[derive(Debug)]
pub(crate) struct FromFile {
    begun: Instant,
    reading: Reading,
    why_eager: Option<String>,
    /// When the guest ran, since `begun`.
    took: Option<Duration>,
    /// Brings in the pages that are not there.
    rest: Option<Rest>,
}

impl FromFile {
    /// The guest runs for the first time; `idle` was spent waiting for somebody to watch it.
    pub(crate) fn runs(&mut self, idle: Duration) {
        self.took = Some(self.begun.elapsed().saturating_sub(idle));
    }

    /// All pages are there, or nobody needs them any more.
    pub(crate) fn let_go(&mut self) {
        self.rest = None;
    }

    /// Pages that have not been read, of how many.
    pub(crate) fn missing(&self) -> Option<(u64, u64)> {
        let (done, all) = self.rest.as_ref()?.progress();
        Some((all - done, all))
    }

    /// How it came.
    pub(crate) fn report(&self) -> RestoreReport {
        RestoreReport {
            reading: self.reading,
            why_eager: self.why_eager.clone(),
            restore_ms: self.took.map(|took| took.as_secs_f64() * 1e3),
            pages_missing: self.missing().map_or(0, |(missing, _)| missing),
        }
    }
}

/// How a guest is to come from a file.
pub(crate) struct Wanted<'a> {
    pub(crate) path: &'a Path,
    pub(crate) reading: Reading,
    /// Told when all pages are there, or that they never will be, unless the restore itself fails.
    pub(crate) on_end: Box<dyn FnOnce(Result<(), ApiError>) + Send>,
}

/// Builds a machine from a file; it is paused.
pub(crate) fn restore_from_file(
    build: &Build,
    wanted: Wanted<'_>,
) -> Result<(ArrivingMachine, FromFile), ApiError> {
    let begun = Instant::now();
    let Wanted {
        path,
        reading,
        on_end,
    } = wanted;
    let make = |configuration: &[u8]| build.build_for_peer(configuration);
    let refused = |error| refused("restore the guest in", path, &error);
    let came = |restored: Restored<ArrivingMachine>, why_eager: Option<String>| {
        let reading = match restored.rest {
            Some(_) => Reading::Lazy,
            None => Reading::Eager,
        };
        let from = FromFile {
            begun,
            reading,
            why_eager,
            took: None,
            rest: restored.rest,
        };
        (restored.machine, from)
    };
    let why = match (reading, &build.faults) {
        (Reading::Lazy, Ok(faults)) => {
            let lazy = LazyRestore {
                faults: faults.clone(),
                on_end: on_end_of(path, on_end),
            };
            let restored = file::restore_lazily(path, lazy, make).map_err(refused)?;
            let all_there = restored.rest.is_none();
            let why = "the file is of a format that has to be read as a whole";
            return Ok(came(restored, all_there.then(|| why.to_owned())));
        }
        (Reading::Lazy, Err(reason)) => Some(reason.clone()),
        (Reading::Eager, _) => None,
    };
    let machine = file::restore(path, make).map_err(refused)?;
    let rest = None;
    Ok(came(Restored { machine, rest }, why))
}

fn on_end_of(path: &Path, on_end: Box<dyn FnOnce(Result<(), ApiError>) + Send>) -> file::OnEnd {
    let path = path.to_owned();
    Box::new(move |end| {
        on_end(end.map_err(|error| refused("read the guest's memory from", &path, &error)));
    })
}

/// Looks into a file.
///
/// # Errors
/// [`ApiError`] when it is not a whole saved guest, or of a newer version.
pub fn describe_snapshot(path: &Path) -> Result<SnapshotReport, ApiError> {
    let summary = file::inspect(path).map_err(|error| refused("inspect", path, &error))?;
    Ok(SnapshotReport {
        format_version: summary.version,
        created: summary.created,
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
