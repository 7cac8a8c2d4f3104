//! A move's rounds as an SVG chart: bytes of each round over time, and the pause.

use std::fmt::Write;

use dunlin_api::migration::{MigrationReport, RoundKind};
use dunlin_api::size::display_size;

const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 80.0;
const BOTTOM: f64 = 300.0;
const TOP: f64 = 50.0;
const RIGHT: f64 = 780.0;

/// Draws the rounds: a bar from begin to end of each, as high as its bytes on a logarithmic
/// scale, since the first round is thousands of times the last.
pub fn rounds(report: &MigrationReport) -> String {
    let end = report
        .rounds
        .iter()
        .map(|round| round.start_ms + round.duration_ms);
    let end = end.fold(report.total_ms, f64::max).max(1.0);
    let most = report
        .rounds
        .iter()
        .map(|round| round.bytes)
        .max()
        .unwrap_or(0);
    let x = |ms: f64| LEFT + ms / end * (RIGHT - LEFT);
    let logarithm = |bytes: u64| (bytes.max(1024) as f64 / 1024.0).log2();
    let height = |bytes: u64| logarithm(bytes) / logarithm(most.max(2048)) * (BOTTOM - TOP);
    let mut svg = String::new();
    // Writing to a String cannot fail.
    let mut put = |text: std::fmt::Arguments<'_>| {
        let _infallible = svg.write_fmt(text);
        svg.push('\n');
    };
    put(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">"
    ));
    put(format_args!(
        "<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>"
    ));
    put(format_args!(
        "<text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{} rounds, {} sent in {:.0} ms, blackout {}</text>",
        report.rounds.len(),
        display_size(report.bytes_sent),
        report.total_ms,
        report
            .blackout_ms
            .map_or("none".into(), |ms| format!("{ms:.1} ms")),
    ));
    let mut tick = 1024;
    while tick <= most {
        let y = BOTTOM - height(tick);
        put(format_args!(
            "<line x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>"
        ));
        put(format_args!(
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            y + 4.0,
            display_size(tick)
        ));
        tick *= 32;
    }
    for round in &report.rounds {
        let colour = match round.kind {
            RoundKind::Live => "#4477aa",
            RoundKind::Final => "#cc3311",
            RoundKind::TakenBack => "#ee9944",
        };
        let left = x(round.start_ms);
        let width = (x(round.start_ms + round.duration_ms) - left).max(1.5);
        let tall = height(round.bytes);
        put(format_args!(
            "<rect x=\"{left:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{tall:.1}\" fill=\"{colour}\" stroke=\"white\" stroke-width=\"0.5\"><title>round {}: {} pages, {}, {:.1} ms, {} dirtied meanwhile</title></rect>",
            BOTTOM - tall,
            round.round,
            round.pages,
            display_size(round.bytes),
            round.duration_ms,
            round.dirtied_pages,
        ));
    }
    put(format_args!(
        "<line x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{BOTTOM}\" y2=\"{BOTTOM}\" stroke=\"black\"/>"
    ));
    for part in 0..=4 {
        let ms = end * f64::from(part) / 4.0;
        put(format_args!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{ms:.0} ms</text>",
            x(ms),
            BOTTOM + 18.0
        ));
    }
    put(format_args!(
        "<text x=\"{LEFT}\" y=\"{}\">bytes of each round (logarithmic); blue: the guest runs, red: it is paused, orange: taken back</text>",
        BOTTOM + 42.0
    ));
    put(format_args!("</svg>"));
    svg
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_api::migration::RoundReport;

    #[test]
    fn every_round_has_a_bar() {
        let report = MigrationReport {
            rounds: vec![
                RoundReport {
                    bytes: 500 << 20,
                    duration_ms: 900.0,
                    ..RoundReport::default()
                },
                RoundReport {
                    round: 1,
                    kind: RoundKind::Final,
                    bytes: 0,
                    start_ms: 900.0,
                    duration_ms: 4.0,
                    ..RoundReport::default()
                },
            ],
            total_ms: 910.0,
            ..MigrationReport::default()
        };
        let svg = rounds(&report);
        assert_eq!(svg.matches("<title>round").count(), 2);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn a_report_without_rounds_still_draws() {
        let svg = rounds(&MigrationReport::default());
        assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN"));
    }
}
