//! A guest goes only where its CPU baseline can be given.

use serde_json::Value;

use crate::support::{Bed, guest};

/// The newest of those that the software CPU has on every host.
const NEWEST: &str = "x86-64-v2";
/// One whose instructions the host has to have.
const BY_THE_HOST: &str = "x86-64-v3";

/// What KVM lacks here of the newest baseline; `None`, said aloud, where it lacks nothing or
/// there is no KVM.
fn missing_under_kvm(bed: &Bed) -> Option<String> {
    let report = bed.json(&["probe"]);
    let mut offers = report["baselines"].as_array().unwrap().iter();
    let offer = offers.find(|offer| offer["name"] == NEWEST && offer["engine"] == "kvm");
    let missing = offer.unwrap()["missing"].as_array().cloned();
    let names: Vec<String> = missing
        .into_iter()
        .flatten()
        .map(|name| name.as_str().unwrap().to_owned())
        .collect();
    if names.is_empty() {
        eprintln!(
            "SKIP: no baseline that KVM lacks something of: {:?}",
            report["baselines"]
        );
        return None;
    }
    Some(names.join(", "))
}

fn refusal(missing: &str) -> String {
    format!("cannot give baseline {NEWEST} under kvm: it lacks {missing}")
}

#[test]
fn the_probe_lists_each_baseline_under_each_engine() {
    let report = Bed::new().json(&["probe"]);
    let offers = report["baselines"].as_array().unwrap();
    for name in ["x86-64-v1", NEWEST, BY_THE_HOST] {
        for engine in ["soft", "kvm"] {
            let mut of = offers.iter();
            let of = of.find(|offer| offer["name"] == name && offer["engine"] == engine);
            let offer = of.unwrap_or(&Value::Null);
            let lacks = offer["missing"].is_array() || offer["reason"].is_string();
            assert_eq!(offer["usable"], !lacks, "{offer}");
            let always = engine == "soft" && name != BY_THE_HOST;
            assert!(!always || offer["usable"] == true, "{offer}");
        }
    }
}

#[test]
fn a_baseline_that_nobody_knows_is_refused_by_name() {
    let bed = Bed::new();
    let kernel = guest::kernel(bed.folder(), &guest::letters());
    let kernel = kernel.to_str().unwrap();
    let text = bed.fails(&["run", "--baseline", "x86-64-v9", "--kernel", kernel]);
    assert!(text.contains("\"x86-64-v9\" is not known here"), "{text}");
    assert!(text.contains(NEWEST), "{text}");
    assert!(text.contains("dunlin probe"), "{text}");
}

#[test]
fn a_destination_that_lacks_features_names_them_and_the_guest_runs_on() {
    let (source, mut destination) = (Bed::new(), Bed::new());
    let Some(missing) = missing_under_kvm(&source) else {
        return;
    };
    source.run_as(("soft", NEWEST), "a", &guest::letters(), &[]);
    source.console("a").at_least(10);
    let to = destination.receive(&["--engine", "kvm"]);
    let text = source.fails(&["migrate", "a", "--to", &to]);
    assert!(text.contains(&refusal(&missing)), "{text}");
    let report = source.json(&["inspect", "a"]);
    assert_eq!(report["status"]["state"], "running", "{report}");
    // Refused before the first page.
    let moved = &report["migration"]["report"];
    assert_eq!(moved["pages"], 0, "{report}");
    assert_eq!(
        moved["rounds"].as_array().map(Vec::len),
        Some(0),
        "{report}"
    );
    let printed = source.console("a").at_least(10).len();
    source.console("a").at_least(printed + 100);
    // The same destination still takes the next guest, whose baseline it has.
    source.run_as(("soft", "x86-64-v1"), "b", &guest::letters(), &[]);
    let report = source.json(&["migrate", "b", "--to", &to]);
    assert_eq!(report["outcome"], "moved", "{report}");
}

#[test]
fn running_and_restoring_are_refused_in_the_same_words() {
    let bed = Bed::new();
    let Some(missing) = missing_under_kvm(&bed) else {
        return;
    };
    let kernel = guest::kernel(bed.folder(), &guest::letters());
    let kernel = kernel.to_str().unwrap();
    let text = bed.fails(&[
        "run",
        "--engine",
        "kvm",
        "--baseline",
        NEWEST,
        "--kernel",
        kernel,
    ]);
    assert!(text.contains(&refusal(&missing)), "{text}");
    assert!(text.contains("dunlin probe"), "{text}");
    // Without a name it is the newest one, which goes into the file by its name.
    bed.json(&[
        "run", "--engine", "soft", "--kernel", kernel, "--name", "a", "--detach", "--memory", "8M",
    ]);
    let file = bed.folder().join("saved");
    let path = file.to_str().unwrap();
    bed.json(&["save", "a", "--to", path, "--stop"]);
    assert_eq!(bed.json(&["inspect", path])["config"]["baseline"], NEWEST);
    let text = bed.fails(&["restore", path, "--engine", "kvm", "--detach"]);
    assert!(text.contains(&refusal(&missing)), "{text}");
    assert!(bed.is_empty());
    bed.json(&["restore", path, "--engine", "soft", "--detach"]);
}

#[test]
fn a_guest_with_avx_runs_or_the_features_that_the_host_lacks_are_named() {
    let bed = Bed::new();
    let report = bed.json(&["probe"]);
    let mut offers = report["baselines"].as_array().unwrap().iter();
    let offer = offers.find(|offer| offer["name"] == BY_THE_HOST && offer["engine"] == "soft");
    let offer = offer.unwrap();
    if offer["usable"] == true {
        bed.run_as(("soft", BY_THE_HOST), "a", &guest::letters(), &[]);
        bed.console("a").at_least(10);
        return;
    }
    let kernel = guest::kernel(bed.folder(), &guest::letters());
    let kernel = kernel.to_str().unwrap();
    let options = ["run", "--engine", "soft", "--baseline", BY_THE_HOST];
    let text = bed.fails(&[&options[..], &["--kernel", kernel]].concat());
    for name in offer["missing"].as_array().unwrap() {
        assert!(text.contains(name.as_str().unwrap()), "{text}");
    }
}
