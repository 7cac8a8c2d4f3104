//! Another process of the same host goes on with a VM, without a copy of its memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{Bed, assert_no_gap, engine, guest};

/// Wide enough for a machine that does other things as well.
const WIDE: &str = "10s";

fn hand_over(bed: &Bed, name: &str) -> Value {
    let report = bed.json(&["handover", name, "--downtime", WIDE]);
    assert_eq!(report["outcome"], "moved", "{report}");
    report
}

fn pid_of(status: &Value) -> Pid {
    Pid::from_raw(i32::try_from(status["pid"].as_u64().unwrap()).unwrap()).unwrap()
}

/// Does the process run? One that has ended may wait for somebody to hear of it.
fn is_alive(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_guest_counts_on_in_another_process_and_its_console_keeps_its_history() {
    let bed = Bed::new();
    let first = bed.run("a", &guest::letters(), &[]);
    let mut before = bed.console("a");
    before.at_least(100);
    let report = hand_over(&bed, "a");
    let printed = before.rest();
    assert_eq!(report["from_pid"], first["pid"]);
    let status = &bed.json(&["ps"])["vms"][0];
    assert_eq!(status["pid"], report["pid"]);
    assert_ne!(status["pid"], first["pid"]);
    assert_eq!(status["state"], "running");
    assert_eq!(status["program"], env!("CARGO_PKG_VERSION"));
    assert!(!is_alive(pid_of(&first)));
    let pid = std::fs::read_to_string(bed.runtime().join("a/pid")).unwrap();
    assert_eq!(pid.trim(), report["pid"].to_string());
    let mut after = bed.console("a");
    let text = after.at_least(printed.len() + 100);
    assert!(text.starts_with(&printed));
    assert_no_gap(text);
    bed.json(&["stop", "a"]);
    assert!(bed.is_empty());
}

#[test]
fn a_killed_vm_that_was_handed_over_leaves_its_name_free() {
    let bed = Bed::new();
    bed.run("a", &guest::letters(), &[]);
    hand_over(&bed, "a");
    bed.json(&["stop", "--kill", "a"]);
    assert!(bed.is_empty());
    bed.run("a", &guest::letters(), &[]);
}

#[test]
fn a_hundred_processes_one_after_the_other_have_the_guest_and_lose_no_descriptor() {
    let bed = Bed::new();
    let (disk, debug) = (bed.folder().join("disk"), bed.folder().join("debug"));
    std::fs::write(&disk, [0; 1 << 16]).unwrap();
    let place = format!("file:{}", debug.display());
    let more = ["--disk", disk.to_str().unwrap(), "--debugcon", &place];
    let mut status = bed.run("a", &guest::letters(), &more);
    let descriptors = |status: &Value| {
        let folder = format!("/proc/{}/fd", status["pid"]);
        std::fs::read_dir(folder).unwrap().count()
    };
    let mut counts = vec![descriptors(&status)];
    for _ in 0..100 {
        let before = status;
        status = hand_over(&bed, "a");
        assert!(!is_alive(pid_of(&before)));
        counts.push(descriptors(&status));
    }
    // The first hand-over adds what a new process needs for it; the others add nothing.
    assert!(counts[100] <= counts[2] + 1, "{counts:?}");
    assert_no_gap(bed.console("a").at_least(100));
    // The disk was never free, and is not now.
    let kernel = guest::kernel(bed.folder(), &guest::letters());
    let mut second = vec!["run", "--name", "b", "--engine", engine(), "--detach"];
    second.extend([
        "--baseline",
        "x86-64-v1",
        "--kernel",
        kernel.to_str().unwrap(),
    ]);
    second.extend(["--disk", disk.to_str().unwrap()]);
    let text = bed.fails(&second);
    assert!(text.contains("in use by another VM"), "{text}");
    bed.json(&["stop", "a"]);
    assert!(bed.is_empty());
}

#[test]
fn the_debug_port_goes_on_on_the_same_connection() {
    let bed = Bed::new();
    let socket = bed.folder().join("debug.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let place = format!("unix:{}", socket.display());
    bed.run(
        "a",
        &guest::counts_on_the_debug_port(),
        &["--debugcon", &place],
    );
    let (mut stream, _) = listener.accept().unwrap();
    let mut bytes = vec![0; 500];
    stream.read_exact(&mut bytes).unwrap();
    for _ in 0..3 {
        hand_over(&bed, "a");
        let mut more = vec![0; 5000];
        stream.read_exact(&mut more).unwrap();
        bytes.extend(more);
    }
    for pair in bytes.windows(2) {
        assert_eq!(pair[1], pair[0].wrapping_add(1), "a byte is missing");
    }
    bed.json(&["stop", "a"]);
}

#[test]
fn a_command_in_the_foreground_ends_with_a_word_and_without_its_guest() {
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
        ])
        .args(["--engine", engine(), "--kernel"])
        .arg(kernel)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    let drained = child.stdout.take().unwrap();
    let reading = std::thread::spawn(move || std::io::read_to_string(drained).unwrap());
    let report = hand_over(&bed, "a");
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    let expected = format!("goes on in process {}", report["pid"]);
    assert!(said.contains(&expected), "{said}");
    reading.join().unwrap();
    // Nobody holds its life line any more, and it lives.
    let status = bed.json(&["ps"]);
    assert_eq!(status["vms"][0]["pid"], report["pid"]);
    let mut console = bed.console("a");
    console.at_least(200);
    bed.json(&["stop", "a"]);
}

