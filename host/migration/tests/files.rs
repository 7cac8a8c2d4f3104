//! Guests at rest.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use dunlin_migration::{SourceMachine, file};
use file::SnapshotError;
use support::{Conduct, DestinationSide, Load, SourceSide};

fn saved() -> (tempfile::TempDir, std::path::PathBuf, SourceSide) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest.dunlin");
    let mut machine = SourceSide::running(Load::SMALL);
    machine.pause().unwrap();
    let report = file::save(&mut machine, &path).unwrap();
    assert_eq!(report.file_bytes, std::fs::metadata(&path).unwrap().len());
    assert!(
        report.file_bytes < report.ram_bytes * 3 / 4,
        "zero pages take no room"
    );
    (directory, path, machine)
}

fn restore(path: &std::path::Path) -> Result<DestinationSide, SnapshotError> {
    file::restore(path, |configuration| {
        DestinationSide::build(configuration, Arc::new(Conduct::default()))
    })
}

#[test]
fn a_saved_guest_comes_back_whole() {
    let (directory, path, machine) = saved();
    let back = restore(&path).unwrap();
    assert_eq!(back.guest().counter(), machine.guest.counter());
    back.guest().assert_whole();
    back.guest().start();
    back.assert_runs_whole();
    let left = std::fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(left, 1, "no temporary file stays behind");
}

#[test]
fn a_saved_guest_can_be_inspected() {
    let (_directory, path, machine) = saved();
    let summary = file::inspect(&path).unwrap();
    assert_eq!(summary.ram_bytes, machine.guest.memory().size());
    assert_eq!(summary.components.len(), 1);
    assert_eq!(summary.components[0].name, "guest");
    assert!(summary.created > 1_600_000_000);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let (_directory, path, _machine) = saved();
    let length = std::fs::metadata(&path).unwrap().len();
    for share in 0..16 {
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(length - 1 - share * (length - 1) / 15)
            .unwrap();
        let error = restore(&path).err().unwrap();
        assert!(matches!(error, SnapshotError::NotWhole { .. }), "{error}");
        assert!(file::inspect(&path).is_err());
    }
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    let (_directory, path, _machine) = saved();
    let length = std::fs::metadata(&path).unwrap().len();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    for at in (0..200).chain((200..length).step_by((length / 60) as usize)) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
        assert!(restore(&path).is_err(), "byte {at}");
        file.write_all_at(&byte, at).unwrap();
    }
    restore(&path).unwrap();
}

#[test]
fn a_failed_save_leaves_what_was_there() {
    let (directory, path, mut machine) = saved();
    let missing = directory.path().join("missing").join("guest");
    assert!(file::save(&mut machine, &missing).is_err());
    restore(&path).unwrap();
}
