//! What moving a guest costs, and how long the guest stands still: Dunlin beside QEMU and beside a
//! raw copy,
//! with the benchmark guest, through the binary, as the guest itself sees it.
//!
//! Every figure of a group comes from one run of its function; sides that are compared take turns.
//! A group
//! that fails, or that the binary does not offer, leaves rows without a value and says why.

mod blackout;
mod faults;
mod moments;
mod overload;
mod qemu;
mod raw;
mod recoveries;
mod sweep;
mod throughput;

use std::path::PathBuf;
use std::process::Command;

use anyhow::bail;
use clap::Args;
use dunlin_guest_migbench::Parameters;

use super::{Row, print};
use crate::packages;
use dunlin_testbed::mover::{Engine, Mover, Setup};
use dunlin_testbed::{hosts, process};

/// Arguments of `cargo xtask bench migrate`.
#[derive(Debug, Args)]
pub(crate) struct MigrateArguments {
    /// Few runs of small guests
    #[arg(long)]
    quick: bool,
    /// Only the groups that make these rows
    #[arg(long, value_delimiter = ',', value_name = "ROW")]
    only: Vec<String>,
    /// How many times each figure is measured, instead of what its row asks for
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    runs: Option<u64>,
    /// Measure this `dunlin` instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Print only the JSON line
    #[arg(long)]
    json: bool,
}

/// Rows that are measured together.
struct Group {
    /// Rows of the table that must hold, with their units.
    rows: &'static [(&'static str, &'static str)],
    /// Measures them.
    measure: fn(&Bench) -> anyhow::Result<Vec<Row>>,
}

const GROUPS: [Group; 13] = [
    Group {
        rows: &[
            ("throughput_plain", "rate ratio to a raw copy"),
            ("qemu_total", "time ratio to QEMU"),
            ("qemu_cpu", "ratio of CPU seconds a GiB to QEMU"),
        ],
        measure: throughput::plain,
    },
    Group {
        rows: &[("throughput_tls", "rate ratio to plain")],
        measure: throughput::tls,
    },
    Group {
        rows: &[
            ("blackout_idle_p50_ms", "ms"),
            ("blackout_idle_p99_ms", "ms"),
        ],
        measure: blackout::idle,
    },
    Group {
        rows: &[
            ("blackout_busy_p50_ms", "ms"),
            ("blackout_busy_p99_ms", "ms"),
        ],
        measure: blackout::busy,
    },
    Group {
        rows: &[("limit_10_exceeded", "moves")],
        measure: |bench| blackout::limit(bench, 10),
    },
    Group {
        rows: &[("limit_50_exceeded", "moves")],
        measure: |bench| blackout::limit(bench, 50),
    },
    Group {
        rows: &[("limit_300_exceeded", "moves")],
        measure: |bench| blackout::limit(bench, 300),
    },
    Group {
        rows: &[
            ("above_bw_gap_ms", "ms"),
            ("above_bw_slowdown_pct", "percent of writes"),
            ("fault_p99_us", "us"),
        ],
        measure: overload::above_bandwidth,
    },
    Group {
        rows: &[("recoveries_ok", "moves")],
        measure: recoveries::run,
    },
    Group {
        rows: &[("handover_p99_ms", "ms")],
        measure: moments::handover,
    },
    Group {
        rows: &[("faults_ok", "moves")],
        measure: faults::run,
    },
    Group {
        rows: &[("restore_ms", "ms")],
        measure: moments::restore,
    },
    Group {
        rows: &[("sweep", "ms")],
        measure: sweep::run,
    },
];

/// What all groups share.
struct Bench {
    binary: PathBuf,
    folder: PathBuf,
    engine: Engine,
    quick: bool,
    runs: Option<u64>,
    qemu: Option<qemu::Accelerator>,
}

