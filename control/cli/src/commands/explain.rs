//! `migrate --explain`: what a move is expected to take, and how far that was off.

use dunlin_api::migration::{MigrationReport, RoundKind};
use dunlin_api::plan::{GoodputSource, MovePrediction};
use dunlin_api::size::display_size;
use serde::Serialize;

use crate::printer::table;

/// A figure that was predicted, beside what it came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Figure {
    name: &'static str,
    predicted: f64,
    measured: f64,
    /// How much too high the prediction was, of what was measured; absent where that was nothing.
    off_percent: Option<f64>,
    #[serde(skip)]
    unit: Unit,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Unit {
    Milliseconds,
    Bytes,
    BytesASecond,
    Count,
}

impl Unit {
    fn display(self, value: f64) -> String {
        match self {
            Self::Milliseconds if value >= 10_000.0 => format!("{:.1} s", value / 1e3),
            Self::Milliseconds => format!("{value:.1} ms"),
            Self::Bytes => size(value),
            Self::BytesASecond => format!("{}/s", size(value)),
            Self::Count => format!("{value:.0}"),
        }
    }
}

fn size(bytes: f64) -> String {
    display_size(bytes.max(0.0) as u64)
}

/// All figures that the report of a move has too.
pub(super) fn figures(expected: &MovePrediction, report: &MigrationReport) -> Vec<Figure> {
    let live = || {
        let rounds = report.rounds.iter();
        rounds.filter(|round| round.kind == RoundKind::Live && round.duration_ms > 0.0)
    };
    let over_time = |amount: f64| amount / (live().map(|r| r.duration_ms).sum::<f64>() / 1e3);
    let goodput = over_time(live().map(|round| round.bytes as f64).sum());
    let figure = |name, predicted: f64, measured: f64, unit| Figure {
        name,
        predicted,
        measured,
        off_percent: (measured > 0.0).then(|| (predicted - measured) / measured * 100.0),
        unit,
    };
    let mut figures = vec![
        figure(
            "total_ms",
            expected.total_ms,
            report.total_ms,
            Unit::Milliseconds,
        ),
        figure(
            "bytes",
            expected.bytes as f64,
            report.bytes_sent as f64,
            Unit::Bytes,
        ),
    ];
    if let Some(blackout) = report.blackout_ms {
        let predicted = expected.blackout_ms;
        figures.push(figure(
            "blackout_ms",
            predicted,
            blackout,
            Unit::Milliseconds,
        ));
    }
    let rounds = report
        .rounds
        .iter()
        .filter(|round| round.kind == RoundKind::Live);
    let (predicted, measured) = (f64::from(expected.rounds), rounds.count() as f64);
    figures.push(figure("rounds", predicted, measured, Unit::Count));
    if goodput.is_finite() {
        figures.push(figure(
            "goodput",
            expected.goodput,
            goodput,
            Unit::BytesASecond,
        ));
    }
    figures
}

/// The figures for people.
pub(super) fn compare(figures: &[Figure]) -> String {
    let heading = ["FIGURE", "EXPECTED", "MEASURED", "OFF"];
    let mut rows = vec![heading.map(String::from).to_vec()];
    rows.extend(figures.iter().map(|figure| {
        let off = figure.off_percent;
        vec![
            figure.name.trim_end_matches("_ms").to_owned(),
            figure.unit.display(figure.predicted),
            figure.unit.display(figure.measured),
            off.map_or_else(|| "-".into(), |percent| format!("{percent:+.0} %")),
        ]
    }));
    table(&rows)
}

