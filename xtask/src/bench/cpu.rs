//! The same work on Dunlin's software CPU and on QEMU's: one kernel, one initramfs, in turn, timed by
//! the host's clock at what the guest says on its console.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;

use super::boot::MARKER;
use super::session::{Session, dunlin, qemu};
use super::{Row, median, print, steadiness};
use crate::guest::{self, Guest};
use crate::packages::{self, Series};
use dunlin_testbed::process;

/// Work of one processor, and how much of QEMU's time it may take.
const WORK: [(&str, f64); 8] = [
    ("md5", 0.8),
    ("sha256", 0.8),
    ("gzip", 0.8),
    ("awk", 0.4),
    ("shloop", 0.4),
    ("forkexec", 0.8),
    ("syscall", 0.8),
    ("sort", 0.4),
];
/// What else is looked at, each a row or a few.
const MORE: [&str; 7] = [
    "boot",
    "smp2",
    "idle_pct",
    "clock_drift",
    "hung_boots",
    "hung_boots_loaded",
    "lockstep_differences",
];
/// Work of two processors.
const PAIR: &str = "pair";
const BOOT: f64 = 0.7;
const MEAN: f64 = 0.65;
const TWO_OVER_ONE: f64 = 1.7;
/// Takes the longest of all work under lockstep.
const LONGEST: &str = "awk";
const RATIO: &str = "time ratio to QEMU TCG";
/// Whoever takes longer hangs.
const LIMIT: Duration = Duration::from_secs(600);
/// A boot and all the work, run twice, and compared block by block.
const LOCKSTEP_LIMIT: Duration = Duration::from_secs(3600);

/// Arguments of `cargo xtask bench cpu`.
#[derive(Debug, Args)]
pub(crate) struct CpuArguments {
    /// How many times each side runs
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
    /// How many boots are looked at for one that hangs; the same number once more on a busy host
    #[arg(long, default_value_t = 100)]
    boots: u64,
    /// Only these pieces of work and other rows, and nothing else
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Measure this `dunlin` instead of building one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Print only the JSON line
    #[arg(long)]
    json: bool,
}

/// What one side took, run by run.
#[derive(Default)]
struct Side {
    boot: Vec<f64>,
    work: Vec<(String, f64)>,
    /// What came of each piece of work.
    results: BTreeMap<String, BTreeSet<String>>,
}

impl Side {
    /// The times of one piece of work.
    fn times(&self, name: &str) -> Vec<f64> {
        let of_it = self.work.iter().filter(|work| work.0 == name);
        of_it.map(|work| work.1).collect()
    }

    fn run(&mut self, command: &mut Command, names: &[&str]) -> anyhow::Result<()> {
        let session = Session::run(command, LIMIT)?;
        if let Some(to_init) = session.said(MARKER) {
            self.boot.push(to_init.as_secs_f64());
        }
        for &name in names {
            let time = took(&session, name).with_context(|| {
                let last = session.lines.last().map_or("nothing", |line| &line.1);
                format!(
                    "{:?} did not finish {name}; it said last: {last}",
                    command.get_program()
                )
            })?;
            self.work.push((name.to_owned(), time));
            let results = self.results.entry(name.to_owned()).or_default();
            results.insert(result(&session, name).to_owned());
        }
        Ok(())
    }
}

/// How long a piece of work took in a session, in seconds.
fn took(session: &Session, name: &str) -> Option<f64> {
    let begun = session.said(&format!("dunlin-work: begin {name}"))?;
    let ended = session.said(&format!("dunlin-work: end {name}"))?;
    Some(ended.checked_sub(begun)?.as_secs_f64())
}

/// What the guest said came of a piece of work.
fn result<'a>(session: &'a Session, name: &str) -> &'a str {
    let words = format!("dunlin-work: end {name}");
    let mut lines = session.lines.iter();
    lines
        .find_map(|line| line.1.split_once(&words))
        .map_or("", |(_, result)| result.trim())
}

fn cmdline(names: &[&str]) -> String {
    let names = names.join(",");
    format!("console=ttyS0 quiet dunlin.init=work dunlin.work={names}")
}

