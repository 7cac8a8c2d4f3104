//! Guests of a few bytes go from one process to another, and into a file and back.

use crate::support::{Bed, assert_no_gap, guest};

#[test]
fn a_guest_moves_and_counts_on() {
    let (source, mut destination) = (Bed::new(), Bed::new());
    source.run("a", &guest::letters(), &[]);
    let mut before = source.console("a");
    before.at_least(100);
    let to = destination.receive(&["--once"]);
    let report = source.json(&["migrate", "a", "--to", &to, "--verify"]);
    assert_eq!(report["outcome"], "moved", "{report}");
    assert_eq!(report["verified"], true, "{report}");
    assert!(source.is_empty());
    let mut after = destination.console("a");
    let printed = before.rest() + after.at_least(100);
    assert_no_gap(&printed);
    destination.json(&["stop", "a"]);
}

#[test]
fn a_moved_guest_moves_back() {
    let (mut first, mut second) = (Bed::new(), Bed::new());
    first.run("a", &guest::letters(), &[]);
    let there = second.receive(&[]);
    first.json(&["migrate", "a", "--to", &there]);
    let back = first.receive(&[]);
    second.json(&["migrate", "a", "--to", &back]);
    assert_no_gap(first.console("a").at_least(100));
    first.json(&["stop", "a"]);
}

#[test]
fn a_guest_moves_with_a_disk_that_both_sides_see() {
    let (mut source, mut destination) = (Bed::new(), Bed::new());
    let disk = source.folder().join("disk");
    std::fs::write(&disk, [0; 1 << 16]).unwrap();
    let disk = disk.to_str().unwrap();
    source.run("a", &guest::letters(), &["--disk", disk]);
    let to = destination.receive(&["--once"]);
    let report = source.json(&["migrate", "a", "--to", &to]);
    assert_eq!(report["outcome"], "moved", "{report}");
    destination.console("a").at_least(100);
    // The lock went with the guest, and comes back with it.
    let back = source.receive(&[]);
    let report = destination.json(&["migrate", "a", "--to", &back]);
    assert_eq!(report["outcome"], "moved", "{report}");
    source.console("a").at_least(100);
    source.json(&["stop", "a"]);
}

#[test]
fn a_move_to_nobody_leaves_the_guest_running() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    let text = bed.fails(&["migrate", "a", "--to", "tcp://127.0.0.1:1"]);
    assert!(text.contains("127.0.0.1:1"), "{text}");
    assert_eq!(bed.json(&["ps"])["vms"][0]["state"], "running");
    assert_eq!(bed.json(&["inspect", "a"])["migration"]["phase"], "failed");
    bed.console("a").at_least(100);
}

#[test]
fn a_destination_whose_name_is_taken_refuses() {
    let (source, mut destination) = (Bed::new(), Bed::new());
    source.run("a", &guest::letters(), &[]);
    destination.run("a", &guest::letters(), &[]);
    let to = destination.receive(&["--once"]);
    let text = source.fails(&["migrate", "a", "--to", &to]);
    assert!(text.contains("runs already"), "{text}");
    assert_eq!(source.json(&["ps"])["vms"][0]["state"], "running");
}

#[test]
fn a_paused_guest_is_not_moved() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    bed.json(&["pause", "a"]);
    let text = bed.fails(&["migrate", "a", "--to", "tcp://127.0.0.1:1"]);
    assert!(text.contains("dunlin resume a"), "{text}");
}

#[test]
fn a_saved_guest_counts_on() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    let mut before = bed.console("a");
    before.at_least(100);
    let file = bed.folder().join("saved");
    let path = file.to_str().unwrap();
    assert_eq!(
        bed.json(&["save", "a", "--to", path, "--stop"])["state"],
        "paused"
    );
    let printed = before.rest();
    let report = bed.json(&["inspect", path]);
    assert_eq!(report["config"]["name"], "a");
    assert!(!report["components"].as_array().unwrap().is_empty());
    bed.json(&["restore", path, "--name", "b", "--detach"]);
    let mut after = bed.console("b");
    assert_no_gap(&(printed + after.at_least(100)));
}

#[test]
fn a_guest_that_cannot_be_saved_runs_on() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    let file = bed.folder().join("nowhere").join("saved");
    let text = bed.fails(&["save", "a", "--to", file.to_str().unwrap()]);
    assert!(text.contains("nowhere"), "{text}");
    assert_eq!(bed.json(&["ps"])["vms"][0]["state"], "running");
    bed.console("a").at_least(100);
}

#[test]
fn a_file_is_not_overwritten_and_a_damaged_one_is_refused() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    let file = bed.folder().join("saved");
    let path = file.to_str().unwrap();
    bed.json(&["save", "a", "--to", path]);
    let text = bed.fails(&["save", "a", "--to", path]);
    assert!(text.contains(path), "{text}");
    bed.json(&["stop", "a"]);
    let whole = std::fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    for bytes in [
        &whole[..whole.len() - 1],
        &whole[..whole.len() / 2],
        &damaged,
    ] {
        std::fs::write(&file, bytes).unwrap();
        let text = bed.fails(&["restore", path, "--detach"]);
        assert!(text.contains("saved"), "{text}");
        assert!(bed.is_empty());
    }
}
