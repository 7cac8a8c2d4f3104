//! Guests of a few bytes, saved to files and restored from them.

use crate::support::{Bed, assert_no_gap, guest};

/// Saved by the release that wrote format version 1, while the guest of
/// [`crate::support::guest::letters`] was about to print a `p`.
const VERSION_1: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/vm/fixtures/version-1.saved"
);

#[test]
fn a_guest_saved_by_the_previous_release_runs_on_from_where_it_was() {
    let bed = Bed::new();
    assert_eq!(
        bed.json(&["inspect", VERSION_1])["config"]["name"],
        "letters"
    );
    bed.json(&["restore", VERSION_1, "--detach"]);
    let mut console = bed.console("letters");
    let printed = console.at_least(100);
    assert!(printed.starts_with('p'), "{printed}");
    assert_no_gap(printed);
    bed.json(&["stop", "letters"]);
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
    for (name, more) in [("b", None), ("c", Some("--eager"))] {
        let mut arguments = vec!["restore", path, "--name", name, "--detach"];
        arguments.extend(more);
        let status = bed.json(&arguments);
        let restore = &status["restore"];
        assert!(restore["restore_ms"].as_f64().unwrap() > 0.0, "{status}");
        match (more, restore["why_eager"].as_str()) {
            (Some(_), _) => assert_eq!(restore["reading"], "eager", "{status}"),
            (_, None) => assert_eq!(restore["reading"], "lazy", "{status}"),
            (_, Some(why)) => eprintln!("SKIP: {why}"),
        }
        let mut after = bed.console(name);
        assert_no_gap(&(printed.clone() + after.at_least(100)));
    }
}

#[test]
fn a_guest_whose_file_is_damaged_ends_and_says_why() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    bed.console("a").at_least(10);
    let file = bed.folder().join("saved");
    let path = file.to_str().unwrap();
    bed.json(&["save", "a", "--to", path, "--stop"]);
    let whole = std::fs::read(&file).unwrap();
    // Each page of content: the head and the states come before, the page table behind.
    let table = u64::from_le_bytes(whole[24..32].try_into().unwrap()) as usize;
    let pages: Vec<_> = (0..table).step_by(4096).skip(2).collect();
    assert!(pages.len() > 3, "{pages:?}");
    for &page in &pages {
        let mut damaged = whole.clone();
        damaged[page + 100] ^= 1;
        std::fs::write(&file, damaged).unwrap();
        let text = bed.fails(&["restore", path]);
        assert!(text.contains("damaged"), "{text}");
        bed.wait_until_empty();
    }
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
        let text = bed.fails(&["restore", path, "--detach", "--eager"]);
        assert!(text.contains("saved"), "{text}");
        assert!(bed.is_empty());
    }
}

/// Saves a running guest; `None`, said aloud, where the host does not permit that.
fn save_live(bed: &Bed, path: &str, more: &[&str]) -> Option<serde_json::Value> {
    let mut arguments = vec!["save", "a", "--to", path, "--live", "--json"];
    arguments.extend(more);
    let output = bed.output(&arguments);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let refusal = value["error"]["message"].as_str().unwrap_or_default();
    if refusal.contains("userfaultfd") {
        eprintln!("SKIP: {refusal}");
        return None;
    }
    assert!(output.status.success(), "{value}");
    Some(value)
}

#[test]
fn a_guest_that_is_saved_live_runs_on_and_so_does_its_copy() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    let mut console = bed.console("a");
    console.at_least(100);
    let files = ["first", "second"].map(|name| bed.folder().join(name));
    for (file, copy) in files.iter().zip(["b", "c"]) {
        let path = file.to_str().unwrap();
        let Some(report) = save_live(&bed, path, &[]) else {
            return;
        };
        assert_eq!(report["state"], "running", "{report}");
        assert!(report["pause_ms"].as_f64().unwrap() > 0.0, "{report}");
        assert!(report["pages"].as_u64().unwrap() > 0, "{report}");
        bed.json(&["restore", path, "--name", copy, "--detach"]);
        assert_no_gap(bed.console(copy).at_least(100));
    }
    bed.json(&["stop", "a"]);
    assert_no_gap(&console.rest());
}

#[test]
fn a_guest_that_writes_to_disks_is_saved_live_only_when_told() {
    let bed = Bed::new();
    let disk = bed.folder().join("disk");
    std::fs::write(&disk, [0; 1 << 16]).unwrap();
    bed.run("a", &guest::letters(), &["--disk", disk.to_str().unwrap()]);
    let file = bed.folder().join("saved");
    let path = file.to_str().unwrap();
    let Some(_) = save_live(&bed, path, &["--without-disks"]) else {
        return;
    };
    let other = bed.folder().join("other");
    let text = bed.fails(&["save", "a", "--to", other.to_str().unwrap(), "--live"]);
    assert!(
        text.contains("disk") && text.contains("--without-disks"),
        "{text}"
    );
    assert!(!other.exists());
    // The disk is still the running guest's.
    let text = bed.fails(&["restore", path, "--name", "b", "--detach"]);
    assert!(text.contains("lock") || text.contains("use"), "{text}");
    bed.console("a").at_least(100);
}

#[test]
fn a_guest_that_cannot_be_saved_live_runs_on_or_stays_paused() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    let nowhere = bed.folder().join("nowhere").join("saved");
    bed.fails(&["save", "a", "--to", nowhere.to_str().unwrap(), "--live"]);
    assert_eq!(bed.json(&["ps"])["vms"][0]["state"], "running");
    bed.console("a").at_least(100);
    bed.json(&["pause", "a"]);
    let file = bed.folder().join("saved");
    let text = bed.fails(&["save", "a", "--to", file.to_str().unwrap(), "--live"]);
    assert!(text.contains("without --live"), "{text}");
    assert_eq!(bed.json(&["ps"])["vms"][0]["state"], "paused");
    assert!(!file.exists());
}
