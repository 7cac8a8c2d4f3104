//! A move as a picture: an SVG file, and bars for a terminal; [`profile()`] draws where time goes.
//!
//! ```text
//!  title, and what came of the move
//!  ┌ bytes sent in each round (bars), what remained behind it (line)
//!  ├ goodput and dirty rate of each round (lines)
//!  ├ the pause: expected, measured by its parts, and the limit
//!  └ after post-copy: what brought the pages that followed the guest
//! ```

mod bars;
mod profile;
mod svg;

use dunlin_api::migration::{
    MigrationReport, Outcome, PostCopyReport, RoundKind, RoundReport, SwitchOverReport,
};
use dunlin_api::plan::MovePrediction;
use dunlin_api::size::display_size;

pub use bars::bar;
pub use profile::{Row, profile};
use svg::{Mark, Panel, Scale, Series, Svg, colour};

const PAGE: f64 = 4096.0;
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 640.0;
/// So much higher when memory followed the guest.
const FOLLOWING: f64 = 92.0;
const LEFT: f64 = 96.0;
const RIGHT: f64 = WIDTH - 24.0;
const SIZES: Panel = Panel {
    left: LEFT,
    right: RIGHT,
    top: 88.0,
    bottom: 260.0,
};
const RATES: Panel = Panel {
    left: LEFT,
    right: RIGHT,
    top: 336.0,
    bottom: 460.0,
};
const PAUSES: Panel = Panel {
    left: LEFT,
    right: RIGHT,
    top: 540.0,
    bottom: 596.0,
};
/// Rounds whose labels fit beside each other.
const LABELS: usize = 14;

const REMAINING: Series = Series {
    name: "remained behind it",
    colour: colour::PURPLE,
    dashes: "2 3",
    mark: Mark::Diamond,
};
const GOODPUT: Series = Series {
    name: "goodput",
    colour: colour::BLUE,
    dashes: "none",
    mark: Mark::Circle,
};
const DIRTY: Series = Series {
    name: "dirty rate",
    colour: colour::ORANGE,
    dashes: "7 4",
    mark: Mark::Square,
};

/// Draws a move, and beside its pause the one that was expected, if any was.
pub fn rounds(report: &MigrationReport, expected: Option<&MovePrediction>) -> String {
    let following = report.post_copy.as_ref();
    let height = HEIGHT + following.map_or(0.0, |_| FOLLOWING);
    let mut svg = Svg::new(WIDTH, height, "A move of a running guest, round by round");
    svg.put(format_args!(
        "<text x=\"{LEFT}\" y=\"26\" font-size=\"16\">{}</text>",
        headline(report)
    ));
    let columns = Columns::of(report.rounds.len());
    sizes(&mut svg, report, &columns);
    rates(&mut svg, report, &columns);
    pauses(&mut svg, report, expected);
    if let Some(following) = following {
        follow(&mut svg, following);
    }
    svg.finish()
}

fn headline(report: &MigrationReport) -> String {
    let end = match report.outcome {
        Outcome::Moved => "moved",
        Outcome::Failed => "failed",
        Outcome::DidNotConverge => "did not converge",
        Outcome::Cancelled => "cancelled",
        Outcome::InDoubt => "in doubt",
        Outcome::Lost => "LOST",
    };
    let streams = match report.streams {
        0 => String::new(),
        1 => ", 1 stream".into(),
        streams => format!(", {streams} streams"),
    };
    format!(
        "{end}: {} of RAM, {} sent in {} over {} rounds{streams}, blackout {}",
        display_size(report.ram_bytes),
        display_size(report.bytes_sent),
        milliseconds(report.total_ms),
        report.rounds.len(),
        report.blackout_ms.map_or("none".into(), milliseconds),
    )
}

fn milliseconds(ms: f64) -> String {
    match ms {
        10_000.0.. => format!("{:.1} s", ms / 1e3),
        100.0.. => format!("{ms:.0} ms"),
        _ => format!("{ms:.1} ms"),
    }
}

/// A column for each round, all of one width: the first takes a thousand times as long as the
/// last, which would not be seen.
struct Columns {
    width: f64,
    /// Every so many get a label.
    step: usize,
}

impl Columns {
    fn of(rounds: usize) -> Self {
        Self {
            width: (RIGHT - LEFT) / rounds.max(1) as f64,
            step: rounds.div_ceil(LABELS).max(1),
        }
    }

    fn middle(&self, index: usize) -> f64 {
        LEFT + (index as f64 + 0.5) * self.width
    }

    fn bar(&self, index: usize) -> (f64, f64) {
        let half = (self.width * 0.32).min(36.0);
        (self.middle(index) - half, self.middle(index) + half)
    }
}

