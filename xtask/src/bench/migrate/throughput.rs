//! How fast an idle guest moves: beside a raw copy, beside QEMU, with TLS beside without.

use anyhow::Context;
use dunlin_guest_migbench::{Fill, Parameters};

use super::{Bench, qemu, raw};
use crate::bench::{Row, median};
use dunlin_testbed::mover::{Hop, Mover};

const MEBIBYTES_FULL: u64 = 2048;
const MEBIBYTES_QUICK: u64 = 512;
/// Moves of QEMU by which its best setting is found, for each.
const TRIES: usize = 3;

/// Full of random numbers, and asleep.
fn parameters() -> Parameters {
    Parameters {
        fill: Fill::Random,
        interval_microseconds: 0,
        ..Parameters::default()
    }
}

fn mebibytes(bench: &Bench) -> u64 {
    if bench.quick {
        MEBIBYTES_QUICK
    } else {
        MEBIBYTES_FULL
    }
}

/// MiB a second.
fn rate(mebibytes: u64, ms: f64) -> f64 {
    mebibytes as f64 / (ms / 1e3)
}

pub(super) fn total_ms(hop: &Hop) -> anyhow::Result<f64> {
    hop.report["total_ms"]
        .as_f64()
        .context("the report of a move tells its time")
}

#[derive(Default)]
struct Samples {
    raw_rate: Vec<f64>,
    bare_rate: Vec<f64>,
    ahead_rate: Vec<f64>,
    rate: Vec<f64>,
    to_raw: Vec<f64>,
    auto_ms: Vec<f64>,
    cpu: Vec<f64>,
    qemu_ms: Vec<f64>,
    qemu_cpu: Vec<f64>,
    qemu_downtime: Vec<f64>,
    to_qemu: Vec<f64>,
    cpu_to_qemu: Vec<f64>,
}

pub(super) fn plain(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let size = mebibytes(bench);
    let mut source = raw::SharedMemory::random((size as usize) << 20)?;
    let mut mover = Mover::start(&bench.setup("plain", size, parameters()))?;
    let mut peer = match bench.peer() {
        Ok(accelerator) => {
            let setup = bench.setup("qemu", size, parameters());
            let mut peer = qemu::Peer::start(&setup, accelerator)?;
            let settings = best_settings(&mut peer)?;
            Some((peer, settings))
        }
        Err(_) => None,
    };
    let mut samples = Samples::default();
    for _ in 0..bench.runs(30, 3) {
        let bare_ms = raw::copy(&mut source, raw::Pages::ByTouch)?.as_secs_f64() * 1e3;
        let ahead_ms = raw::copy(&mut source, raw::Pages::Ahead)?.as_secs_f64() * 1e3;
        samples.bare_rate.push(rate(size, bare_ms));
        samples.ahead_rate.push(rate(size, ahead_ms));
        // The faster of the two: its memory is prepared as a move's is, or the machine does better
        // without.
        let raw_ms = bare_ms.min(ahead_ms);
        let one = mover.hop(&["--streams", "1"], &[])?;
        let one_ms = total_ms(&one)?;
        samples.raw_rate.push(rate(size, raw_ms));
        samples.rate.push(rate(size, one_ms));
        samples.to_raw.push(raw_ms / one_ms);
        let auto = mover.hop(&[], &[])?;
        let auto_ms = total_ms(&auto)?;
        let gibibytes = size as f64 / 1024.0;
        samples.auto_ms.push(auto_ms);
        samples.cpu.push(auto.cpu_seconds / gibibytes);
        if let Some((peer, settings)) = &mut peer {
            let theirs = peer.hop(*settings)?;
            samples.qemu_ms.push(theirs.total_ms);
            samples.qemu_cpu.push(theirs.cpu_seconds / gibibytes);
            samples.qemu_downtime.push(theirs.downtime_ms);
            samples.to_qemu.push(auto_ms / theirs.total_ms);
            let ratio = auto.cpu_seconds / theirs.cpu_seconds.max(1e-3);
            samples.cpu_to_qemu.push(ratio);
        }
    }
    let channels = peer.map(|(_, settings)| settings.channels);
    Ok(samples.rows(bench, channels))
}

