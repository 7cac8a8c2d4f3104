//! How long a guest stands still when it changes hosts, as its own ticks show it.

use anyhow::bail;
use dunlin_guest_migbench::Parameters;

use super::Bench;
use crate::bench::{Row, percentile};
use dunlin_testbed::mover::Mover;

const MEBIBYTES: u64 = 256;

fn idle_guest() -> Parameters {
    Parameters::default()
}

fn busy_guest() -> Parameters {
    Parameters {
        working_set_mebibytes: 64,
        rate_mebibytes: 200,
        ..Parameters::default()
    }
}

pub(super) fn idle(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    median_and_tail(bench, "idle", idle_guest())
}

pub(super) fn busy(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    median_and_tail(bench, "busy", busy_guest())
}

/// What was seen of some moves of one guest, in milliseconds.
#[derive(Default)]
struct Seen {
    blackout: Vec<f64>,
    control: Vec<f64>,
    worst: Vec<f64>,
    reported: Vec<f64>,
    total: Vec<f64>,
}

impl Seen {
    fn hop(&mut self, mover: &mut Mover, arguments: &[&str]) -> anyhow::Result<()> {
        let hop = mover.hop(arguments, &[])?;
        self.blackout.extend(hop.blackout_ms);
        self.control.extend(hop.control_ms);
        self.worst.extend(hop.worst_gap_ms);
        self.reported.extend(hop.report["blackout_ms"].as_f64());
        self.total.extend(hop.report["total_ms"].as_f64());
        Ok(())
    }

    /// The distribution, for the record.
    fn information(&self, name: &str) -> Vec<Row> {
        let mut rows = Vec::new();
        for (kind, values) in [
            ("blackout", &self.blackout),
            ("control", &self.control),
            ("worst_gap", &self.worst),
            ("reported_blackout", &self.reported),
            ("total", &self.total),
        ] {
            rows.push(Row::information(&format!("{name}_{kind}_ms"), "ms", values));
        }
        rows
    }
}

fn median_and_tail(bench: &Bench, name: &str, parameters: Parameters) -> anyhow::Result<Vec<Row>> {
    let mut mover = Mover::start(&bench.setup(name, MEBIBYTES, parameters))?;
    let mut seen = Seen::default();
    for _ in 0..bench.runs(100, 10) {
        seen.hop(&mut mover, &[])?;
    }
    let row = |share: f64, limit| {
        let suffix = (share * 100.0).round();
        let name = format!("blackout_{name}_p{suffix}_ms");
        Row::percentile_at_most(&name, "ms", (share, limit), &seen.blackout)
    };
    let mut rows = vec![row(0.5, 5.0), row(0.99, 20.0)];
    rows.extend(seen.information(name));
    if let Some(tail) = percentile(&seen.control, 0.99) {
        let name = format!("{name}_control_p99_ms");
        rows.push(Row::information(&name, "ms", &[tail]));
    }
    Ok(rows)
}

/// How often a downtime limit is exceeded by more than a tenth, by the busy guest. What the same
/// guest's longest silence was just before, without a move, is no part of the move.
pub(super) fn limit(bench: &Bench, limit_ms: u32) -> anyhow::Result<Vec<Row>> {
    let name = format!("limit_{limit_ms}");
    let mut mover = Mover::start(&bench.setup(&name, MEBIBYTES, busy_guest()))?;
    let mut seen = Seen::default();
    let runs = bench.runs(300, 8);
    let downtime = format!("{limit_ms}ms");
    let mut refused = Vec::new();
    for _ in 0..runs {
        // A move that is given up is no exceeded limit, if the guest goes on where it was.
        if let Err(error) = seen.hop(&mut mover, &["--downtime", &downtime]) {
            refused.push(format!("{error:#}"));
            mover.stay()?;
        }
    }
    if seen.blackout.is_empty() {
        bail!("no move came to its end: {}", refused.join("; "));
    }
    let allowed = f64::from(limit_ms) * 1.1;
    let pairs = || seen.blackout.iter().zip(&seen.control);
    let exceeded = pairs().filter(|(blackout, control)| *blackout - *control > allowed);
    let uncorrected = seen.blackout.iter().filter(|&&blackout| blackout > allowed);
    let uncorrected = uncorrected.count() as f64;
    let exceeded = exceeded.count() as f64;
    let n = seen.blackout.len();
    let mut given_up = Row::information(
        &format!("{name}_given_up"),
        "moves",
        &[refused.len() as f64],
    );
    given_up.why = refused.pop();
    let mut rows = vec![
        Row::exactly(&format!("{name}_exceeded"), "moves", 0.0, exceeded, n),
        given_up,
        Row::information(
            &format!("{name}_exceeded_uncorrected"),
            "moves",
            &[uncorrected],
        ),
    ];
    rows.extend(seen.information(&name));
    Ok(rows)
}
