//! Measurements beside a peer, in one run: a table for people, one JSON line for programs.

mod boot;
mod cpu;
mod migrate;
mod session;
mod steadiness;

use std::process::Command;

use anyhow::bail;
use clap::{Args, Subcommand};
use serde::Serialize;

use dunlin_testbed::process;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Boots stock kernels to init on the software CPU, beside QEMU's software CPU
    Boot(BenchArguments),
    /// Runs the same work on the software CPU and on QEMU's
    Cpu(cpu::CpuArguments),
    /// Moves the benchmark guest, beside QEMU and a raw copy
    Migrate(migrate::MigrateArguments),
}

/// Arguments that every benchmark takes.
#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    /// How many times each side runs
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
    /// Print only the JSON line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(bench: &Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Boot(arguments) => boot::run(arguments),
        Bench::Cpu(arguments) => cpu::run(arguments),
        Bench::Migrate(arguments) => migrate::run(arguments),
    }
}

/// Builds the `dunlin` to measure.
pub(crate) fn build() -> anyhow::Result<std::path::PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "--release", "--quiet", "--package", "dunlin"])
        .current_dir(process::root());
    process::run_shown(&mut cargo)?;
    Ok(process::target().join("release/dunlin"))
}

/// One figure.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// `None` when it could not be measured; `why` says the reason.
    value: Option<f64>,
    unit: &'static str,
    limit: String,
    holds: bool,
    n: usize,
    min: Option<f64>,
    max: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

#[derive(Debug, Serialize)]
struct Results<'a> {
    bench: &'static str,
    machine: String,
    rows: &'a [Row],
    holds: bool,
}

impl Row {
    /// A figure that must not exceed `limit`; median, minimum and maximum of `values`.
    fn at_most(name: &str, unit: &'static str, limit: f64, values: &[f64]) -> Self {
        Self {
            name: name.to_owned(),
            value: median(values),
            unit,
            limit: format!("<= {limit}"),
            holds: median(values).is_some_and(|value| value <= limit),
            n: values.len(),
            min: values.iter().copied().reduce(f64::min),
            max: values.iter().copied().reduce(f64::max),
            why: None,
        }
    }

    /// A figure that must not fall below `limit`; median, minimum and maximum of `values`.
    fn at_least(name: &str, unit: &'static str, limit: f64, values: &[f64]) -> Self {
        Self {
            limit: format!(">= {limit}"),
            holds: median(values).is_some_and(|value| value >= limit),
            ..Self::at_most(name, unit, limit, values)
        }
    }

    /// A figure whose share of `values` from below (0.99: all but the highest hundredth) must not
    /// exceed a limit:
    /// `bound` is the share and the limit.
    fn percentile_at_most(
        name: &str,
        unit: &'static str,
        (share, limit): (f64, f64),
        values: &[f64],
    ) -> Self {
        let value = percentile(values, share);
        Self {
            value,
            holds: value.is_some_and(|value| value <= limit),
            ..Self::at_most(name, unit, limit, values)
        }
    }

    /// A figure that must be `expected` exactly.
    fn exactly(name: &str, unit: &'static str, expected: f64, value: f64, n: usize) -> Self {
        Self {
            name: name.to_owned(),
            value: Some(value),
            unit,
            limit: format!("= {expected}"),
            holds: value == expected,
            n,
            min: None,
            max: None,
            why: None,
        }
    }

    /// A figure without a limit.
    fn information(name: &str, unit: &'static str, values: &[f64]) -> Self {
        Self {
            limit: String::new(),
            holds: true,
            ..Self::at_most(name, unit, f64::INFINITY, values)
        }
    }

    /// A figure that could not be measured.
    fn missing(name: &str, unit: &'static str, why: String) -> Self {
        Self {
            why: Some(why),
            limit: String::new(),
            holds: false,
            ..Self::at_most(name, unit, 0.0, &[])
        }
    }
}

/// Prints the table (to standard error when only JSON is wanted on standard output, nothing).
fn print(bench: &'static str, rows: &[Row], json: bool) -> anyhow::Result<()> {
    if !json {
        println!(
            "{:<32} {:>10} {:<24} {:<10} n  min..max",
            "row", "value", "unit", "limit"
        );
        for row in rows {
            println!("{row}");
        }
    }
    let results = Results {
        bench,
        machine: machine(),
        rows,
        holds: rows.iter().all(|row| row.holds),
    };
    println!("{}", serde_json::to_string(&results)?);
    let missed: Vec<_> = rows
        .iter()
        .filter(|row| !row.holds)
        .map(|row| &*row.name)
        .collect();
    if !missed.is_empty() {
        bail!("missed: {}", missed.join(", "));
    }
    Ok(())
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = self
            .value
            .map_or("-".to_owned(), |value| format!("{value:.3}"));
        let mut range = match (self.min, self.max) {
            (Some(min), Some(max)) => format!("{min:.3}..{max:.3} "),
            _ => String::new(),
        };
        range.push_str(self.why.as_deref().unwrap_or_default().trim_end());
        let mark = if self.holds { "" } else { "  MISSED" };
        write!(
            f,
            "{:<32} {value:>10} {:<24} {:<10} {}  {range}{mark}",
            self.name, self.unit, self.limit, self.n
        )
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted.get(middle).copied()
    } else {
        Some((sorted.get(middle.checked_sub(1)?)? + sorted.get(middle)?) / 2.0)
    }
}

/// The smallest value that is not below the given share of all (nearest rank).
fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// Processor model and number of processors.
fn machine() -> String {
    let model = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split(':').nth(1)?.trim().to_owned())
        })
        .unwrap_or_else(|| "unknown processor".to_owned());
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{model}, {processors} processors")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn a_percentile_is_the_nearest_rank() {
        let values: Vec<_> = (1..=200).map(f64::from).collect();
        assert_eq!(percentile(&values, 0.99), Some(198.0));
        assert_eq!(percentile(&values, 0.5), Some(100.0));
        assert_eq!(percentile(&[7.0], 0.99), Some(7.0));
        assert_eq!(percentile(&[], 0.99), None);
    }

    #[test]
    fn a_row_below_its_limit_does_not_hold() {
        assert!(!Row::at_least("x", "", 0.8, &[0.7, 0.79, 0.9]).holds);
        assert!(Row::at_least("x", "", 0.8, &[0.7, 0.8, 0.9]).holds);
        assert!(!Row::percentile_at_most("x", "", (0.99, 2.0), &[1.0, 3.0]).holds);
        assert!(Row::percentile_at_most("x", "", (0.5, 2.0), &[1.0, 3.0]).holds);
    }

    #[test]
    fn a_row_above_its_limit_does_not_hold() {
        assert!(!Row::at_most("x", "s", 1.0, &[0.9, 1.1, 1.2]).holds);
        assert!(Row::at_most("x", "s", 1.0, &[0.9, 1.0, 1.2]).holds);
        assert!(!Row::at_most("x", "s", 1.0, &[]).holds);
        assert!(!Row::missing("x", "s", "no peer".to_owned()).holds);
    }
}
