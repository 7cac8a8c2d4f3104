//! Moves that break at random places leave one whole guest, or say that it is lost.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::path::{Path, PathBuf};

use dunlin_guest_migbench::Parameters;
use dunlin_testbed::guest;
use dunlin_testbed::mover::{Engine, Mover, Setup};
use dunlin_testbed::proxy::{Fault, Harm, Point};
use dunlin_testbed::soak::{Plan, RUNNING, Verdict, run, strike};

/// As many as take about a minute; `cargo xtask soak migration --runs 1000` takes more.
const RUNS: u64 = 24;

fn plan(binary: PathBuf, folder: &Path) -> Plan {
    let engine = Engine::best(&binary, &folder.join("engine")).unwrap();
    Plan {
        binary,
        folder: folder.join("hosts"),
        engine,
        modes: vec!["pre"],
        seed: 7,
        runs: 0..RUNS,
    }
}

fn memory_follows(plan: &Plan) -> bool {
    Mover::memory_follows(&Setup {
        binary: plan.binary.clone(),
        folder: plan.folder.clone(),
        engine: plan.engine,
        memory_mebibytes: 32,
        parameters: Parameters {
            fill_mebibytes: Some(4),
            ..Parameters::default()
        },
    })
}

#[test]
fn broken_moves_leave_one_whole_guest() {
    let Some(binary) = guest::binary() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut plan = plan(binary, folder.path());
    if memory_follows(&plan) {
        plan.modes.push("post");
    } else {
        eprintln!("SKIP: moves by post-copy: userfaultfd is not permitted here");
    }
    let summary = run(&plan, |number, text| eprintln!("{number}: {text}")).unwrap();
    assert_eq!((summary.ok, summary.failures), (RUNS, Vec::new()));
}

#[test]
fn a_guest_whose_source_died_says_what_it_lacks_and_can_be_stopped() {
    let Some(binary) = guest::binary() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let plan = plan(binary, folder.path());
    if !memory_follows(&plan) {
        eprintln!("SKIP: userfaultfd is not permitted here");
        return;
    }
    let (way, kind) = RUNNING;
    let fault = Fault {
        point: Point::Frame { way, kind, skip: 0 },
        harm: Harm::KillSource,
    };
    let verdict = strike(&plan, "post", fault).unwrap();
    assert_eq!(verdict, Verdict::LacksMemory);
}
