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
