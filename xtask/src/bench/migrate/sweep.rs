//! Moves of many kinds of guests, one kind after the other: what changes with what. For the
//! record; no row of
//! it has a limit.

use dunlin_guest_migbench::{Fill, Parameters};

use super::Bench;
use crate::bench::Row;
use dunlin_testbed::mover::Mover;

const MEBIBYTES: u64 = 256;

/// A kind of guest, and of move.
#[derive(Clone, Copy)]
struct Point {
    fill: Fill,
    working_set: u64,
    rate: u64,
    streams: &'static str,
    mode: &'static str,
    tls: bool,
}

const BASE: Point = Point {
    fill: Fill::Random,
    working_set: 64,
    rate: 100,
    streams: "1",
    mode: "pre",
    tls: false,
};

/// Each dimension by itself, from the base.
fn points(quick: bool) -> Vec<Point> {
    let mut points = vec![BASE];
    let contents = [Fill::Zero, Fill::Compressible];
    points.extend(contents.map(|fill| Point { fill, ..BASE }));
    points.extend([16, 128].map(|working_set| Point {
        working_set,
        ..BASE
    }));
    points.extend([0, 50, 200, 400].map(|rate| Point { rate, ..BASE }));
    points.extend(["2", "4", "auto"].map(|streams| Point { streams, ..BASE }));
    points.extend(["post", "auto"].map(|mode| Point { mode, ..BASE }));
    points.push(Point { tls: true, ..BASE });
    if quick {
        points.truncate(3);
    }
    points
}

impl Point {
    fn name(self) -> String {
        format!(
            "sweep_{}_ws{}_rate{}_streams{}_{}_{}",
            self.fill.name(),
            self.working_set,
            self.rate,
            self.streams,
            self.mode,
            if self.tls { "tls" } else { "plain" }
        )
    }
}

pub(super) fn run(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for point in points(bench.quick) {
        let name = point.name();
        match measure(bench, point) {
            Ok(measured) => rows.extend(measured),
            Err(error) => {
                let mut row = Row::information(&name, "ms", &[]);
                row.why = Some(format!("{error:#}"));
                rows.push(row);
            }
        }
    }
    Ok(rows)
}

fn measure(bench: &Bench, point: Point) -> anyhow::Result<Vec<Row>> {
    let mut migrate = vec!["--streams", point.streams, "--mode", point.mode];
    let credentials;
    let mut receive = Vec::new();
    if point.tls {
        bench.offers(&["migrate"], "--tls")?;
        credentials = super::certificates(bench)?;
        receive = vec!["--tls", credentials.as_str()];
        migrate.extend(&receive);
    }
    let parameters = Parameters {
        fill: point.fill,
        working_set_mebibytes: point.working_set,
        rate_mebibytes: point.rate,
        ..Parameters::default()
    };
    let mut mover = Mover::start(&bench.setup("sweep", MEBIBYTES, parameters))?;
    let (mut totals, mut blackouts, mut sent) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.runs(5, 2) {
        let hop = mover.hop(&migrate, &receive)?;
        totals.extend(hop.report["total_ms"].as_f64());
        blackouts.extend(hop.blackout_ms);
        let bytes = hop.report["bytes_sent"].as_f64();
        sent.extend(bytes.map(|bytes| bytes / (MEBIBYTES << 20) as f64));
    }
    let name = point.name();
    Ok(vec![
        Row::information(&format!("{name}_total_ms"), "ms", &totals),
        Row::information(&format!("{name}_blackout_ms"), "ms", &blackouts),
        Row::information(&format!("{name}_sent"), "of RAM", &sent),
    ])
}
