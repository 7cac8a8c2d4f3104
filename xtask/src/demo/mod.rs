//! The main job, end to end: a stock guest boots, talks, and moves live between two hosts while a
//! TCP connection to it stays up.

mod report;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use dunlin_testbed::client::{Client, Connection};
use dunlin_testbed::hosts::{self, Forward, Host, Testbed, VmSpec};
use dunlin_testbed::process;
use indicatif::{ProgressBar, ProgressStyle};

use crate::guest;
use crate::packages::Series;
use report::{Move, Report};

const VM: &str = "web1";
const AGENT_PORT: u16 = 7;
/// How long a boot to a serving agent may take.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// Time in which the client and the guest are watched without a move, as the control.
const CONTROL: Duration = Duration::from_secs(2);

/// Arguments of `cargo xtask demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArguments {
    /// Print only the report, as one JSON object
    #[arg(long)]
    json: bool,
    /// How many times the VM moves
    #[arg(long, default_value_t = 2)]
    moves: usize,
    /// MiB of memory that the guest keeps writing
    #[arg(long, default_value_t = 32)]
    working_set: u64,
    /// MiB that the guest writes each second
    #[arg(long, default_value_t = 50)]
    rate: u64,
    /// Downtime limit
    #[arg(long, default_value = "50ms")]
    downtime: String,
    /// Which stock kernel
    #[arg(long, value_enum, default_value = "6.1")]
    kernel: Series,
}

pub(crate) fn run(arguments: &DemoArguments) -> anyhow::Result<()> {
    process::catch_interrupts();
    let progress = Progress::new();
    progress.say("building dunlin");
    process::run(
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--release", "--package", "dunlin"])
            .current_dir(process::root()),
    )?;
    progress.say("making the guest");
    let guest = guest::build(arguments.kernel)?;
    process::check_interrupt()?;

    let folder = process::target().join("demo");
    let testbed = Testbed::new(&process::target().join("release/dunlin"), &folder)?;
    let forward = Forward::to_guest(AGENT_PORT)?;
    progress.say("starting two hosts");
    let (mut first, mut second) = testbed.two_hosts(&[forward], Vec::new())?;
    let address = hosts::outside(&first, forward.outside);

    progress.say("booting the guest on host a");
    let start = Instant::now();
    first.run(&VmSpec {
        name: VM.to_owned(),
        kernel: guest.kernel,
        initramfs: Some(guest.initramfs),
        cmdline: format!(
            "console=ttyS0 quiet dunlin.init=agent dunlin.port={AGENT_PORT} dunlin.load={},{}",
            arguments.working_set, arguments.rate
        ),
        memory: "512M".to_owned(),
        cpus: 1,
        engine: "soft".to_owned(),
        disks: Vec::new(),
    })?;
    let mut control = None;
    let log = first.log(VM);
    process::wait_until("an answer of the guest", BOOT_LIMIT, || {
        if first.commands().iter_mut().all(|command| command.exited()) {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            bail!("the VM ended before it answered:\n{text}");
        }
        control = Connection::probe(address).ok();
        Ok(control.is_some())
    })?;
    let mut control = control.context("the guest answered")?;
    let boot = start.elapsed();

    let client = Client::start(Connection::open(address)?);
    progress.say("watching the guest without a move");
    let mut report = Report::new(boot, 512 << 20);
    let watched = watch(&mut control, &client, |_| {
        std::thread::sleep(CONTROL);
        Ok(())
    })?;
    report.control_client_ms = watched.client_ms;
    report.control_guest_ms = watched.guest_ms;

    let (mut source, mut destination) = (&mut first, &mut second);
    for number in 1..=arguments.moves {
        process::check_interrupt()?;
        progress.say(&format!("move {number} of {}", arguments.moves));
        let svg = folder.join(format!("rounds-{number}.svg"));
        let mut outcome = None;
        let watched = watch(&mut control, &client, |_| {
            outcome = Some(migrate(source, destination, &arguments.downtime, &svg)?);
            Ok(())
        })?;
        let outcome = outcome.context("a move that did not fail has an outcome")?;
        report.moves.push(Move::new(&outcome, &watched, svg)?);
        std::mem::swap(&mut source, &mut destination);
    }

    let stats = control.stats()?;
    report.finish(&client, &stats);
    drop(client);
    // The guest's own end: it powers off, and every process goes.
    source.query(&["stop", VM, "--kill"])?;
    progress.finish();
    report.write(&folder.join("report.json"))?;
    if arguments.json {
        println!("{}", report.json()?);
    } else {
        report.print();
    }
    report.verdict()
}

/// What both ends saw during a span of time.
#[derive(Debug)]
struct Watched {
    client_ms: f64,
    guest_ms: f64,
}

fn watch(
    control: &mut Connection,
    client: &Client,
    work: impl FnOnce(&Client) -> anyhow::Result<()>,
) -> anyhow::Result<Watched> {
    control.ask("reset")?;
    client.reset();
    work(client)?;
    // Answers that were on their way belong to this span.
    let before = client.answers();
    process::wait_until("an answer to the client", Duration::from_secs(20), || {
        Ok(client.answers() > before + 2 || client.error().is_some())
    })?;
    if let Some(error) = client.error() {
        bail!("the client's connection broke: {error}");
    }
    let stats = control.stats()?;
    Ok(Watched {
        client_ms: client.longest_pause().as_secs_f64() * 1e3,
        guest_ms: stats.gap_max_us.saturating_sub(stats.gap_median_us) as f64 / 1e3,
    })
}

fn migrate(
    source: &mut Host,
    destination: &mut Host,
    downtime: &str,
    svg: &Path,
) -> anyhow::Result<serde_json::Value> {
    let target = destination.receive(VM)?;
    let svg = svg.to_string_lossy();
    source.query(&[
        "migrate",
        VM,
        "--to",
        &target,
        "--downtime",
        downtime,
        "--svg",
        &svg,
    ])
}

/// A spinner on a terminal, nothing in a pipe.
struct Progress(ProgressBar);

impl Progress {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self(bar)
    }

    fn say(&self, message: &str) {
        self.0.set_message(message.to_owned());
    }

    fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// A path below the checkout, as a person would type it.
fn shown(path: &Path) -> PathBuf {
    path.strip_prefix(process::root())
        .unwrap_or(path)
        .to_owned()
}
