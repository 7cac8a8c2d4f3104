//! The life of a VM's process, with guests of a few bytes on the software CPU.

use std::process::Stdio;

use crate::support::{Bed, assert_no_gap, engine, guest};

#[test]
fn a_guest_in_the_foreground_prints_and_switches_itself_off() {
    let bed = Bed::new();
    let kernel = guest::kernel(bed.folder(), &guest::hello());
    let output = bed.output(&[
        "run",
        "--memory",
        "8M",
        "--baseline",
        "x86-64-v1",
        "--engine",
        engine(),
        "--kernel",
        kernel.to_str().unwrap(),
    ]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello\n");
    assert!(errors.contains("switched itself off"), "{errors}");
    assert!(bed.is_empty());
}

#[test]
fn a_guest_that_crashes_fails_the_command() {
    let bed = Bed::new();
    let kernel = guest::kernel(bed.folder(), &guest::crashes());
    let text = bed.fails(&[
        "run",
        "--memory",
        "8M",
        "--baseline",
        "x86-64-v1",
        "--engine",
        engine(),
        "--kernel",
        kernel.to_str().unwrap(),
    ]);
    assert!(text.contains("triple fault"), "{text}");
    bed.wait_until_empty();
}

#[test]
fn a_paused_guest_prints_nothing_and_goes_on_without_a_gap() {
    let bed = Bed::new();
    let status = bed.run("a", &guest::letters(), &[]);
    assert_eq!(status["state"], "running");
    let mut console = bed.console("a");
    console.at_least(50);
    assert_eq!(bed.json(&["pause", "a"])["state"], "paused");
    assert_eq!(bed.json(&["pause", "a"])["state"], "paused");
    // All that was printed before the pause is in the history of a new reader.
    let before = bed.json(&["inspect", "a"])["exits"]["cpus"][0]["port_writes"].clone();
    let after = bed.json(&["inspect", "a"])["exits"]["cpus"][0]["port_writes"].clone();
    assert_eq!(before, after);
    assert_eq!(bed.json(&["resume", "a"])["state"], "running");
    let printed = usize::try_from(before.as_u64().unwrap()).unwrap();
    assert_no_gap(console.at_least(printed + 50));
    assert_eq!(bed.json(&["ps"])["vms"][0]["name"], "a");
    bed.json(&["stop", "a"]);
    assert_no_gap(&console.rest());
    assert!(bed.is_empty());
}

#[test]
fn inspect_counts_exits_instructions_and_dirty_pages() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    bed.console("a").at_least(10);
    let report = bed.json(&["inspect", "a"]);
    let exits = &report["exits"];
    assert!(
        exits["cpus"][0]["port_writes"].as_u64().unwrap() >= 10,
        "{exits}"
    );
    if engine() == "soft" {
        assert!(
            exits["instructions_per_second"].as_f64().unwrap() > 0.0,
            "{exits}"
        );
    }
    assert!(
        exits["dirty_pages_per_second"].as_f64().unwrap() > 0.0,
        "{exits}"
    );
    assert_eq!(report["migration"]["phase"], "none");
}

#[test]
fn a_reboot_loads_the_kernel_again() {
    let bed = Bed::new();
    bed.run("a", &guest::reboots(), &[]);
    let mut console = bed.console("a");
    assert_eq!(&console.at_least(4)[..4], "RRRR");
    bed.json(&["stop", "a"]);
}

#[test]
fn a_reboot_ends_the_vm_where_that_was_asked() {
    let bed = Bed::new();
    let kernel = guest::kernel(bed.folder(), &guest::reboots());
    let output = bed.output(&[
        "run",
        "--memory",
        "8M",
        "--baseline",
        "x86-64-v1",
        "--engine",
        engine(),
        "--on-reboot",
        "stop",
        "--kernel",
        kernel.to_str().unwrap(),
    ]);
    assert!(output.status.success());
    assert_eq!(output.stdout, b"R");
}

#[test]
fn a_name_is_given_once() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    let kernel = guest::kernel(bed.folder(), &guest::letters());
    let text = bed.fails(&["run", "--name", "a", "--kernel", kernel.to_str().unwrap()]);
    assert!(text.contains("\"a\" runs already"), "{text}");
    bed.json(&["stop", "a"]);
}

#[test]
fn a_killed_vm_leaves_its_name_free() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    bed.json(&["stop", "--kill", "a"]);
    assert!(bed.is_empty());
    bed.run("a", &guest::letters(), &[]);
}

#[test]
fn a_foreground_vm_ends_with_its_command() {
    let bed = Bed::new();
    let kernel = guest::kernel(bed.folder(), &guest::letters());
    let mut child = bed
        .command(&[
            "run",
            "--name",
            "a",
            "--memory",
            "8M",
            "--baseline",
            "x86-64-v1",
            "--engine",
            engine(),
            "--kernel",
        ])
        .arg(kernel)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    // Killed by force: it cannot tidy up, and the VM ends all the same.
    child.kill().unwrap();
    child.wait().unwrap();
    bed.wait_until_empty();
}

#[test]
fn an_interrupt_stops_a_foreground_vm() {
    let bed = Bed::new();
    let kernel = guest::kernel(bed.folder(), &guest::letters());
    let mut child = bed
        .command(&[
            "run",
            "--name",
            "a",
            "--memory",
            "8M",
            "--baseline",
            "x86-64-v1",
            "--engine",
            engine(),
            "--kernel",
        ])
        .arg(kernel)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    // Read on, so that it is not held up by us.
    std::io::Read::read_to_end(child.stdout.as_mut().unwrap(), &mut Vec::new()).unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(bed.is_empty());
}

#[test]
fn a_vm_process_is_confined_while_it_runs() {
    let bed = Bed::new();
    let status = bed.run("a", &guest::letters(), &[]);
    let threads = format!("/proc/{}/task", status["pid"]);
    let mut looked_at = 0;
    for thread in std::fs::read_dir(threads).unwrap() {
        let Ok(text) = std::fs::read_to_string(thread.unwrap().path().join("status")) else {
            // A thread that has ended since the folder was read.
            continue;
        };
        looked_at += 1;
        let field = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(field("NoNewPrivs:"), "1", "{text}");
        assert_eq!(field("Seccomp:"), "2", "{text}");
        assert_eq!(field("CapEff:"), "0000000000000000", "{text}");
        assert_eq!(field("CapPrm:"), "0000000000000000", "{text}");
    }
    assert!(looked_at >= 2, "the main thread and the vCPU's at least");
}
