//! Moves guests again and again while something breaks, and counts what became of them.

use anyhow::bail;
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::bench;
use dunlin_testbed::mover::Engine;
use dunlin_testbed::process;
use dunlin_testbed::soak::{self, Plan, Summary};

/// What can be soaked.
#[derive(Debug, Subcommand)]
pub(crate) enum Soak {
    /// Kills, cuts, stalls and corrupts moves at random places of their conversation
    Migration(SoakArguments),
}

/// Arguments of `cargo xtask soak migration`.
#[derive(Debug, Args)]
pub(crate) struct SoakArguments {
    /// How many moves
    #[arg(long, default_value_t = 30)]
    runs: u64,
    /// Number of the first one: a run of the same number and seed has the same fault
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// What faults are drawn from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Modes to move in
    #[arg(long, value_delimiter = ',', default_value = "pre,post")]
    modes: Vec<Mode>,
    /// Use this `dunlin` instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<std::path::PathBuf>,
    /// Print only one JSON line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Mode {
    Pre,
    Post,
    Auto,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Pre => "pre",
            Self::Post => "post",
            Self::Auto => "auto",
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    soak: &'static str,
    seed: u64,
    engine: &'static str,
    #[serde(flatten)]
    summary: &'a Summary,
    /// Did every run end well?
    holds: bool,
}

pub(crate) fn run(soak: &Soak) -> anyhow::Result<()> {
    let Soak::Migration(arguments) = soak;
    process::catch_interrupts();
    let binary = match &arguments.binary {
        Some(binary) => binary.clone(),
        None => bench::build()?,
    };
    let folder = process::target().join("soak");
    let engine = Engine::best(&binary, &folder)?;
    let plan = Plan {
        binary,
        folder: folder.join("hosts"),
        engine,
        modes: arguments.modes.iter().map(|mode| mode.name()).collect(),
        seed: arguments.seed,
        runs: arguments.first..arguments.first + arguments.runs,
    };
    let summary = soak::run(&plan, |number, text| {
        if !arguments.json {
            println!("{number:>5} {text}");
        }
    })?;
    let line = Line {
        soak: "migration",
        seed: arguments.seed,
        engine: engine.name,
        summary: &summary,
        holds: summary.ok == summary.runs,
    };
    println!("{}", serde_json::to_string(&line)?);
    if !line.holds {
        bail!(
            "{} of {} runs ended badly",
            summary.failures.len(),
            summary.runs
        );
    }
    Ok(())
}
