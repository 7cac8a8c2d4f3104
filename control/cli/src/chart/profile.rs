//! A profile as a picture: shares of time, and the places where the guest was found most.

use super::svg::{Svg, colour};

const WIDTH: f64 = 860.0;
const LEFT: f64 = 260.0;
const RIGHT: f64 = WIDTH - 84.0;
const ROW: f64 = 22.0;
const TOP: f64 = 72.0;

/// A row: what, its share from 0 to 1, and what a browser shows beside.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What it is of.
    pub name: String,
    /// Share of the whole, from 0 to 1.
    pub share: f64,
    /// More about it.
    pub hint: String,
}

/// Draws shares of time and shares of places.
pub fn profile(headline: &str, kinds: &[Row], places: &[Row]) -> String {
    let rows = (kinds.len() + places.len()) as f64;
    let height = TOP + rows * ROW + 76.0;
    let mut svg = Svg::new(WIDTH, height, "Where the time of a VM's processors goes");
    svg.text((24.0, 26.0), "start", headline);
    svg.text((24.0, TOP - 14.0), "start", "share of the time");
    let behind = panel(&mut svg, TOP, kinds, colour::BLUE);
    let top = behind + 40.0;
    svg.text(
        (24.0, top - 14.0),
        "start",
        "share of the time at work, by the guest's code",
    );
    panel(&mut svg, top, places, colour::ORANGE);
    svg.finish()
}

fn panel(svg: &mut Svg, top: f64, rows: &[Row], fill: &str) -> f64 {
    let bottom = top + rows.len() as f64 * ROW;
    for quarter in 0..=4 {
        let x = LEFT + f64::from(quarter) / 4.0 * (RIGHT - LEFT);
        let class = if quarter == 0 { "axis" } else { "grid" };
        svg.line(class, (x, top), (x, bottom));
    }
    for (index, row) in rows.iter().enumerate() {
        let y = top + index as f64 * ROW;
        let share = if row.share.is_finite() {
            row.share.clamp(0.0, 1.0)
        } else {
            0.0
        };
        let end = LEFT + share * (RIGHT - LEFT);
        svg.text((LEFT - 8.0, y + 15.0), "end", &row.name);
        if share > 0.0 {
            svg.bar((LEFT, end), (y + 3.0, y + ROW - 3.0), fill, &row.hint);
        }
        let label = format!("{:.1} %", share * 100.0);
        svg.text((end.max(LEFT + 1.0) + 6.0, y + 15.0), "start", &label);
    }
    bottom
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_its_name_and_share_and_those_of_nothing_no_bar() {
        let row = |name: &str, share| Row {
            name: name.into(),
            share,
            hint: format!("{name}!"),
        };
        let kinds = [
            row("translated", 0.75),
            row("<halted>", 0.25),
            row("none", 0.0),
        ];
        let svg = profile("a & b", &kinds, &[row("hot", f64::NAN)]);
        assert_eq!(svg.matches("!</title>").count(), 2);
        assert!(
            svg.contains("75.0 %") && svg.contains("&lt;halted&gt;") && svg.contains("a &amp; b")
        );
        assert!(!svg.contains("NaN") && svg.ends_with("</svg>\n"));
    }
}
