//! How long a guest stands still when it changes hosts, as its own ticks show it.

use anyhow::Context;
use dunlin_guest_migbench::Parameters;

use super::Bench;
use crate::bench::{Row, median, percentile};
use dunlin_testbed::mover::{Mover, NotMoved};

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
    /// The longest pause of each move, be it the blackout or one that was taken back.
    paused: Vec<f64>,
    /// Moves that ended by post-copy.
    behind: u64,
}

impl Seen {
    fn hop(&mut self, mover: &mut Mover, arguments: &[&str]) -> anyhow::Result<()> {
        let hop = mover.hop(arguments, &[])?;
        let blackout = hop.blackout_ms.context("the guest ticks on both hosts")?;
        let control = hop.control_ms.context("the guest ticks before the move")?;
        let taken_back = hop.report["aborted_pauses_ms"].as_array();
        let taken_back = taken_back
            .into_iter()
            .flatten()
            .filter_map(|ms| ms.as_f64());
        self.paused.push(taken_back.fold(blackout, f64::max));
        self.behind += u64::from(!hop.report["post_copy"].is_null());
        self.blackout.push(blackout);
        self.control.push(control);
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
            ("longest_pause", &self.paused),
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

/// How often a downtime limit is exceeded by more than a tenth, by the busy guest. The pause is the
/// longest one of the move, those that were taken back among them; what the same guest is usually
/// silent for at its worst, without a move, is no part of it. A move that is given up has not kept
/// its limit either.
pub(super) fn limit(bench: &Bench, limit_ms: u32) -> anyhow::Result<Vec<Row>> {
    let name = format!("limit_{limit_ms}");
    let mut mover = Mover::start(&bench.setup(&name, MEBIBYTES, busy_guest()))?;
    let mut seen = Seen::default();
    let runs = bench.runs(300, 8);
    let downtime = format!("{limit_ms}ms");
    let mut refused = Vec::new();
    for _ in 0..runs {
        match seen.hop(&mut mover, &["--downtime", &downtime]) {
            Ok(()) => {}
            Err(error) if error.downcast_ref::<NotMoved>().is_some() => {
                refused.push(format!("{error:#}"));
                mover.stay()?;
            }
            Err(error) => return Err(error),
        }
    }
    let allowed = f64::from(limit_ms) * 1.1;
    let usual = median(&seen.control).unwrap_or(0.0);
    let over = |by: f64| {
        seen.paused
            .iter()
            .filter(|&&pause| pause - by > allowed)
            .count()
    };
    let exceeded = (over(usual) + refused.len()) as f64;
    let information =
        |what: &str, moves: f64| Row::information(&format!("{name}_{what}"), "moves", &[moves]);
    let mut given_up = information("given_up", refused.len() as f64);
    given_up.why = refused.pop();
    let mut rows = vec![
        Row::exactly(
            &format!("{name}_exceeded"),
            "moves",
            0.0,
            exceeded,
            runs as usize,
        ),
        given_up,
        information("exceeded_uncorrected", over(0.0) as f64),
        information("by_post_copy", seen.behind as f64),
    ];
    rows.extend(seen.information(&name));
    Ok(rows)
}