impl Samples {
    fn rows(&self, bench: &Bench, channels: Option<Option<u8>>) -> Vec<Row> {
        let raw = "rate ratio to a raw copy";
        let mut rows = vec![Row::at_least("throughput_plain", raw, 0.85, &self.to_raw)];
        let compared = [
            ("qemu_total", "time ratio to QEMU", 0.6, &self.to_qemu),
            (
                "qemu_cpu",
                "ratio of CPU seconds a GiB to QEMU",
                1.0,
                &self.cpu_to_qemu,
            ),
        ];
        for (name, unit, limit, values) in compared {
            rows.push(match bench.peer() {
                Ok(_) => Row::at_most(name, unit, limit, values),
                Err(error) => Row::missing(name, unit, error.to_string()),
            });
        }
        for (name, unit, values) in [
            ("raw_copy_rate", "MiB/s", &self.raw_rate),
            ("raw_copy_rate_by_touch", "MiB/s", &self.bare_rate),
            ("raw_copy_rate_ahead", "MiB/s", &self.ahead_rate),
            ("move_rate_one_stream", "MiB/s", &self.rate),
            ("move_total_ms", "ms", &self.auto_ms),
            ("move_cpu_per_gib", "s", &self.cpu),
            ("qemu_total_ms", "ms", &self.qemu_ms),
            ("qemu_cpu_per_gib", "s", &self.qemu_cpu),
            ("qemu_downtime_reported_ms", "ms", &self.qemu_downtime),
        ] {
            rows.push(Row::information(name, unit, values));
        }
        if let (Some(channels), Some(row)) = (channels, rows.get_mut(1)) {
            row.why = Some(match channels {
                Some(channels) => format!("QEMU with multifd over {channels} channels"),
                None => "QEMU without multifd".to_owned(),
            });
        }
        rows
    }
}

/// The setting of QEMU under which it is fastest: by the median of moves that take turns.
fn best_settings(peer: &mut qemu::Peer) -> anyhow::Result<qemu::Settings> {
    let all = [None, Some(1), Some(2), Some(4)].map(|channels| qemu::Settings {
        channels,
        downtime_ms: 300,
    });
    // The first move of a process is not like the others.
    peer.hop(all[0])?;
    let mut times = all.map(|_| Vec::new());
    for _ in 0..TRIES {
        for (settings, times) in all.iter().zip(&mut times) {
            times.push(peer.hop(*settings)?.total_ms);
        }
    }
    let medians = times.iter().map(|times| median(times).unwrap_or(f64::MAX));
    let best = all
        .into_iter()
        .zip(medians)
        .min_by(|a, b| a.1.total_cmp(&b.1));
    Ok(best.context("there is a setting")?.0)
}

pub(super) fn tls(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    bench.offers(&["migrate"], "--tls")?;
    let size = mebibytes(bench);
    let mut mover = Mover::start(&bench.setup("tls", size, parameters()))?;
    let credentials = super::certificates(bench)?;
    let credentials = ["--tls", credentials.as_str()];
    let (mut plain, mut encrypted, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.runs(30, 3) {
        let open = total_ms(&mover.hop(&["--streams", "1"], &[])?)?;
        let arguments = ["--streams", "1", credentials[0], credentials[1]];
        let closed = total_ms(&mover.hop(&arguments, &credentials)?)?;
        plain.push(rate(size, open));
        encrypted.push(rate(size, closed));
        ratios.push(open / closed);
    }
    Ok(vec![
        Row::at_least("throughput_tls", "rate ratio to plain", 0.8, &ratios),
        Row::information("move_rate_plain_beside_tls", "MiB/s", &plain),
        Row::information("move_rate_tls", "MiB/s", &encrypted),
    ])
}
