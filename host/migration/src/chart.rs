//! The rounds of a move as a picture, in SVG.

use std::fmt::Write as _;

use crate::report::{MigrationReport, RoundKind, RoundReport};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 78.0;
const RIGHT: f64 = 78.0;
const TOP: f64 = 84.0;
const BOTTOM: f64 = 66.0;
const PLOT_WIDTH: f64 = WIDTH - LEFT - RIGHT;
const PLOT_HEIGHT: f64 = HEIGHT - TOP - BOTTOM;
const TICKS: u32 = 4;

const SENT: &str = "#3b6fb6";
const DIRTIED: &str = "#e39b3c";
const GOODPUT: &str = "#2f8f5b";
const PAUSE: &str = "#c0392b";
const INK: &str = "#2b2f36";
const FAINT: &str = "#d9dde3";

/// Draws the rounds of `report`: for each the megabytes sent and the megabytes that the guest
/// dirtied meanwhile as bars (left axis), the confirmed goodput as a line (right axis), and the
/// pause of the guest as a band.
pub fn rounds_svg(report: &MigrationReport) -> String {
    let rounds = &report.rounds;
    let most_bytes = rounds
        .iter()
        .map(|round| round.bytes.max(dirtied_bytes(round)))
        .max()
        .unwrap_or(0);
    let bytes_axis = Axis::up_to(most_bytes as f64 / 1e6);
    let goodput_axis = Axis::up_to(rounds.iter().map(|r| r.goodput).fold(0.0, f64::max) / 1e6);
    let mut svg = String::new();
    open(&mut svg, report);
    grid(&mut svg, bytes_axis, goodput_axis);
    let slot = PLOT_WIDTH / rounds.len().max(1) as f64;
    for (number, round) in rounds.iter().enumerate() {
        bars(
            &mut svg,
            round,
            LEFT + slot * number as f64,
            slot,
            bytes_axis,
        );
    }
    goodput_line(&mut svg, rounds, slot, goodput_axis);
    legend(&mut svg);
    svg.push_str("</svg>\n");
    svg
}

/// An axis from zero to a round number.
#[derive(Clone, Copy)]
struct Axis {
    end: f64,
}

impl Axis {
    fn up_to(most: f64) -> Self {
        if !most.is_finite() || most <= 0.0 {
            return Self { end: 1.0 };
        }
        let magnitude = 10f64.powf(most.log10().floor());
        let step = [1.0, 2.0, 4.0, 8.0, 10.0]
            .into_iter()
            .find(|step| step * magnitude >= most)
            .unwrap_or(10.0);
        Self {
            end: step * magnitude,
        }
    }

    /// Height of a value above the bottom of the plot.
    fn height(self, value: f64) -> f64 {
        (value / self.end).clamp(0.0, 1.0) * PLOT_HEIGHT
    }
}

fn dirtied_bytes(round: &RoundReport) -> u64 {
    round.dirtied_pages.saturating_mul(dunlin_guest::PAGE_SIZE)
}

