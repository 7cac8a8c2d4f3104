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
fn a_move_is_explained_beforehand_and_afterwards() {
    let (source, mut destination) = (Bed::new(), Bed::new());
    source.run("a", &guest::letters(), &[]);
    source.console("a").at_least(10);
    let to = destination.receive(&["--once"]);
    let only = source.json(&["migrate", "a", "--to", &to, "--explain=only"]);
    assert_eq!(source.json(&["ps"])["vms"][0]["state"], "running");
    assert_eq!(source.json(&["inspect", "a"])["migration"]["phase"], "none");
    assert_eq!(only["converges"], true, "{only}");
    assert_eq!(only["ram_bytes"], 8 << 20, "{only}");
    assert_eq!(only["goodput_source"], "assumed", "{only}");
    assert!(only["measured_ms"].as_f64().unwrap() >= 500.0, "{only}");
    // The counter's page, and what printing touches.
    let working_set = only["working_set_bytes"].as_u64().unwrap();
    assert!((4096..1 << 20).contains(&working_set), "{only}");
    let sent = only["bytes"].as_u64().unwrap();
    assert!((4096..8 << 20).contains(&sent), "{only}");
    let limited = ["--bandwidth", "1M", "--explain=only"];
    let limited = source.json(&[&["migrate", "a", "--to", &to], &limited[..]].concat());
    assert_eq!(limited["goodput_source"], "limit", "{limited}");
    let report = source.json(&["migrate", "a", "--to", &to, "--explain"]);
    assert_eq!(report["outcome"], "moved", "{report}");
    assert_eq!(report["prediction"]["converges"], true, "{report}");
    let figures = report["figures"].as_array().unwrap();
    let names: Vec<_> = figures.iter().map(|figure| &figure["name"]).collect();
    assert_eq!(names[..3], ["total_ms", "bytes", "blackout_ms"], "{report}");
    for figure in figures {
        let (expected, measured) = (&figure["predicted"], figure["measured"].as_f64().unwrap());
        let off = (expected.as_f64().unwrap() - measured) / measured * 100.0;
        assert!(
            (figure["off_percent"].as_f64().unwrap() - off).abs() < 1e-6,
            "{figure}"
        );
    }
    assert_no_gap(destination.console("a").at_least(100));
}

#[test]
fn a_paused_guest_is_not_explained_and_a_counted_one_waits() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    bed.json(&["pause", "a"]);
    let move_nowhere = [
        "migrate",
        "a",
        "--to",
        "tcp://127.0.0.1:1",
        "--explain=only",
    ];
    let text = bed.fails(&move_nowhere);
    assert!(text.contains("dunlin resume a"), "{text}");
    bed.json(&["resume", "a"]);
    assert_eq!(bed.json(&move_nowhere)["converges"], true);
    // What was measured with is off again.
    bed.json(&["inspect", "a"]);
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