fn fill(kind: RoundKind) -> &'static str {
    match kind {
        RoundKind::Live => colour::BLUE,
        RoundKind::Final => "url(#paused)",
        RoundKind::TakenBack => "url(#back)",
    }
}

fn remaining(round: &RoundReport) -> f64 {
    round.dirtied_pages as f64 * PAGE
}

fn sizes(svg: &mut Svg, report: &MigrationReport, columns: &Columns) {
    let rounds = &report.rounds;
    let sent = rounds.iter().map(|round| round.bytes as f64);
    let scale = Scale::of(SIZES, sent.chain(rounds.iter().map(remaining)));
    let mut x = LEFT;
    let y = SIZES.top - 18.0;
    x = svg.legend_bar((x, y), colour::BLUE, "sent while the guest ran");
    x = svg.legend_bar((x, y), fill(RoundKind::Final), "sent during the pause");
    if rounds
        .iter()
        .any(|round| round.kind == RoundKind::TakenBack)
    {
        x = svg.legend_bar((x, y), fill(RoundKind::TakenBack), "pause taken back");
    }
    svg.legend((x, y), &REMAINING);
    svg.sizes(&scale, "");
    for (index, round) in rounds.iter().enumerate() {
        let hint = format!(
            "round {}: {} sent in {}, {} pages, {} of zeros, {} that were there; {} pages dirtied meanwhile",
            round.round,
            display_size(round.bytes),
            milliseconds(round.duration_ms),
            round.pages,
            round.zero_pages,
            round.same_pages,
            round.dirtied_pages,
        );
        let top = scale.y(round.bytes as f64);
        svg.bar(
            columns.bar(index),
            (top, SIZES.bottom),
            fill(round.kind),
            &hint,
        );
        if index % columns.step == 0 {
            let x = columns.middle(index);
            svg.text((x, SIZES.bottom + 16.0), "middle", &round.round.to_string());
            let time = milliseconds(round.duration_ms);
            svg.text((x, SIZES.bottom + 30.0), "middle", &time);
        }
    }
    svg.text((LEFT - 6.0, SIZES.bottom + 16.0), "end", "round");
    svg.text((LEFT - 6.0, SIZES.bottom + 30.0), "end", "took");
    let live = rounds.iter().enumerate();
    let points: Vec<_> = live
        .filter(|(_, round)| round.kind == RoundKind::Live)
        .map(|(index, round)| (columns.middle(index), scale.y(remaining(round))))
        .collect();
    svg.series(&REMAINING, &points);
}

fn rates(svg: &mut Svg, report: &MigrationReport, columns: &Columns) {
    let rounds = &report.rounds;
    let both = |round: &RoundReport| [round.goodput, round.dirty_rate];
    let scale = Scale::of(RATES, rounds.iter().flat_map(both));
    let y = RATES.top - 12.0;
    let x = svg.legend((LEFT, y), &GOODPUT);
    svg.legend((x, y), &DIRTY);
    svg.sizes(&scale, "/s");
    let points = |rate: fn(&RoundReport) -> f64, kinds: &[RoundKind]| -> Vec<_> {
        let rounds = rounds.iter().enumerate();
        rounds
            .filter(|(_, round)| kinds.contains(&round.kind))
            .map(|(index, round)| (columns.middle(index), scale.y(rate(round))))
            .collect()
    };
    let all = [RoundKind::Live, RoundKind::TakenBack, RoundKind::Final];
    svg.series(&GOODPUT, &points(|round| round.goodput, &all));
    // A guest that is paused dirties nothing.
    svg.series(&DIRTY, &points(|round| round.dirty_rate, &all[..1]));
}

/// The parts of a pause: name, fill, begin and end in milliseconds.
fn parts(parts: &SwitchOverReport) -> [(&'static str, &'static str, f64, f64); 5] {
    [
        ("stop", colour::PURPLE, 0.0, parts.stopped_ms),
        ("save", colour::ORANGE, parts.stopped_ms, parts.saved_ms),
        ("send", colour::BLUE, parts.saved_ms, parts.sent_ms),
        ("restore", colour::GREEN, parts.sent_ms, parts.prepared_ms),
        ("start", colour::RED, parts.prepared_ms, parts.running_ms),
    ]
}

