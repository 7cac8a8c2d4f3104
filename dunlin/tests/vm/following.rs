//! Guests whose memory follows them from one process to another.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Bed, assert_no_gap, guest};

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(60);

/// What a move by post-copy says of that. `None`, aloud, where the host does not permit it.
fn post_copy(report: &Value) -> Option<&Value> {
    if let Some(reason) = report["no_post_copy"].as_str() {
        eprintln!("SKIP: {reason}");
        return None;
    }
    Some(&report["post_copy"])
}

#[test]
fn a_guest_goes_first_and_its_memory_follows() {
    let (source, mut destination) = (Bed::new(), Bed::new());
    source.run("a", &guest::laps(), &[]);
    let mut before = source.console("a");
    before.at_least(100);
    let to = destination.receive(&["--once"]);
    let report = source.json(&["migrate", "a", "--to", &to, "--mode", "post", "--verify"]);
    assert_eq!(report["outcome"], "moved", "{report}");
    assert_eq!(report["verified"], true, "{report}");
    assert!(source.is_empty());
    let printed = before.rest() + destination.console("a").at_least(100);
    assert_no_gap(&printed);
    if let Some(counts) = post_copy(&report) {
        assert!(counts["missing_pages"].as_u64().unwrap() > 0, "{report}");
        assert_eq!(counts["recoveries"], 0, "{report}");
    }
    destination.json(&["stop", "a"]);
}

/// Starts a move that takes some seconds.
fn slowly(source: &Bed, to: &str, more: &[&str]) -> JoinHandle<std::process::Output> {
    let arguments = ["migrate", "a", "--to", to, "--mode", "post"];
    let mut command = source.command(&arguments);
    command.args([
        "--bandwidth",
        "2M",
        "--compress",
        "off",
        "--downtime",
        "5s",
        "--json",
    ]);
    command.args(more);
    std::thread::spawn(move || command.output().unwrap())
}

fn report(move_: JoinHandle<std::process::Output>) -> Value {
    let output = move_.join().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    serde_json::from_str(text.trim()).unwrap()
}

/// Waits until the guest runs at `bed` while pages are missing; false when it never does.
fn arrives_without_all_pages(bed: &Bed, move_: &JoinHandle<std::process::Output>) -> bool {
    let end = Instant::now() + LIMIT;
    while !move_.is_finished() {
        assert!(Instant::now() < end, "the guest does not arrive");
        let vms = bed.json(&["ps"]);
        if vms["vms"][0]["missing_pages"]
            .as_u64()
            .is_some_and(|n| n > 0)
        {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

/// Runs a command that has to be refused as long as pages are missing; all may have come meanwhile.
fn refused_while_it_arrives(bed: &Bed, arguments: &[&str]) {
    let output = bed.output(arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    let refused = !output.status.success() && text.contains("still arriving");
    let missing = bed.json(&["ps"])["vms"][0]["missing_pages"].as_u64();
    assert!(
        refused || missing.unwrap_or(0) == 0,
        "{arguments:?}: {text}"
    );
}

#[test]
fn while_memory_arrives_the_guest_pauses_and_goes_on_but_does_not_move_on() {
    let (source, mut destination) = (Bed::new(), Bed::new());
    source.run("a", &guest::laps(), &[]);
    source.console("a").at_least(100);
    let to = destination.receive(&["--once"]);
    let moving = slowly(&source, &to, &[]);
    if arrives_without_all_pages(&destination, &moving) {
        refused_while_it_arrives(&destination, &["migrate", "a", "--to", "tcp://127.0.0.1:1"]);
        let file = destination.folder().join("saved");
        let save = ["save", "a", "--to", file.to_str().unwrap()];
        refused_while_it_arrives(&destination, &save);
        assert_eq!(destination.json(&["pause", "a"])["state"], "paused");
        assert_eq!(destination.json(&["resume", "a"])["state"], "running");
    }
    let report = report(moving);
    assert_eq!(report["outcome"], "moved", "{report}");
    post_copy(&report);
    assert_no_gap(destination.console("a").at_least(100));
    let vm = &destination.json(&["ps"])["vms"][0];
    assert_eq!(vm["missing_pages"], Value::Null, "{vm}");
    destination.json(&["stop", "a"]);
}

#[test]
fn a_guest_that_is_stopped_while_its_memory_arrives_is_given_up_at_its_source() {
    let (source, mut destination) = (Bed::new(), Bed::new());
    source.run("a", &guest::laps(), &[]);
    let to = destination.receive(&["--once"]);
    let moving = slowly(&source, &to, &[]);
    let early = arrives_without_all_pages(&destination, &moving);
    destination.json(&["stop", "a"]);
    let report = report(moving);
    assert_eq!(report["outcome"], "moved", "{report}");
    if early {
        post_copy(&report);
    }
    destination.wait_until_empty();
    source.wait_until_empty();
}

/// Passes TCP connections on, and breaks all that there are once.
struct Breaker {
    address: String,
    fuse: Arc<Fuse>,
}

struct Fuse {
    /// Bytes until it blows.
    left: AtomicI64,
    blown: AtomicBool,
    /// Nobody is let through after that.
    for_good: AtomicBool,
}

impl Breaker {
    fn new(to: &str) -> Self {
        let to = to.trim_start_matches("tcp://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp://{}", listener.local_addr().unwrap());
        let fuse = Arc::new(Fuse {
            left: AtomicI64::new(i64::MAX),
            blown: AtomicBool::new(false),
            for_good: AtomicBool::new(false),
        });
        let shared = Arc::clone(&fuse);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(near), Ok(far)) = (stream, TcpStream::connect(&to)) else {
                    continue;
                };
                // Whoever comes after the break is let through, unless it is for good.
                let blown = shared.blown.load(Ordering::SeqCst);
                if blown && shared.for_good.load(Ordering::SeqCst) {
                    continue;
                }
                let fuse = (!blown).then(|| Arc::clone(&shared));
                for (from, into) in [(&near, &far), (&far, &near)] {
                    let (from, into) = (from.try_clone().unwrap(), into.try_clone().unwrap());
                    let fuse = fuse.clone();
                    std::thread::spawn(move || pass(from, into, fuse.as_deref()));
                }
            }
        });
        Self { address, fuse }
    }

    /// Connections break after so many bytes more.
    fn arm(&self, bytes: i64) {
        self.fuse.left.store(bytes, Ordering::SeqCst);
    }
}

