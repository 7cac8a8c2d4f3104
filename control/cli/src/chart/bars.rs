//! Bars of a terminal.

/// Columns that a bar has at most.
const WIDTH: f64 = 24.0;
/// The least that is drawn at all, against the largest: a thousandth of a thousandth.
const SPAN: f64 = 20.0;
const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// A bar as long as `value` beside `largest`, on a logarithmic scale: half of it means a
/// thousandth.
pub fn bar(value: u64, largest: u64) -> String {
    if value == 0 {
        return String::new();
    }
    let share = (value as f64 / largest.max(value) as f64).log2() / SPAN + 1.0;
    let eighths = (share.clamp(0.0, 1.0) * WIDTH * 8.0).round().max(1.0) as usize;
    let mut text = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        text.push(EIGHTHS[eighths % 8]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_value() {
        assert_eq!(bar(0, 100), "");
        assert_eq!(bar(1 << 30, 1 << 30), "█".repeat(24));
        assert_eq!(bar(1 << 20, 1 << 30), "█".repeat(12));
        assert_eq!(bar(1, u64::MAX), "▏");
        let long = |value| bar(value, 1 << 30).chars().count();
        assert!((0..30).all(|power| long(1 << power) <= long(1 << (power + 1))));
    }

    #[test]
    fn the_largest_need_not_be() {
        assert_eq!(bar(7, 0), "█".repeat(24));
    }
}