/// A prediction for people.
pub(super) fn describe(expected: &MovePrediction, limit_ms: u64) -> String {
    let end = if expected.post_copy {
        "by post-copy: the guest goes ahead of the rest of its memory"
    } else if expected.converges {
        "by pre-copy, within the limit"
    } else {
        "not within the limit: the guest is expected to stay here"
    };
    let source = match expected.goodput_source {
        GoodputSource::Assumed => "assumed: nothing was measured on this path",
        GoodputSource::Limit => "the limit that was asked for",
        GoodputSource::Measured => "as measured at an earlier attempt",
    };
    let ms = |value| Unit::Milliseconds.display(value);
    let rate = |value| Unit::BytesASecond.display(value);
    let fact = |name: &str, text: String| vec![name.to_owned(), text];
    table(&[
        fact("expected", end.into()),
        fact("total", ms(expected.total_ms)),
        fact(
            "blackout",
            format!("{} (limit {limit_ms} ms)", ms(expected.blackout_ms)),
        ),
        fact(
            "sent",
            format!(
                "{} in {} rounds",
                size(expected.bytes as f64),
                expected.rounds
            ),
        ),
        fact("slowdown", format!("{:.0} %", expected.slowdown * 100.0)),
        fact("goodput", format!("{} ({source})", rate(expected.goodput))),
        fact(
            "guest",
            format!(
                "{} of RAM; dirties {} over {} (measured for {:.0} ms)",
                size(expected.ram_bytes as f64),
                rate(expected.dirty_rate),
                size(expected.working_set_bytes as f64),
                expected.measured_ms
            ),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_api::migration::RoundReport;

    fn expected() -> MovePrediction {
        MovePrediction {
            ram_bytes: 512 << 20,
            dirty_rate: (24 << 20) as f64,
            working_set_bytes: 8 << 20,
            measured_ms: 503.2,
            goodput: (1 << 30) as f64,
            goodput_source: GoodputSource::Assumed,
            total_ms: 330.0,
            bytes: 300 << 20,
            blackout_ms: 6.25,
            slowdown: 0.02,
            rounds: 2,
            converges: true,
            post_copy: false,
        }
    }

    fn report() -> MigrationReport {
        let round = |kind, bytes, duration_ms| RoundReport {
            kind,
            bytes,
            duration_ms,
            ..RoundReport::default()
        };
        MigrationReport {
            total_ms: 300.0,
            bytes_sent: 400 << 20,
            blackout_ms: Some(5.0),
            rounds: vec![
                round(RoundKind::Live, 390 << 20, 190.0),
                round(RoundKind::Live, 10 << 20, 10.0),
                round(RoundKind::Final, 1 << 20, 2.0),
            ],
            ..MigrationReport::default()
        }
    }

    #[test]
    fn a_prediction_is_told_with_its_reasons() {
        assert_eq!(
            describe(&expected(), 50),
            "expected  by pre-copy, within the limit\n\
             total     330.0 ms\n\
             blackout  6.2 ms (limit 50 ms)\n\
             sent      300 MiB in 2 rounds\n\
             slowdown  2 %\n\
             goodput   1 GiB/s (assumed: nothing was measured on this path)\n\
             guest     512 MiB of RAM; dirties 24 MiB/s over 8 MiB (measured for 503 ms)\n"
        );
        let stays = MovePrediction {
            converges: false,
            ..expected()
        };
        assert!(describe(&stays, 50).contains("expected to stay here"));
    }

    #[test]
    fn each_figure_is_compared_in_percent() {
        assert_eq!(
            compare(&figures(&expected(), &report())),
            "FIGURE    EXPECTED  MEASURED   OFF\n\
             total     330.0 ms  300.0 ms   +10 %\n\
             bytes     300 MiB   400 MiB    -25 %\n\
             blackout  6.2 ms    5.0 ms     +25 %\n\
             rounds    2         2          +0 %\n\
             goodput   1 GiB/s   2.0 GiB/s  -49 %\n"
        );
    }

    #[test]
    fn a_move_without_rounds_is_compared_without_nonsense() {
        let figures = figures(&expected(), &MigrationReport::default());
        let text = serde_json::to_string(&figures).unwrap();
        assert!(figures.iter().all(|figure| figure.name != "blackout_ms"));
        assert!(
            figures.iter().all(|figure| figure.off_percent.is_none()),
            "{text}"
        );
        assert!(!compare(&figures).contains("NaN"));
    }
}