pub(super) fn run(arguments: &CpuArguments) -> anyhow::Result<()> {
    let known = |name: &str| WORK.iter().any(|work| work.0 == name) || MORE.contains(&name);
    if let Some(unknown) = arguments.only.iter().find(|name| !known(name)) {
        let names = WORK.iter().map(|work| work.0).chain(MORE);
        let names: Vec<_> = names.collect();
        bail!("there is no row {unknown}; there are {}", names.join(", "));
    }
    process::catch_interrupts();
    let missing = packages::install(&[("qemu-system-x86", "qemu-system-x86_64")]);
    let binary = match &arguments.binary {
        Some(binary) => binary.clone(),
        None => super::build()?,
    };
    let guest = guest::build(Series::V6_1)?;
    let wanted = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|n| n == name);
    let names: Vec<_> = WORK
        .iter()
        .map(|work| work.0)
        .filter(|n| wanted(n))
        .collect();
    let (mut ours, mut peer) = (Side::default(), Side::default());
    let cmdline = cmdline(&names);
    let runs = match names[..] {
        [] if !wanted("boot") => 0,
        _ => arguments.runs,
    };
    for run in 0..runs {
        eprintln!("run {} of {runs} …", run + 1);
        ours.run(&mut dunlin(&binary, &guest, 1, &cmdline), &names)?;
        if missing.is_empty() {
            peer.run(&mut qemu(&guest, 1, &cmdline), &names)?;
        }
    }
    let mut rows = Vec::new();
    if wanted("boot") {
        rows.push(ratio("boot", BOOT, &ours.boot, &peer.boot));
    }
    let mut ratios = Vec::new();
    for (name, limit) in WORK.iter().filter(|work| wanted(work.0)) {
        let row = ratio(name, *limit, &ours.times(name), &peer.times(name));
        ratios.extend(row.value);
        rows.push(row);
    }
    if missing.is_empty() && !names.is_empty() {
        let differ = names
            .iter()
            .filter(|&&name| ours.results.get(name) != peer.results.get(name))
            .count();
        let unit = "pieces of work";
        rows.push(Row::exactly(
            "different_results",
            unit,
            0.0,
            differ as f64,
            names.len(),
        ));
    }
    if arguments.only.is_empty() {
        rows.push(mean(&ratios));
    }
    if wanted("smp2") {
        rows.extend(two_over_one(arguments, &binary, &guest)?);
    }
    rows.extend(steady(arguments, &binary, &guest, wanted)?);
    if wanted("lockstep_differences") {
        rows.push(lockstep(&binary, &guest, &names, &ours)?);
    }
    if runs == 0 {
        return print("cpu", &rows, arguments.json);
    }
    for (side, times) in [("dunlin", &ours), ("qemu", &peer)] {
        rows.push(Row::information(&format!("boot_{side}"), "s", &times.boot));
        for name in &names {
            let name_of_row = format!("{name}_{side}");
            rows.push(Row::information(&name_of_row, "s", &times.times(name)));
        }
    }
    print("cpu", &rows, arguments.json)
}

/// What must not hang, drift or be busy.
fn steady(
    arguments: &CpuArguments,
    binary: &Path,
    guest: &Guest,
    wanted: impl Fn(&str) -> bool,
) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    if wanted("idle_pct") {
        rows.extend(steadiness::idle(binary, guest)?);
    }
    if wanted("clock_drift") {
        rows.push(steadiness::clock(binary, guest)?);
    }
    if wanted("hung_boots") {
        rows.push(steadiness::hung_boots(binary, guest, arguments.boots)?);
    }
    if wanted("hung_boots_loaded") {
        rows.push(steadiness::hung_boots_loaded(
            binary,
            guest,
            arguments.boots,
        )?);
    }
    Ok(rows)
}

