//! Lines, bars and words of an SVG picture, and the scales that place them.

use std::fmt::Write;

use dunlin_api::size::display_size;

/// Part of the picture in which one quantity is drawn; y grows downward.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panel {
    pub(super) left: f64,
    pub(super) right: f64,
    pub(super) top: f64,
    pub(super) bottom: f64,
}

/// Sizes on a logarithmic scale: the first round is thousands of times the last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    panel: Panel,
    /// Logarithms to the base of 2.
    low: f64,
    high: f64,
}

/// Ticks of a scale, at most.
const TICKS: f64 = 6.0;

impl Scale {
    /// A scale that has all of `values` that are larger than nothing.
    pub(super) fn of(panel: Panel, values: impl Iterator<Item = f64>) -> Self {
        let values = values.filter(|value| value.is_finite() && *value >= 1.0);
        let (low, high) = values.fold((f64::MAX, 0.0_f64), |(low, high), value| {
            (low.min(value.log2()), high.max(value.log2()))
        });
        let low = if low > high {
            0.0
        } else {
            (low - 1.0).max(0.0).floor()
        };
        Self {
            panel,
            low,
            high: (high + 0.5).max(low + 2.0).ceil(),
        }
    }

    /// Where `value` is; what is too small lies on the axis.
    pub(super) fn y(&self, value: f64) -> f64 {
        let share = (value.max(1.0).log2() - self.low) / (self.high - self.low);
        let share = if share.is_finite() {
            share.clamp(0.0, 1.0)
        } else {
            0.0
        };
        self.panel.bottom - share * (self.panel.bottom - self.panel.top)
    }

    /// Round sizes to write at the axis.
    fn ticks(&self) -> impl Iterator<Item = f64> + use<> {
        let step = ((self.high - self.low) / TICKS).ceil().max(1.0);
        let (low, high) = (self.low, self.high);
        (0..)
            .map(move |tick| low + f64::from(tick) * step)
            .take_while(move |&tick| tick <= high)
            .map(f64::exp2)
    }
}

/// A picture that grows.
pub(super) struct Svg(String);

/// Colours that people with any colour vision tell apart, on white and on black; shapes and
/// patterns say the same again.
pub(super) mod colour {
    pub(in crate::chart) const BLUE: &str = "#0072b2";
    pub(in crate::chart) const ORANGE: &str = "#e69f00";
    pub(in crate::chart) const GREEN: &str = "#009e73";
    pub(in crate::chart) const RED: &str = "#d55e00";
    pub(in crate::chart) const PURPLE: &str = "#cc79a7";
}