#[test]
fn a_paused_vm_is_not_handed_over() {
    let bed = Bed::new();
    let status = bed.run("a", &guest::letters(), &[]);
    bed.json(&["pause", "a"]);
    let text = bed.fails(&["handover", "a"]);
    assert!(text.contains("dunlin resume a"), "{text}");
    bed.json(&["resume", "a"]);
    assert_eq!(bed.json(&["ps"])["vms"][0]["pid"], status["pid"]);
}

/// A process that waits for VM `a` of `bed`, started as the command line does it.
struct NewProcess {
    child: Child,
    socket: PathBuf,
    replies: BufReader<std::process::ChildStdout>,
}

impl NewProcess {
    fn start(bed: &Bed) -> Self {
        let spec = serde_json::json!({
            "version": 1, "runtime": bed.runtime(), "guest": {"hand-over": {"name": "a"}},
            "standard_input": "lifeline",
        });
        let mut child = bed
            .command(&["vm-process", &spec.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut replies = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        replies.read_line(&mut line).unwrap();
        let reply: Value = serde_json::from_str(&line).unwrap();
        let place = reply["listening"].as_str().unwrap();
        let socket = place.strip_prefix("unix:").unwrap().into();
        Self {
            child,
            socket,
            replies,
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Asks the VM's process to hand over to this one, on a connection of its own.
    fn ask(&self, bed: &Bed) -> UnixStream {
        let body = serde_json::json!({
            "to": self.socket, "pid": self.child.id(), "downtime_ms": 10_000,
        });
        let body = body.to_string();
        let mut stream = UnixStream::connect(bed.runtime().join("a/api.sock")).unwrap();
        write!(
            stream,
            "POST /v1/vm/handover HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        stream
    }

    /// Lets go of it as the command line does: it waits for no guest any more.
    fn let_go(&mut self) {
        drop(self.child.stdin.take());
    }

    /// What it says next; empty when it has ended.
    fn reply(&mut self) -> String {
        let mut line = String::new();
        self.replies.read_line(&mut line).unwrap();
        line
    }
}

#[test]
fn a_new_process_that_is_killed_before_it_has_the_guest_costs_nothing() {
    let bed = Bed::new();
    let status = bed.run("a", &guest::letters(), &[]);
    for _ in 0..5 {
        let mut new = NewProcess::start(&bed);
        // It accepts the connection, by the kernel, and never answers.
        kill_process(new.pid(), Signal::STOP).unwrap();
        let mut answer = new.ask(&bed);
        new.child.kill().unwrap();
        new.child.wait().unwrap();
        let mut text = String::new();
        answer.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 502"), "{text}");
        let now = &bed.json(&["ps"])["vms"][0];
        assert_eq!(
            (&now["pid"], &now["state"]),
            (&status["pid"], &"running".into())
        );
    }
    hand_over(&bed, "a");
    assert_no_gap(bed.console("a").at_least(100));
    bed.json(&["stop", "a"]);
    assert!(bed.is_empty());
}

#[test]
fn an_old_process_that_is_killed_after_it_gave_the_guest_away_costs_nothing() {
    let bed = Bed::new();
    for _ in 0..5 {
        let status = bed.run("a", &guest::letters(), &[]);
        let mut new = NewProcess::start(&bed);
        let _answer = new.ask(&bed);
        // The new process says so once it runs the guest; the old one is on its way out.
        let ready: Value = serde_json::from_str(&new.reply()).unwrap();
        let _gone_by_itself = kill_process(pid_of(&status), Signal::KILL);
        assert_eq!(ready["ready"]["pid"], new.child.id());
        let now = &bed.json(&["ps"])["vms"][0];
        assert_eq!(
            (&now["pid"], &now["state"]),
            (&new.child.id().into(), &"running".into())
        );
        bed.console("a").at_least(100);
        bed.json(&["stop", "a"]);
        assert!(new.child.wait().unwrap().success());
        assert!(bed.is_empty());
    }
}

#[test]
fn after_a_kill_at_any_moment_exactly_the_process_that_has_the_guest_runs_it() {
    let bed = Bed::new();
    let (mut stayed, mut went, mut died) = (0, 0, 0);
    for moment in 0..32u32 {
        let status = bed.run("a", &guest::letters(), &[]);
        let old = pid_of(&status);
        let mut new = NewProcess::start(&bed);
        let mut answer = new.ask(&bed);
        // A different moment each time, without a clock: so many looks at the process.
        for _ in 0..moment * moment * 150 {
            let _ = rustix::process::test_kill_process(old);
        }
        let kills_old = moment % 2 == 0;
        let victim = if kills_old { old } else { new.pid() };
        let _gone_by_itself = kill_process(victim, Signal::KILL);
        let mut text = String::new();
        let _cut = answer.read_to_string(&mut text);
        new.let_go();
        let survivor = if kills_old {
            new.reply().contains("ready").then(|| new.pid())
        } else {
            let gone = text.contains("HTTP/1.1 200") || text.contains("died with the guest");
            (!gone).then_some(old)
        };
        let running = bed.json(&["ps"])["vms"].as_array().unwrap().clone();
        match (survivor, running.as_slice()) {
            (Some(pid), [vm]) => {
                assert_eq!(vm["state"], "running", "{moment}: {text}");
                assert_eq!(pid_of(vm), pid, "{moment}: {text}");
                assert_no_gap(bed.console("a").at_least(50));
                bed.json(&["stop", "a"]);
                if pid == old { stayed += 1 } else { went += 1 }
            }
            // The victim had the guest; its name is free.
            (None, []) => died += 1,
            (survivor, running) => panic!("{moment}: {survivor:?}, {running:?}: {text}"),
        }
        let _gone = new.child.kill();
        let _reaped = new.child.wait();
    }
    eprintln!("stayed {stayed} times, went {went} times, died with its process {died} times");
}
