//! Moves during which something breaks: how many of them leave one whole guest, or say that it is
//! lost.

use anyhow::bail;

use super::Bench;
use crate::bench::Row;
use dunlin_testbed::soak::{self, Plan};

/// Faults are drawn from this; any other will do.
const SEED: u64 = 1;

pub(super) fn run(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let runs = bench.runs(1000, 12);
    if !bench.moves_behind_the_guest() {
        bail!("memory cannot follow a guest here");
    }
    let modes = vec!["pre", "post"];
    let plan = Plan {
        binary: bench.binary.clone(),
        folder: bench.folder.join("faults"),
        engine: bench.engine,
        modes,
        seed: SEED,
        runs: 0..runs,
    };
    let summary = soak::run(&plan, |_, _| {})?;
    let (ok, all) = (summary.ok as f64, summary.runs as f64);
    let mut row = Row::exactly("faults_ok", "moves", all, ok, summary.runs as usize);
    row.why = Some(match summary.failures.first() {
        Some(failure) => failure.clone(),
        None => format!("{:?}, modes {}", summary.verdicts, plan.modes.join(" and ")),
    });
    Ok(vec![
        row,
        Row::information("faults_missed", "moves", &[summary.missed as f64]),
    ])
}
