//! Moves that break at random places leave one whole guest, or say that it is lost.

use dunlin_testbed::guest;
use dunlin_testbed::mover::Engine;
use dunlin_testbed::soak::{Plan, run};

/// As many as take about a minute; `cargo xtask soak migration --runs 1000` takes more.
const RUNS: u64 = 24;

#[test]
fn broken_moves_leave_one_whole_guest() {
    let Some(binary) = guest::binary() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::best(&binary, &folder.path().join("engine")).unwrap();
    let plan = Plan {
        binary,
        folder: folder.path().join("hosts"),
        engine,
        modes: vec!["pre"],
        seed: 7,
        runs: 0..RUNS,
    };
    let summary = run(&plan, |number, text| eprintln!("{number}: {text}")).unwrap();
    assert_eq!((summary.ok, summary.failures), (RUNS, Vec::new()));
}