fn pauses(svg: &mut Svg, report: &MigrationReport, expected: Option<&MovePrediction>) {
    let limit = report.downtime_limit_ms;
    let predicted = expected.map(|expected| expected.blackout_ms);
    let measured = report.blackout_ms;
    let longest = [predicted, measured].into_iter().flatten();
    let end = longest.fold(limit, f64::max).max(1.0) * 1.05;
    let x = |ms: f64| LEFT + (ms / end).clamp(0.0, 1.0) * (RIGHT - LEFT);
    let mut legend = svg.legend_bar(
        (LEFT, PAUSES.top - 12.0),
        "none",
        "the guest's pause, by its parts:",
    ) - 12.0;
    if let Some(switch_over) = &report.switch_over {
        for (name, fill, _, _) in parts(switch_over) {
            legend = svg.legend_bar((legend, PAUSES.top - 12.0), fill, name);
        }
    }
    let rows = [("expected", predicted), ("measured", measured)];
    for (row, (name, pause)) in rows.into_iter().enumerate() {
        let top = PAUSES.top + row as f64 * 28.0;
        svg.text((LEFT - 6.0, top + 15.0), "end", name);
        let Some(pause) = pause else {
            let why = ["not asked for", "none"][row];
            svg.text((LEFT + 4.0, top + 15.0), "start", why);
            continue;
        };
        match (&report.switch_over, row) {
            (Some(switch_over), 1) => {
                for (name, fill, from, to) in parts(switch_over) {
                    let hint = format!("{name}: {}", milliseconds(to - from));
                    let to = to.max(from);
                    svg.bar((x(from), x(to)), (top, top + 20.0), fill, &hint);
                }
            }
            _ => svg.put(format_args!(
                "<rect x=\"{LEFT}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"20\" fill=\"none\" \
                 stroke=\"{}\" stroke-width=\"2\"/>",
                (x(pause) - LEFT).max(1.0),
                colour::BLUE
            )),
        }
        svg.text((x(pause) + 6.0, top + 15.0), "start", &milliseconds(pause));
    }
    svg.line("axis", (LEFT, PAUSES.top - 4.0), (LEFT, PAUSES.bottom));
    svg.line("axis", (LEFT, PAUSES.bottom), (RIGHT, PAUSES.bottom));
    let step = round_step(end / 5.0);
    for tick in (0..12).map(|tick| f64::from(tick) * step) {
        if tick <= end {
            let label = format!("{tick} ms");
            svg.text((x(tick), PAUSES.bottom + 16.0), "middle", &label);
            svg.line(
                "axis",
                (x(tick), PAUSES.bottom),
                (x(tick), PAUSES.bottom + 4.0),
            );
        }
    }
    let at = x(limit);
    svg.put(format_args!(
        "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" \
         stroke-width=\"2\" stroke-dasharray=\"5 3\"/>",
        PAUSES.top - 6.0,
        PAUSES.bottom
    ));
    let label = format!("limit {}", milliseconds(limit));
    svg.text((at - 5.0, PAUSES.bottom - 4.0), "end", &label);
}

/// The next of 1, 2, 5, 10, 20, ... that is not below `step`.
fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.max(1e-3).log10().floor());
    let steps = [1.0, 2.0, 5.0].map(|digit| digit * power);
    let found = steps.into_iter().find(|&round| round >= step);
    found.unwrap_or(10.0 * power)
}

