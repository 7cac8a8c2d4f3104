//! A guest with two processors that count in ring 3 goes from engine to engine.

use std::path::PathBuf;

use dunlin_guest_kvmtest::pair;

use crate::support::{Bed, Console, assert_no_gap};

const BASELINE: &str = "x86-64-v1";

/// Is there KVM? What is missing is said.
fn has_kvm(bed: &Bed) -> bool {
    let report = bed.json(&["probe"]);
    let mut offers = report["baselines"].as_array().unwrap().iter();
    let offer = offers.find(|offer| offer["name"] == BASELINE && offer["engine"] == "kvm");
    let offer = offer.unwrap();
    if offer["usable"] != true {
        eprintln!("SKIP: {offer}");
        return false;
    }
    true
}

fn kernel(bed: &Bed) -> PathBuf {
    let path = bed.folder().join("pair");
    std::fs::write(&path, pair::kernel()).unwrap();
    path
}

fn start(bed: &Bed, engine: &str, cpus: &str) {
    let status = bed.run_kernel((engine, BASELINE), "a", &kernel(bed), &["--cpus", cpus]);
    assert_eq!(status["engine"], engine, "{status}");
}

fn of_first(text: &str) -> String {
    text.chars().filter(char::is_ascii_lowercase).collect()
}

fn of_second(text: &str) -> String {
    let letters = text.chars().filter(char::is_ascii_uppercase);
    letters.map(|letter| letter.to_ascii_lowercase()).collect()
}

/// Waits until each processor has printed `count` letters more.
fn each_prints(console: &mut Console, count: usize, cpus: &str) {
    let (first, second) = {
        let text = console.at_least(0);
        (of_first(text).len(), of_second(text).len())
    };
    let mut length = 0;
    loop {
        let text = console.at_least(length + 1);
        length = text.len();
        let more = (of_first(text).len() - first, of_second(text).len() - second);
        if more.0 >= count && (more.1 >= count || cpus == "1") {
            return;
        }
    }
}

fn assert_both_counted_on(text: &str) {
    for letters in [of_first(text), of_second(text)] {
        assert_no_gap(&letters);
    }
}

/// Moves the guest along `engines`, there and back between two hosts; each processor's letters
/// have no gap from the first host to the last.
fn travels(engines: &[&str], cpus: &str) {
    let mut beds = [Bed::new(), Bed::new()];
    let [first, rest @ ..] = engines else {
        return;
    };
    start(&beds[0], first, cpus);
    let mut console = beds[0].console("a");
    let mut printed = String::new();
    for (hop, engine) in rest.iter().enumerate() {
        each_prints(&mut console, 20, cpus);
        let (here, there) = (hop % 2, (hop + 1) % 2);
        let to = beds[there].receive(&["--engine", engine, "--once"]);
        let report = beds[here].json(&["migrate", "a", "--to", &to, "--verify"]);
        assert_eq!(report["outcome"], "moved", "{report}");
        assert_eq!(report["verified"], true, "{report}");
        printed += &console.rest();
        console = beds[there].console("a");
        let status = beds[there].json(&["inspect", "a"]);
        assert_eq!(status["status"]["engine"], *engine, "{status}");
    }
    each_prints(&mut console, 20, cpus);
    printed += console.at_least(0);
    assert_both_counted_on(&printed);
}

#[test]
fn a_guest_moves_between_the_engines_and_back_and_counts_on() {
    if has_kvm(&Bed::new()) {
        travels(&["soft", "kvm", "soft", "kvm", "soft"], "1");
    }
}

#[test]
fn two_processors_move_between_the_engines_and_both_count_on() {
    if has_kvm(&Bed::new()) {
        travels(&["kvm", "soft", "kvm"], "2");
    }
}

#[test]
fn two_processors_move_under_one_engine_and_both_count_on() {
    travels(&["soft", "soft", "soft"], "2");
    if has_kvm(&Bed::new()) {
        travels(&["kvm", "kvm", "kvm"], "2");
    }
}

#[test]
fn a_guest_saved_under_one_engine_goes_on_under_the_other() {
    if !has_kvm(&Bed::new()) {
        return;
    }
    for (from, to) in [("soft", "kvm"), ("kvm", "soft")] {
        let bed = Bed::new();
        start(&bed, from, "2");
        let mut console = bed.console("a");
        each_prints(&mut console, 20, "2");
        let file = bed.folder().join("saved");
        let path = file.to_str().unwrap();
        bed.json(&["save", "a", "--to", path, "--stop"]);
        let mut printed = console.rest();
        let status = bed.json(&["restore", path, "--engine", to, "--detach"]);
        assert_eq!(status["engine"], to, "{status}");
        let mut console = bed.console("a");
        each_prints(&mut console, 20, "2");
        printed += console.at_least(0);
        assert_both_counted_on(&printed);
    }
}