impl Svg {
    pub(super) fn new(width: f64, height: f64, title: &str) -> Self {
        let mut svg = Self(String::new());
        svg.put(format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">"
        ));
        svg.put(format_args!("<title>{}</title>", escaped(title)));
        // No background: the page's own shows. Grey is read on white and on black.
        svg.put(format_args!(
            "<style>text{{fill:#767676}}.axis{{stroke:#767676}}.grid{{stroke:#888;stroke-opacity:.35}}\
             @media(prefers-color-scheme:dark){{text{{fill:#bbb}}.axis{{stroke:#aaa}}}}</style>"
        ));
        for (name, colour, path) in [
            ("paused", colour::RED, "M-2,2l4,-4M0,8l8,-8M6,10l4,-4"),
            ("back", colour::ORANGE, "M-2,6l4,4M0,0l8,8M6,-2l4,4"),
        ] {
            svg.put(format_args!(
                "<defs><pattern id=\"{name}\" width=\"8\" height=\"8\" patternUnits=\"userSpaceOnUse\">\
                 <rect width=\"8\" height=\"8\" fill=\"{colour}\" fill-opacity=\".45\"/>\
                 <path d=\"{path}\" stroke=\"{colour}\" stroke-width=\"2\"/></pattern></defs>"
            ));
        }
        svg
    }

    pub(super) fn put(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _infallible = self.0.write_fmt(text);
        self.0.push('\n');
    }

    /// Words that begin, end or lie around a point.
    pub(super) fn text(&mut self, (x, y): (f64, f64), anchor: &str, text: &str) {
        let text = escaped(text);
        self.put(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    pub(super) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        self.put(format_args!(
            "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
            from.0, from.1, to.0, to.1
        ));
    }

    /// A bar with a hint that a browser shows.
    pub(super) fn bar(&mut self, x: (f64, f64), y: (f64, f64), fill: &str, hint: &str) {
        let (width, height) = ((x.1 - x.0).max(1.0), (y.1 - y.0).max(0.0));
        self.put(format_args!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\">\
             <title>{}</title></rect>",
            x.0,
            y.0,
            escaped(hint)
        ));
    }

    /// The axes of a panel with sizes, or sizes a second.
    pub(super) fn sizes(&mut self, scale: &Scale, unit: &str) {
        let Panel {
            left,
            right,
            bottom,
            top,
        } = scale.panel;
        for tick in scale.ticks() {
            let y = scale.y(tick);
            self.line("grid", (left, y), (right, y));
            let label = format!("{}{unit}", display_size(tick as u64));
            self.text((left - 6.0, y + 4.0), "end", &label);
        }
        self.line("axis", (left, top), (left, bottom));
        self.line("axis", (left, bottom), (right, bottom));
    }

    /// Points joined by a line, with a mark at each.
    pub(super) fn series(&mut self, series: &Series, points: &[(f64, f64)]) {
        let path: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        self.put(format_args!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\" stroke-dasharray=\"{}\"/>",
            path.join(" "),
            series.colour,
            series.dashes
        ));
        for &point in points {
            self.mark(series, point);
        }
    }

    fn mark(&mut self, series: &Series, (x, y): (f64, f64)) {
        let colour = series.colour;
        match series.mark {
            Mark::Circle => self.put(format_args!(
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>"
            )),
            Mark::Square => self.put(format_args!(
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"7\" height=\"7\" fill=\"{colour}\"/>",
                x - 3.5,
                y - 3.5
            )),
            Mark::Diamond => self.put(format_args!(
                "<path d=\"M{:.1},{y:.1}l5,-5l5,5l-5,5z\" fill=\"{colour}\"/>",
                x - 5.0
            )),
        }
    }

    /// An entry of a legend; returns where the next one may begin.
    pub(super) fn legend(&mut self, (x, y): (f64, f64), series: &Series) -> f64 {
        self.series(series, &[(x, y - 4.0), (x + 24.0, y - 4.0)]);
        self.text((x + 32.0, y), "start", series.name);
        x + 32.0 + width(series.name)
    }

    /// The same for a kind of bar.
    pub(super) fn legend_bar(&mut self, (x, y): (f64, f64), fill: &str, name: &str) -> f64 {
        self.bar((x, x + 16.0), (y - 11.0, y + 1.0), fill, name);
        self.text((x + 22.0, y), "start", name);
        x + 22.0 + width(name)
    }

    pub(super) fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

/// About as wide as `text` is drawn, with a gap.
fn width(text: &str) -> f64 {
    text.chars().count() as f64 * 6.6 + 20.0
}

/// What is drawn at each point of a series.
#[derive(Debug, Clone, Copy)]
pub(super) enum Mark {
    Circle,
    Square,
    Diamond,
}

/// A quantity that is drawn as a line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Series {
    pub(super) name: &'static str,
    pub(super) colour: &'static str,
    pub(super) dashes: &'static str,
    pub(super) mark: Mark,
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PANEL: Panel = Panel {
        left: 0.0,
        right: 100.0,
        top: 0.0,
        bottom: 100.0,
    };

    #[test]
    fn a_scale_has_all_values_between_its_ends() {
        let scale = Scale::of(PANEL, [3e3, 7e8, 0.0, f64::NAN].into_iter());
        assert!(scale.y(7e8) >= 0.0 && scale.y(7e8) < scale.y(3e3));
        assert!(scale.y(3e3) < 100.0);
        assert_eq!(scale.y(0.0), 100.0);
        assert!(scale.ticks().count() <= 7);
    }

    #[test]
    fn a_scale_of_nothing_is_a_scale() {
        let scale = Scale::of(PANEL, std::iter::empty());
        assert!(scale.y(1.0).is_finite() && scale.ticks().count() > 0);
    }

    #[test]
    fn words_of_others_do_not_become_elements() {
        let mut svg = Svg::new(1.0, 1.0, "<script>");
        svg.text((0.0, 0.0), "start", "a<b & \"c\"");
        let text = svg.finish();
        assert!(!text.contains("<script>"));
        assert!(text.contains("a&lt;b &amp; &quot;c&quot;"));
    }
}
