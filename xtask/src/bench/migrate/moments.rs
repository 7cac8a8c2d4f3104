//! What takes but a moment: handing a guest to another process of the same host, and running a
//! saved one.

use std::time::Duration;

use anyhow::Context;
use dunlin_guest_migbench::Parameters;

use super::Bench;
use crate::bench::Row;
use dunlin_testbed::mover::{CALM, Mover, NAME};
use dunlin_testbed::process::Guard;
use dunlin_testbed::ticks::{Recorder, Ticks};

const MEBIBYTES: u64 = 1024;
/// A guest that has not ticked by then does not run.
const LIMIT: Duration = Duration::from_secs(30);

pub(super) fn handover(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    bench.offers(&[], "handover")?;
    let mut mover = Mover::start(&bench.setup("handover", MEBIBYTES, Parameters::default()))?;
    let (mut pauses, mut controls, mut reported) = (Vec::new(), Vec::new(), Vec::new());
    let ms = |gap: Duration| gap.as_secs_f64() * 1e3;
    for _ in 0..bench.runs(100, 10) {
        mover.listen_for(CALM)?;
        let start = mover.recorder().now();
        let report = mover.host().query(&["handover", NAME])?;
        mover.listen_for(CALM)?;
        let end = mover.recorder().now();
        let ticks = Ticks::of(mover.recorder().heard()?);
        // The new process has the old one's port, so nothing tells which of them said a byte: the
        // longest silence from the command on is the pause, or longer than that.
        let pause = ticks.worst_gap(start, end).context("the guest ticks")?;
        pauses.push(ms(pause));
        let calm = start.saturating_sub(CALM);
        controls.extend(ticks.worst_gap(calm, start).map(ms));
        reported.extend(report["blackout_ms"].as_f64());
    }
    Ok(vec![
        Row::percentile_at_most("handover_p99_ms", "ms", (0.99, 5.0), &pauses),
        Row::information("handover_pause_ms", "ms", &pauses),
        Row::information("handover_control_ms", "ms", &controls),
        Row::information("handover_reported_ms", "ms", &reported),
    ])
}

pub(super) fn restore(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let mut mover = Mover::start(&bench.setup("restore", MEBIBYTES, Parameters::default()))?;
    mover.listen_for(CALM)?;
    let file = bench.folder.join("restore/saved");
    let path = file.to_str().context("the build folder has a plain name")?;
    mover
        .host()
        .query(&["save", NAME, "--to", path, "--stop"])?;
    let mut times = Vec::new();
    for run in 0..bench.runs(30, 5) {
        let mut recorder = Recorder::new(&bench.folder.join(format!("restore/port{run}")))?;
        let port = format!("unix:{}", recorder.path().display());
        let mut command =
            mover
                .host()
                .command(&["restore", "--name", NAME, path, "--debugcon", &port]);
        command
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let start = recorder.now();
        let mut guard = Guard::spawn(&mut command)?;
        recorder.wait("a tick of the restored guest", LIMIT, |heard| {
            !heard.is_empty()
        })?;
        let first = recorder.heard()?.first().context("the guest has ticked")?;
        times.push((first.at - start).as_secs_f64() * 1e3);
        mover.host().query(&["stop", NAME, "--kill"])?;
        guard.wait(LIMIT);
    }
    Ok(vec![Row::at_most("restore_ms", "ms", 20.0, &times)])
}