fn number(value: f64) -> String {
    if value >= 10.0 || value == value.trunc() {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

fn text(svg: &mut String, (x, y): (f64, f64), attributes: &str, content: &str) {
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" {attributes}>{content}</text>"#
    );
}

fn rectangle(svg: &mut String, (x, y): (f64, f64), (width, height): (f64, f64), rest: &str) {
    let _ = writeln!(
        svg,
        r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" {rest}/>"#
    );
}

fn open(svg: &mut String, report: &MigrationReport) {
    let _ = writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="12" fill="{INK}" role="img" aria-label="Rounds of a live migration">"#
    );
    rectangle(svg, (0.0, 0.0), (WIDTH, HEIGHT), r##"fill="#ffffff""##);
    let bold = r#"font-size="17" font-weight="600""#;
    text(svg, (LEFT, 28.0), bold, "Live migration, round by round");
    let blackout = report.blackout_ms.map_or_else(
        || "not moved".to_owned(),
        |ms| {
            format!(
                "paused {ms:.1} ms (limit {:.0} ms)",
                report.downtime_limit_ms
            )
        },
    );
    let summary = format!(
        "{:.0} MiB of RAM, {:.1} MB sent in {:.0} ms, {} rounds, {blackout}",
        report.ram_bytes as f64 / f64::from(1 << 20),
        report.bytes_sent as f64 / 1e6,
        report.total_ms,
        report.rounds.len(),
    );
    text(svg, (LEFT, 48.0), r##"fill="#5b626d""##, &summary);
}

fn grid(svg: &mut String, bytes: Axis, goodput: Axis) {
    for tick in 0..=TICKS {
        let share = f64::from(tick) / f64::from(TICKS);
        let y = TOP + PLOT_HEIGHT * (1.0 - share);
        let _ = writeln!(
            svg,
            r#"<line x1="{LEFT}" y1="{y:.1}" x2="{:.1}" y2="{y:.1}" stroke="{FAINT}"/>"#,
            WIDTH - RIGHT
        );
        let end = r#"text-anchor="end""#;
        text(svg, (LEFT - 8.0, y + 4.0), end, &number(bytes.end * share));
        let at = (WIDTH - RIGHT + 8.0, y + 4.0);
        text(
            svg,
            at,
            &format!(r#"fill="{GOODPUT}""#),
            &number(goodput.end * share),
        );
    }
    let middle = TOP + PLOT_HEIGHT / 2.0;
    let turned =
        |x: f64| format!(r#"text-anchor="middle" transform="rotate(-90 {x:.1} {middle:.1})""#);
    text(svg, (22.0, middle), &turned(22.0), "megabytes");
    let x = WIDTH - 16.0;
    let colour = format!(r#"fill="{GOODPUT}" {}"#, turned(x));
    text(svg, (x, middle), &colour, "confirmed goodput, MB/s");
    let below = (LEFT + PLOT_WIDTH / 2.0, HEIGHT - 30.0);
    text(
        svg,
        below,
        r#"text-anchor="middle""#,
        "round (duration in ms)",
    );
}

fn bars(svg: &mut String, round: &RoundReport, left: f64, slot: f64, axis: Axis) {
    let bottom = TOP + PLOT_HEIGHT;
    let middle = left + slot / 2.0;
    if round.kind != RoundKind::Live {
        let dashes = if round.kind == RoundKind::TakenBack {
            "4 3"
        } else {
            "none"
        };
        let style = format!(
            r#"fill="{PAUSE}" fill-opacity="0.10" stroke="{PAUSE}" stroke-opacity="0.5" stroke-dasharray="{dashes}""#
        );
        rectangle(svg, (left, TOP), (slot, PLOT_HEIGHT), &style);
        let word = match round.kind {
            RoundKind::TakenBack => "taken back",
            _ => "paused",
        };
        let style = format!(r#"text-anchor="middle" font-size="11" fill="{PAUSE}""#);
        text(svg, (middle, TOP + 14.0), &style, word);
    }
    let width = (slot * 0.32).min(46.0);
    for (bytes, x, colour, name) in [
        (round.bytes, middle - width, SENT, "sent"),
        (dirtied_bytes(round), middle, DIRTIED, "dirtied"),
    ] {
        let height = axis.height(bytes as f64 / 1e6);
        let at = (x, bottom - height);
        let _ = write!(
            svg,
            "<g><title>round {}: {:.2} MB {name}</title>",
            round.round,
            bytes as f64 / 1e6
        );
        let style = format!(r#"fill="{colour}" rx="1.5""#);
        rectangle(svg, at, (width - 1.0, height), &style);
        svg.push_str("</g>\n");
    }
    let centred = r#"text-anchor="middle""#;
    text(
        svg,
        (middle, bottom + 16.0),
        centred,
        &round.round.to_string(),
    );
    if slot > 34.0 {
        let small = r##"text-anchor="middle" font-size="10" fill="#5b626d""##;
        text(
            svg,
            (middle, bottom + 29.0),
            small,
            &format!("{:.1}", round.duration_ms),
        );
    }
}

fn goodput_line(svg: &mut String, rounds: &[RoundReport], slot: f64, axis: Axis) {
    let mut points = String::new();
    for (number, round) in rounds.iter().enumerate() {
        let x = LEFT + slot * (number as f64 + 0.5);
        let y = TOP + PLOT_HEIGHT - axis.height(round.goodput / 1e6);
        let _ = write!(points, "{x:.1},{y:.1} ");
        let _ = writeln!(
            svg,
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="3.5" fill="{GOODPUT}"><title>{:.0} MB/s</title></circle>"#,
            round.goodput / 1e6
        );
    }
    let _ = writeln!(
        svg,
        r#"<polyline points="{}" fill="none" stroke="{GOODPUT}" stroke-width="2"/>"#,
        points.trim_end()
    );
}

fn legend(svg: &mut String) {
    let entries = [
        (SENT, "sent"),
        (DIRTIED, "dirtied meanwhile"),
        (GOODPUT, "goodput"),
        (PAUSE, "guest paused"),
    ];
    let mut x = LEFT;
    for (colour, name) in entries {
        rectangle(
            svg,
            (x, 60.0),
            (12.0, 12.0),
            &format!(r#"fill="{colour}" rx="2""#),
        );
        text(svg, (x + 18.0, 70.5), "", name);
        x += 34.0 + name.len() as f64 * 7.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(number: u32, kind: RoundKind) -> RoundReport {
        RoundReport {
            round: number,
            kind,
            pages: 10,
            zero_pages: 0,
            bytes: 40_960,
            start_ms: 0.0,
            duration_ms: 1.0,
            goodput: 40e6,
            dirtied_pages: 3,
            dirty_rate: 1e6,
        }
    }

    #[test]
    fn every_round_has_its_bars_and_the_pause_is_marked() {
        let report = MigrationReport {
            rounds: vec![
                round(0, RoundKind::Live),
                round(1, RoundKind::TakenBack),
                round(2, RoundKind::Final),
            ],
            blackout_ms: Some(4.0),
            ..MigrationReport::default()
        };
        let svg = rounds_svg(&report);
        assert_eq!(svg.matches("<g><title>round").count(), 6);
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("taken back") && svg.contains(">paused<"));
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }

    #[test]
    fn strange_numbers_stay_in_the_picture() {
        let mut strange = round(0, RoundKind::Live);
        strange.goodput = f64::INFINITY;
        strange.dirtied_pages = u64::MAX;
        let rounds = vec![strange];
        let report = MigrationReport {
            rounds,
            ..MigrationReport::default()
        };
        let svg = rounds_svg(&report);
        assert!(!svg.contains("NaN") && !svg.contains("y=\"-"), "{svg}");
        assert!(rounds_svg(&MigrationReport::default()).ends_with("</svg>\n"));
    }
}
