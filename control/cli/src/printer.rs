//! Data to standard output, everything else to standard error.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::error::CliError;

/// Prints for people or, with `--json`, for programs.
#[derive(Debug, Clone, Copy)]
pub struct Printer {
    json: bool,
}

impl Printer {
    /// A printer; `json` prints each result as one JSON object.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Are results for programs?
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// May a result be drawn: is it read on a terminal?
    pub fn draws(&self) -> bool {
        !self.json && io::stdout().is_terminal()
    }

    /// A command's result: `value` as one line of JSON, or `text` for people.
    pub fn result<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) {
        let line = if self.json {
            serde_json::to_string(value)
                .unwrap_or_else(|error| format!("{{\"error\":{{\"message\":\"{error}\"}}}}"))
        } else {
            text()
        };
        // A reader that went away (a closed pipe) is no error of the command.
        let mut out = io::stdout().lock();
        if !line.is_empty() {
            let _gone = out.write_all(line.as_bytes());
            if !line.ends_with('\n') {
                let _gone = out.write_all(b"\n");
            }
        }
        let _gone = out.flush();
    }

    /// A remark for people, on standard error; programs do not see it.
    pub fn note(&self, text: &str) {
        if !self.json {
            let _gone = writeln!(io::stderr().lock(), "{text}");
        }
    }

    /// The error that ended the command, printed once.
    pub fn error(&self, error: &CliError) {
        if self.json {
            let body = serde_json::json!({ "error": error.to_api() });
            self.result(&body, String::new);
            return;
        }
        let mut err = io::stderr().lock();
        let _gone = writeln!(err, "error: {}", error.message());
        if let Some(hint) = error.hint() {
            let _gone = writeln!(err, "  hint: {hint}");
        }
    }

    /// A progress bar on a terminal; nothing in a pipe and for programs.
    pub fn progress(&self) -> ProgressBar {
        if self.json || !io::stderr().is_terminal() {
            return ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        }
        let bar = ProgressBar::new(0);
        let style = "{spinner} {msg:32} [{bar:30}] {percent:>3} %  {elapsed}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }
}

/// Columns of text, as wide as their widest cell, two spaces apart.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let mut widths = vec![0; columns];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Milliseconds for people: `850 ms`, `12.4 s`, `3 min 2 s`.
pub fn display_milliseconds(milliseconds: u64) -> String {
    match milliseconds {
        0..1000 => format!("{milliseconds} ms"),
        1000..60_000 => format!("{:.1} s", milliseconds as f64 / 1000.0),
        _ => format!(
            "{} min {} s",
            milliseconds / 60_000,
            milliseconds / 1000 % 60
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_have_no_trailing_space() {
        let rows = [
            vec!["NAME".into(), "PID".into()],
            vec!["a".into(), "1".into()],
        ];
        assert_eq!(table(&rows), "NAME  PID\na     1\n");
    }

    #[test]
    fn times_are_readable() {
        assert_eq!(display_milliseconds(850), "850 ms");
        assert_eq!(display_milliseconds(12_400), "12.4 s");
        assert_eq!(display_milliseconds(182_000), "3 min 2 s");
    }
}