pub(super) fn run(arguments: &MigrateArguments) -> anyhow::Result<()> {
    process::catch_interrupts();
    let missing = packages::install(&[("qemu-system-x86", qemu::PROGRAM)]);
    let binary = match &arguments.binary {
        Some(binary) => binary.clone(),
        None => super::build()?,
    };
    let folder = process::target().join("bench-migrate");
    let engine = Engine::best(&binary, &folder)?;
    let mut bench = Bench {
        binary,
        folder,
        engine,
        quick: arguments.quick,
        runs: arguments.runs,
        qemu: None,
    };
    if missing.is_empty() {
        bench.qemu = bench.best_accelerator();
    }
    let known = |name: &String| {
        GROUPS
            .iter()
            .any(|g| g.rows.iter().any(|row| row.0 == name))
    };
    if let Some(unknown) = arguments.only.iter().find(|name| !known(name)) {
        let names = GROUPS
            .iter()
            .flat_map(|group| group.rows.iter().map(|row| row.0));
        bail!(
            "there is no row {unknown}; there are {}",
            names.collect::<Vec<_>>().join(", ")
        );
    }
    let mut rows = vec![bench.conditions()];
    for group in &GROUPS {
        let wanted = |name: &str| arguments.only.iter().any(|only| only == name);
        if !arguments.only.is_empty() && !group.rows.iter().any(|row| wanted(row.0)) {
            continue;
        }
        process::check_interrupt()?;
        eprintln!("measuring {} …", group.rows[0].0);
        let measured = (group.measure)(&bench).unwrap_or_else(|error| {
            let why = format!("{error:#}");
            let missing = |row: &(&str, &'static str)| Row::missing(row.0, row.1, why.clone());
            group.rows.iter().map(missing).collect()
        });
        // A long run says what it has found so far.
        for row in &measured {
            eprintln!("{row}");
        }
        rows.extend(measured);
    }
    print("migrate", &rows, arguments.json)
}

impl Bench {
    /// A guest of this size that does this, in a folder of its own.
    fn setup(&self, name: &str, memory_mebibytes: u64, parameters: Parameters) -> Setup {
        Setup {
            binary: self.binary.clone(),
            folder: self.folder.join(name),
            engine: self.engine,
            memory_mebibytes,
            parameters,
        }
    }

    /// How many times something is measured.
    fn runs(&self, full: u64, quick: u64) -> u64 {
        self.runs.unwrap_or(if self.quick { quick } else { full })
    }

    /// Does a command of the binary know this word?
    fn offers(&self, command: &[&str], word: &str) -> anyhow::Result<()> {
        let mut help = Command::new(&self.binary);
        help.args(command).arg("--help");
        if !process::output(&mut help).is_ok_and(|text| text.contains(word)) {
            let words = [&["dunlin"], command].concat().join(" ");
            bail!("\"{words}\" does not offer {word}");
        }
        Ok(())
    }

    /// Does post-copy work here? Asked of a move without a fault.
    fn moves_behind_the_guest(&self) -> bool {
        let parameters = Parameters {
            fill_mebibytes: Some(4),
            ..Parameters::default()
        };
        Mover::memory_follows(&self.setup("post", 32, parameters))
    }

    /// What runs the guest in QEMU as ours runs it here: KVM beside KVM.
    fn best_accelerator(&self) -> Option<qemu::Accelerator> {
        let parameters = Parameters {
            fill_mebibytes: Some(1),
            ..Parameters::default()
        };
        let setup = self.setup("accelerator", 32, parameters);
        let accelerator = match self.engine.name {
            "kvm" => qemu::Accelerator::Kvm,
            _ => qemu::Accelerator::Tcg,
        };
        qemu::Peer::start(&setup, accelerator)
            .inspect_err(|error| eprintln!("QEMU with {accelerator:?}: {error:#}"))
            .ok()
            .map(|_peer| accelerator)
    }

    /// The peer, or why there is none.
    fn peer(&self) -> anyhow::Result<qemu::Accelerator> {
        match self.qemu {
            Some(accelerator) => Ok(accelerator),
            None => bail!(
                "{} is not installed, or does not run the guest",
                qemu::PROGRAM
            ),
        }
    }

    /// What else the figures depend on: processes that want to run besides, at the start.
    fn conditions(&self) -> Row {
        let load = std::fs::read_to_string("/proc/loadavg").ok();
        let load = load.and_then(|text| text.split(' ').next()?.parse().ok());
        let values: Vec<f64> = load.into_iter().collect();
        let mut row = Row::information("load_at_start", "processes", &values);
        let version = process::output(Command::new(qemu::PROGRAM).arg("--version"));
        let version = version.unwrap_or_default();
        let runs = match (self.quick, self.runs) {
            (_, Some(runs)) => format!("{runs} runs of each"),
            (true, None) => "few runs of small guests".to_owned(),
            (false, None) => "all runs".to_owned(),
        };
        row.why = Some(format!(
            "{runs}; engine {} ({}), QEMU by {:?}: {}",
            self.engine.name,
            self.engine.baseline,
            self.qemu,
            version.lines().next().unwrap_or("not installed")
        ));
        row
    }
}

/// Makes one certificate for both hosts; returns the folder for `--tls`.
fn certificates(bench: &Bench) -> anyhow::Result<String> {
    let folder = bench.folder.join("certificates");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    let mut command = Command::new(&bench.binary);
    command.args(["certificates", "--to"]).arg(&folder);
    let [first, second] = [hosts::FIRST, hosts::SECOND].map(|address| address.to_string());
    command.arg("--host").arg(format!("{first},{second}"));
    process::run(&mut command)?;
    Ok(folder.join(first).display().to_string())
}