/// What brought the pages that followed the guest: shares of one bar.
fn follow(svg: &mut Svg, following: &PostCopyReport) {
    let kinds = [
        ("by fault", "url(#paused)", following.urgent_pages),
        (
            "ahead, beside a fault",
            colour::ORANGE,
            following.prefetched_pages,
        ),
        ("in turn", colour::BLUE, following.bulk_pages),
    ];
    let top = HEIGHT + 16.0;
    let label = "pages that followed the guest:";
    let mut legend = svg.legend_bar((LEFT, top - 10.0), "none", label) - 12.0;
    let all = kinds.iter().map(|(_, _, pages)| *pages as f64).sum::<f64>();
    let mut from = LEFT;
    svg.text((LEFT - 6.0, top + 15.0), "end", "followed");
    for (name, fill, pages) in kinds {
        legend = svg.legend_bar((legend, top - 10.0), fill, &format!("{pages} {name}"));
        let to = from + pages as f64 / all.max(1.0) * (RIGHT - LEFT);
        if pages > 0 {
            let hint = format!("{name}: {pages} pages");
            svg.bar((from, to), (top, top + 20.0), fill, &hint);
        }
        from = to;
    }
    let mut facts = format!(
        "{} pages in {}; {} faults, half within {} µs, 99 of 100 within {} µs, all within {} µs",
        following.missing_pages,
        milliseconds(following.duration_ms),
        following.faults,
        following.fault_p50_us,
        following.fault_p99_us,
        following.fault_max_us,
    );
    match following.recoveries {
        0 => {}
        1 => facts.push_str("; 1 new connection"),
        more => facts.push_str(&format!("; {more} new connections")),
    }
    svg.text((LEFT, top + 40.0), "start", &facts);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> MigrationReport {
        let live = |round, bytes, duration_ms, dirtied_pages| RoundReport {
            round,
            bytes,
            duration_ms,
            dirtied_pages,
            pages: bytes / 4096,
            goodput: bytes as f64 / duration_ms * 1e3,
            dirty_rate: dirtied_pages as f64 * 4096.0 / duration_ms * 1e3,
            ..RoundReport::default()
        };
        MigrationReport {
            outcome: Outcome::Moved,
            ram_bytes: 1 << 30,
            rounds: vec![
                live(0, 612 << 20, 903.0, 30_000),
                live(1, 117 << 20, 172.0, 6_200),
                live(2, 24 << 20, 35.0, 1_300),
                RoundReport {
                    kind: RoundKind::TakenBack,
                    ..live(3, 5 << 20, 18.0, 900)
                },
                live(4, 4 << 20, 7.5, 310),
                RoundReport {
                    kind: RoundKind::Final,
                    ..live(5, 1_270_000, 2.4, 0)
                },
            ],
            total_ms: 1160.0,
            downtime_limit_ms: 50.0,
            blackout_ms: Some(11.3),
            switch_over: Some(SwitchOverReport {
                stopped_ms: 1.1,
                saved_ms: 2.9,
                sent_ms: 6.0,
                prepared_ms: 9.8,
                running_ms: 11.3,
                state_bytes: 42_000,
            }),
            bytes_sent: 763 << 20,
            streams: 4,
            ..MigrationReport::default()
        }
    }

    #[test]
    fn every_round_has_a_bar_and_the_pause_its_parts() {
        let expected = MovePrediction {
            blackout_ms: 9.1,
            ..MovePrediction::default()
        };
        let svg = rounds(&report(), Some(&expected));
        assert_eq!(svg.matches("<title>round ").count(), 6);
        for part in ["stop", "save", "send", "restore", "start"] {
            assert_eq!(
                svg.matches(&format!("<title>{part}: ")).count(),
                1,
                "{part}"
            );
        }
        assert!(svg.contains("9.1 ms") && svg.contains("11.3 ms") && svg.contains("limit 50.0 ms"));
        assert!(svg.contains("4 streams"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        if let Some(path) = std::env::var_os("DUNLIN_TEST_CHART") {
            std::fs::write(path, svg).unwrap();
        }
    }

    #[test]
    fn pages_that_followed_are_told_apart() {
        let mut report = report();
        report.post_copy = Some(PostCopyReport {
            missing_pages: 31_000,
            faults: 420,
            fault_p50_us: 90,
            fault_p99_us: 310,
            fault_max_us: 1200,
            urgent_pages: 420,
            prefetched_pages: 6_300,
            bulk_pages: 24_280,
            recoveries: 1,
            duration_ms: 640.0,
            ..PostCopyReport::default()
        });
        let svg = rounds(&report, None);
        for kind in [
            "by fault: 420 pages",
            "beside a fault: 6300",
            "in turn: 24280",
        ] {
            assert_eq!(svg.matches(kind).count(), 1, "{kind}");
        }
        assert!(svg.contains("99 of 100 within 310 µs") && svg.contains("1 new connection"));
        if let Some(path) = std::env::var_os("DUNLIN_TEST_CHART_POST") {
            std::fs::write(path, svg).unwrap();
        }
        report.post_copy = Some(PostCopyReport::default());
        assert!(!rounds(&report, None).contains("NaN"));
    }

    #[test]
    fn ticks_are_round() {
        let steps = [0.0, 0.9, 1.0, 3.0, 10.5, 60.0].map(round_step);
        assert_eq!(steps, [0.001, 1.0, 1.0, 5.0, 20.0, 100.0]);
    }

    #[test]
    fn a_report_without_rounds_still_draws() {
        let svg = rounds(&MigrationReport::default(), None);
        assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN"));
    }

    #[test]
    fn absurd_reports_draw_numbers() {
        let mut report = report();
        report.rounds[0].bytes = u64::MAX;
        report.rounds[1].goodput = f64::INFINITY;
        report.rounds[2].dirty_rate = f64::NAN;
        report.blackout_ms = Some(f64::NAN);
        report.total_ms = f64::MAX;
        let svg = rounds(&report, None);
        let numbers = svg.lines().filter(|line| !line.starts_with("<text"));
        assert!(
            numbers
                .clone()
                .all(|line| !line.contains("=\"NaN") && !line.contains("=\"inf"))
        );
    }
}
