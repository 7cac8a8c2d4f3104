//! A whole machine, without a guest.

use std::fs::File;

use dunlin_api::{DebugConsoleConfig, DiskConfig, EngineChoice, NetConfig, OnReboot};

use super::*;
use crate::console::ConsoleHub;

fn blueprint(folder: &std::path::Path) -> Blueprint {
    let disk = folder.join("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    Blueprint {
        config: VmConfig {
            version: dunlin_api::VERSION,
            name: "a".parse().unwrap(),
            kernel: "/nowhere".into(),
            initrd: None,
            modules: Vec::new(),
            command_line: String::new(),
            memory_bytes: 4 << 20,
            cpus: 2,
            disks: vec![DiskConfig {
                path: disk,
                read_only: false,
            }],
            nets: vec![NetConfig {
                switch: folder.join("switch"),
                mac: None,
            }],
            engine: EngineChoice::Soft,
            baseline: None,
            on_reboot: OnReboot::Restart,
            debug_console: Some(DebugConsoleConfig::File(folder.join("debug"))),
            debug_exit: None,
            legacy: true,
            verify: false,
        },
        directory: folder.to_owned(),
        console: ConsoleHub::new(),
        events: events::MachineEvents::new(|_| {}),
    }
}

#[test]
fn nothing_of_a_dropped_machine_stays() {
    let folder = tempfile::tempdir().unwrap();
    let blueprint = blueprint(folder.path());
    let machine = assemble(&blueprint).unwrap();
    let ram = Arc::clone(machine.memory().file());
    let sockets = || {
        let entries = std::fs::read_dir(folder.path()).unwrap().flatten();
        entries
            .filter(|e| e.path().extension() == Some("port".as_ref()))
            .count()
    };
    assert_eq!(sockets(), 1);
    drop(machine);
    blueprint.console.close();
    // vm-memory's mappings hold the file too, so a count of one says that all are gone.
    assert_eq!(Arc::strong_count(&ram), 1);
    assert_eq!(sockets(), 0);
}

#[test]
fn a_state_fits_another_machine_of_the_same_kind_only() {
    let folder = tempfile::tempdir().unwrap();
    let blueprint = blueprint(folder.path());
    let source = assemble(&blueprint).unwrap();
    let states = source.save().unwrap();
    let destination = assemble(&blueprint).unwrap();
    destination.restore(states.clone()).unwrap();

    let mut fewer = states.clone();
    fewer.pop();
    assert!(matches!(
        destination.restore(fewer),
        Err(StateError::Missing { .. })
    ));
    let mut twice = states.clone();
    twice.push(states[0].clone());
    assert!(matches!(
        destination.restore(twice),
        Err(StateError::Twice { .. })
    ));
    let mut foreign = states.clone();
    foreign.push(dunlin_guest::SavedState {
        name: "floppy".into(),
        ..states[0].clone()
    });
    assert!(destination.restore(foreign).is_err());
    let mut damaged = states;
    damaged[0].body.truncate(3);
    assert!(destination.restore(damaged).is_err());
}

#[test]
fn a_disk_is_locked_by_the_machine_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let mut blueprint = blueprint(folder.path());
    blueprint.config.cpus = 1;
    let first = assemble(&blueprint).unwrap();
    let second = assemble(&blueprint).unwrap();
    first.lock_disks().unwrap();
    assert!(matches!(second.resume(), Err(MachineFailure::Lock(_))));
    first.pause(DiskLocks::Release).unwrap();
    second.lock_disks().unwrap();
}

#[test]
fn a_restored_machine_leaves_the_disk_to_the_source_until_it_starts() {
    let folder = tempfile::tempdir().unwrap();
    let mut blueprint = blueprint(folder.path());
    blueprint.config.cpus = 1;
    let source = assemble(&blueprint).unwrap();
    source.lock_disks().unwrap();
    source.pause(DiskLocks::Release).unwrap();
    let states = source.save().unwrap();
    let destination = assemble(&blueprint).unwrap();
    destination.restore(states).unwrap();
    // The switch-over is taken back: the source locks its disk again.
    source.lock_disks().unwrap();
    assert!(matches!(destination.resume(), Err(MachineFailure::Lock(_))));
}