/// Our times over the median of the peer's.
fn ratio(name: &str, limit: f64, ours: &[f64], peer: &[f64]) -> Row {
    match median(peer) {
        Some(peer) => {
            let ratios: Vec<_> = ours.iter().map(|own| own / peer).collect();
            Row::at_most(name, RATIO, limit, &ratios)
        }
        None => Row::missing(
            name,
            RATIO,
            "qemu-system-x86_64 is not installed".to_owned(),
        ),
    }
}

/// The geometric mean of all work's ratios.
fn mean(ratios: &[f64]) -> Row {
    if ratios.len() < WORK.len() {
        return Row::missing("geomean", RATIO, "not all work was measured".to_owned());
    }
    let logarithms: f64 = ratios.iter().map(|ratio| ratio.ln()).sum();
    let mean = (logarithms / ratios.len() as f64).exp();
    Row::at_most("geomean", RATIO, MEAN, &[mean])
}

/// How much faster two processors do the work of two than one does.
fn two_over_one(
    arguments: &CpuArguments,
    binary: &Path,
    guest: &Guest,
) -> anyhow::Result<Vec<Row>> {
    let cmdline = cmdline(&[PAIR]);
    let (mut one, mut two) = (Side::default(), Side::default());
    for _ in 0..arguments.runs {
        one.run(&mut dunlin(binary, guest, 1, &cmdline), &[PAIR])?;
        two.run(&mut dunlin(binary, guest, 2, &cmdline), &[PAIR])?;
    }
    let (one, two) = (one.times(PAIR), two.times(PAIR));
    let speeds: Vec<_> = one.iter().zip(&two).map(|(one, two)| one / two).collect();
    Ok(vec![
        Row::at_least("smp2", "speed of 2 over 1", TWO_OVER_ONE, &speeds),
        Row::information("pair_dunlin_1", "s", &one),
        Row::information("pair_dunlin_2", "s", &two),
    ])
}

/// A boot and all the work with everything interpreted beside its translation: the first difference
/// would end it. The work is shared by two guests, each on a processor of the host: `LONGEST` takes
/// about as long as all the rest.
fn lockstep(binary: &Path, guest: &Guest, names: &[&str], ours: &Side) -> anyhow::Result<Row> {
    eprintln!("lockstep …");
    let (alone, rest): (Vec<_>, Vec<_>) = names.iter().partition(|&&name| name == LONGEST);
    // Without any work at all, a boot is compared.
    let shares = [Some(rest), (!alone.is_empty()).then_some(alone)];
    let run = |share: &[&str]| {
        let mut command = dunlin(binary, guest, 1, &cmdline(share));
        Session::run(command.arg("--verify"), LOCKSTEP_LIMIT)
    };
    let sessions = std::thread::scope(|scope| {
        let shares = shares.into_iter().flatten();
        let guests: Vec<_> = shares
            .map(|share| {
                let guest = scope.spawn({
                    let share = share.clone();
                    move || run(&share)
                });
                (share, guest)
            })
            .collect();
        let ended = guests.into_iter().map(|(share, guest)| {
            let session = guest.join();
            let session = session.map_err(|_panic| anyhow!("a lockstep run panicked"))??;
            Ok((share, session))
        });
        ended.collect::<anyhow::Result<Vec<_>>>()
    })?;
    let why: Vec<_> = sessions
        .iter()
        .filter_map(|(share, session)| what_differs(share, session, ours))
        .collect();
    let differences = why.len() as f64;
    let mut row = Row::exactly("lockstep_differences", "differences", 0.0, differences, 1);
    row.why = (!why.is_empty()).then(|| why.join("; "));
    Ok(row)
}

/// What ended a verified session otherwise than work usually ends.
fn what_differs(names: &[&str], session: &Session, ours: &Side) -> Option<String> {
    let odd = |name: &&&str| {
        let usual = ours.results.get(**name);
        took(session, name).is_none()
            || usual.is_none_or(|usual| !usual.contains(result(session, name)))
    };
    let last = session.lines.last().map_or("nothing", |line| &line.1);
    match names.iter().find(odd) {
        Some(name) => Some(format!(
            "{name} did not end as usual; the guest said last: {last}"
        )),
        None if session.clean => None,
        None => Some(format!("the guest said last: {last}")),
    }
}
