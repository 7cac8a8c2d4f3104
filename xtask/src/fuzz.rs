//! Runs the fuzz targets of `fuzz/`, each for a bounded time, and tells what came out of it.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use clap::Args;

use dunlin_testbed::process;

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub(crate) struct FuzzArguments {
    /// Only this target, e.g. `cpu_code`, or those of an area, `migration`; all of them, one after
    /// the other, without
    target: Option<String>,
    /// How long each target runs
    #[arg(long, default_value_t = 60, conflicts_with = "minutes")]
    seconds: u32,
    /// The same in minutes
    #[arg(long)]
    minutes: Option<u32>,
}

/// Targets that belong together: the name of the area, and theirs.
const AREAS: [(&str, &[&str]); 1] = [(
    "migration",
    &[
        "migration_stream",
        "migration_session",
        "lane_stream",
        "saved_guest",
    ],
)];

/// What the fuzzer said of a run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Summary {
    executions: u64,
    /// Coverage points that the corpus at hand reached, and that are reached now.
    coverage: Option<(u64, u64)>,
    /// Files with inputs that crashed, hung or leaked.
    crashes: Vec<String>,
}

pub(crate) fn run(arguments: &FuzzArguments) -> anyhow::Result<()> {
    if !process::installed("cargo-fuzz") {
        println!("cargo-fuzz is not installed: installing it with `cargo install`");
        process::run_shown(cargo().args(["install", "--locked", "--quiet", "cargo-fuzz"]))?;
    }
    let bootstrap = !process::output(Command::new("rustc").arg("--version"))?.contains("nightly");
    let fuzz = |subcommand: &str| {
        let mut command = cargo();
        command.args(["fuzz", subcommand, "--fuzz-dir", "fuzz"]);
        if bootstrap {
            // Sanitizers and coverage are options of unstable compilers.
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        command
    };
    let list = process::output(&mut fuzz("list"))?;
    let mut targets: Vec<&str> = list.lines().collect();
    let wanted = arguments.target.as_deref();
    if let Some((_, area)) = AREAS.iter().find(|area| Some(area.0) == wanted) {
        targets.retain(|target| area.contains(target));
    } else if let Some(target) = wanted {
        if !targets.contains(&target) {
            bail!(
                "no fuzz target \"{target}\": there are {}",
                targets.join(", ")
            );
        }
        targets = vec![target];
    }
    let build = process::target().join("fuzz");
    let seconds = arguments
        .minutes
        .map_or(arguments.seconds, |minutes| minutes.saturating_mul(60));
    let mut failed = Vec::new();
    for target in targets {
        let mut command = fuzz("run");
        command.arg("--target-dir").arg(&build).arg(target);
        // New inputs go to the first of these.
        for kind in ["corpus", "seeds"] {
            let folder = process::root().join("fuzz").join(kind).join(target);
            if kind == "corpus" {
                fs::create_dir_all(&folder)?;
            }
            if folder.is_dir() {
                command.arg(folder);
            }
        }
        command
            .arg("--")
            .arg(format!("-max_total_time={seconds}"))
            .args(["-print_final_stats=1", "-timeout=20", "-len_control=0"]);
        if !run_target(target, &mut command)? {
            failed.push(target);
        }
    }
    if !failed.is_empty() {
        bail!("fuzzing failed: {}", failed.join(", "));
    }
    Ok(())
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(process::root());
    command
}

/// Runs one target and prints its line; true when nothing crashed.
fn run_target(target: &str, command: &mut Command) -> anyhow::Result<bool> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .context("failed to start cargo fuzz")?;
    let log = process::target().join(format!("fuzz-{target}.log"));
    fs::write(&log, &output.stderr)?;
    let text = String::from_utf8_lossy(&output.stderr);
    let summary = Summary::read(&text);
    let log = log.display();
    match summary.coverage {
        None => println!("{target}: failed before the first execution, see {log}"),
        Some((before, now)) => println!(
            "{target}: {} executions, {} new coverage points ({now} in all), {} crashes",
            summary.executions,
            now.saturating_sub(before),
            summary.crashes.len(),
        ),
    }
    for file in &summary.crashes {
        println!("  {file} (what happened: {log})");
    }
    Ok(output.status.success() && summary.crashes.is_empty())
}

impl Summary {
    fn read(text: &str) -> Self {
        let mut summary = Self::default();
        for line in text.lines() {
            if let Some(file) = line.split_once("Test unit written to ") {
                summary.crashes.push(file.1.trim().to_owned());
            } else if let Some((_, count)) = line.split_once("stat::number_of_executed_units:") {
                summary.executions = count.trim().parse().unwrap_or(0);
            } else if let Some((execution, rest)) = line
                .strip_prefix('#')
                .and_then(|line| line.split_once('\t'))
            {
                let word = |key: &str| {
                    let mut words = rest.split_whitespace().skip_while(|word| *word != key);
                    words.nth(1)?.parse().ok()
                };
                let now = word("cov:").unwrap_or(0);
                let before = summary.coverage.map_or(now, |(before, _)| before);
                if rest.starts_with("INITED") || summary.coverage.is_some() {
                    summary.coverage = Some((before, now.max(before)));
                    // A crash leaves no statistics.
                    let executions = execution.parse().unwrap_or(0);
                    summary.executions = summary.executions.max(executions);
                }
            }
        }
        summary
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_crash_is_summed_up() {
        let summary = Summary::read(
            "INFO: Seed: 1\n\
             #2\tINITED cov: 100 ft: 101 corp: 1/1b exec/s: 0 rss: 40Mb\n\
             #300\tNEW    cov: 140 ft: 160 corp: 2/9b lim: 4 exec/s: 0 rss: 41Mb L: 4/4 MS: 1\n\
             #5000\tDONE   cov: 142 ft: 170 corp: 3/20b lim: 8 exec/s: 500 rss: 50Mb\n\
             stat::number_of_executed_units: 5000\n",
        );
        let expected = Summary {
            executions: 5000,
            coverage: Some((100, 142)),
            crashes: Vec::new(),
        };
        assert_eq!(summary, expected);
    }

    #[test]
    fn a_crash_is_found_by_its_file() {
        let summary = Summary::read(
            "#2\tINITED cov: 100 ft: 101 corp: 1/1b exec/s: 0 rss: 40Mb\n\
             #77\tNEW    cov: 101 ft: 160 corp: 2/9b lim: 4 exec/s: 0 rss: 41Mb\n\
             artifact_prefix='/f/'; Test unit written to /f/crash-00\n",
        );
        assert_eq!(summary.crashes, ["/f/crash-00"]);
        assert_eq!(
            (summary.executions, summary.coverage),
            (77, Some((100, 101)))
        );
    }

    #[test]
    fn a_target_that_does_not_build_has_no_coverage() {
        assert_eq!(Summary::read("error: could not compile\n").coverage, None);
    }
}