fn pass(mut from: TcpStream, mut into: TcpStream, fuse: Option<&Fuse>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if let Some(fuse) = fuse {
            let left = fuse.left.fetch_sub(count as i64, Ordering::SeqCst);
            if left < count as i64 {
                fuse.blown.store(true, Ordering::SeqCst);
                break;
            }
        }
        if into.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    // The other side, or the other direction, may have ended it.
    let _gone = from.shutdown(Shutdown::Both);
    let _gone = into.shutdown(Shutdown::Both);
}

#[test]
fn a_guest_gets_the_rest_of_its_memory_over_new_connections() {
    let (source, mut destination) = (Bed::new(), Bed::new());
    source.run("a", &guest::laps(), &[]);
    let mut before = source.console("a");
    before.at_least(100);
    let to = destination.receive(&["--once"]);
    let breaker = Breaker::new(&to);
    let moving = slowly(&source, &breaker.address, &[]);
    let early = arrives_without_all_pages(&destination, &moving);
    breaker.arm(300 << 10);
    let report = report(moving);
    assert_eq!(report["outcome"], "moved", "{report}");
    let printed = before.rest() + destination.console("a").at_least(100);
    assert_no_gap(&printed);
    if early && let Some(counts) = post_copy(&report) {
        assert!(counts["recoveries"].as_u64().unwrap() >= 1, "{report}");
    }
    destination.json(&["stop", "a"]);
}

#[test]
fn a_guest_whose_memory_does_not_come_back_in_time_is_given_up_on_both_sides() {
    let (source, mut destination) = (Bed::new(), Bed::new());
    source.run("a", &guest::laps(), &[]);
    source.console("a").at_least(100);
    let window = ["--reconnect-window", "1s"];
    let to = destination.receive(&["--once", window[0], window[1]]);
    let breaker = Breaker::new(&to);
    breaker.fuse.for_good.store(true, Ordering::SeqCst);
    let moving = slowly(&source, &breaker.address, &window);
    if !arrives_without_all_pages(&destination, &moving) {
        post_copy(&report(moving));
        destination.json(&["stop", "a"]);
        return;
    }
    breaker.arm(100 << 10);
    let output = moving.join().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("within 1 s"), "{said}");
    destination.wait_until_empty();
    // Its state at the hand-over is left to whoever decides.
    source.json(&["stop", "a"]);
}
