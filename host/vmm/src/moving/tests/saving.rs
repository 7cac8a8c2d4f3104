//! The same guest is saved while both processors run, and comes back under any engine.

use std::path::PathBuf;

use dunlin_api::ErrorCode;
use dunlin_api::snapshot::{Reading, SavePhase, SaveRequest};

use super::*;

fn request(to: PathBuf) -> SaveRequest {
    SaveRequest {
        to,
        live: true,
        without_disks: false,
    }
}

/// Said aloud where the host does not permit it.
fn permitted() -> bool {
    match open_faults() {
        Ok(faults) if faults.serves_writes() => true,
        Ok(_) => {
            eprintln!("SKIP: this kernel's userfaultfd does not serve writes to shared memory");
            false
        }
        Err(reason) => {
            eprintln!("SKIP: {reason}");
            false
        }
    }
}

/// The guest of a file, running, once all its pages are there.
fn restored(runtime: &Path, engine: EngineChoice, path: &Path) -> ArrivingMachine {
    let (sender, ends) = mpsc::channel();
    let wanted = Wanted {
        path,
        reading: Reading::Lazy,
        on_end: Box::new(move |end| sender.send(end).unwrap()),
    };
    let (guest, mut from_file) = restore_from_file(&build(runtime, engine), wanted).unwrap();
    guest.machine.resume().unwrap();
    both_count(guest.machine.memory());
    ends.recv_timeout(LIMIT).unwrap().unwrap();
    from_file.let_go();
    assert_eq!(from_file.report().reading, Reading::Lazy);
    assert_eq!(from_file.report().pages_missing, 0);
    guest
}

#[test]
fn both_processors_run_on_here_and_from_the_file_under_every_engine() {
    if !permitted() {
        return;
    }
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let owner = Owner::start(booted(folder.path(), engine));
        both_count(&owner.memory);
        let file = folder.path().join("saved");
        owner.ask(|reply| Message::Save(request(file.clone()), reply));
        let over = || owner.reach.saves.status().phase != SavePhase::Writing;
        until("the save ends", over);
        let status = owner.reach.saves.status();
        assert_eq!(status.phase, SavePhase::Done, "{status:?}");
        both_count(&owner.memory);
        for (index, other) in engines().into_iter().enumerate() {
            let runtime = folder.path().join(index.to_string());
            let guest = restored(&runtime, other, &file);
            both_count(guest.machine.memory());
            guest.machine.pause(DiskLocks::Keep).unwrap();
            assert_whole(guest.machine.memory());
        }
        let memory = owner.memory.clone();
        owner.ask(Message::Pause);
        assert_whole(&memory);
        owner.end();
    }
}

#[test]
fn a_guest_that_is_being_saved_is_not_moved_and_its_end_ends_the_save() {
    if !permitted() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (reach, inbox) = Reach::new();
    let (mailbox, saves) = (reach.mailbox.clone(), Arc::clone(&reach.saves));
    let lifecycle = lifecycle(booted(folder.path(), EngineChoice::Soft), reach, inbox);
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let (reply, begun) = oneshot::channel();
    mailbox.send(Message::Save(request(first.clone()), reply));
    // In the mailbox before the save's own requests.
    let to = format!(r#"{{"to":"unix:{}"}}"#, folder.path().join("x").display());
    let (reply, moved) = oneshot::channel();
    mailbox.send(Message::Migrate(serde_json::from_str(&to).unwrap(), reply));
    let (reply, paused) = oneshot::channel();
    mailbox.send(Message::Pause(reply));
    let (reply, saved) = oneshot::channel();
    mailbox.send(Message::Save(request(second.clone()), reply));
    mailbox.send(Message::End("the test is over"));
    lifecycle.run();
    begun.blocking_recv().unwrap().unwrap();
    for refusal in [
        moved.blocking_recv().unwrap().unwrap_err(),
        paused.blocking_recv().unwrap().unwrap_err(),
        saved.blocking_recv().unwrap().unwrap_err(),
    ] {
        assert_eq!(refusal.code, ErrorCode::Busy, "{refusal}");
        assert!(refusal.to_string().contains("being saved"), "{refusal}");
    }
    assert_eq!(saves.status().phase, SavePhase::Cancelled);
    assert!(!first.exists() && !second.exists());
}
