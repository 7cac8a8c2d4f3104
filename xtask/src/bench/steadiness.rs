//! What has nothing to do with speed: boots that hang, clocks that drift, guests that do nothing and
//! still use the processor. Some of it with all of the host's processors busy.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::Row;
use super::boot::{CMDLINE, MARKER};
use super::session::{Session, dunlin};
use crate::guest::Guest;
use dunlin_testbed::process::{self, Guard};

/// A boot that takes longer hangs.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// The same with busy processors.
const LOADED_BOOT_LIMIT: Duration = Duration::from_secs(240);
/// What a guest may still do once it has booted.
const SETTLE: Duration = Duration::from_secs(5);
const IDLE_LOOK: Duration = Duration::from_secs(60);
/// Percent of a processor that an idle guest may use.
const IDLE: f64 = 1.0;
/// How far the guest's clock and the host's may be apart after a minute, in milliseconds. The guest
/// tells hundredths of a second, and is heard late on a busy host.
const DRIFT: f64 = 50.0;
/// A minute of sleep and the boot before it.
const CLOCK_LIMIT: Duration = Duration::from_secs(400);

/// Threads that keep every processor of the host busy until they are dropped.
struct Load {
    ended: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start() -> anyhow::Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        let burn = |ended: Arc<AtomicBool>| {
            move || {
                while !ended.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            }
        };
        let threads = (0..std::thread::available_parallelism()?.get())
            .map(|_| std::thread::spawn(burn(Arc::clone(&ended))))
            .collect();
        Ok(Self { ended, threads })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It cannot panic.
            let _ = thread.join();
        }
    }
}

/// Boots that did not reach init and power off, of `boots`.
pub(super) fn hung_boots(binary: &Path, guest: &Guest, boots: u64) -> anyhow::Result<Row> {
    count_hung("hung_boots", (binary, guest), boots, BOOT_LIMIT)
}

/// The same with all processors of the host busy.
pub(super) fn hung_boots_loaded(binary: &Path, guest: &Guest, boots: u64) -> anyhow::Result<Row> {
    let _load = Load::start()?;
    let of = (binary, guest);
    count_hung("hung_boots_loaded", of, boots, LOADED_BOOT_LIMIT)
}

fn count_hung(
    name: &str,
    (binary, guest): (&Path, &Guest),
    boots: u64,
    limit: Duration,
) -> anyhow::Result<Row> {
    eprintln!("{name} …");
    let mut hung = 0;
    let mut last = None;
    for _ in 0..boots {
        let session = Session::run(&mut dunlin(binary, guest, 1, CMDLINE), limit)?;
        if session.said(MARKER).is_none() || !session.clean {
            hung += 1;
            last = session.lines.last().map(|line| line.1.clone());
        }
    }
    let mut row = Row::exactly(name, "boots", 0.0, f64::from(hung), boots as usize);
    row.why = last.map(|line| format!("one that hung said last: {line}"));
    Ok(row)
}

/// What an idle guest uses of a processor, with 1, 2 and 4 of its own.
pub(super) fn idle(binary: &Path, guest: &Guest) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, cpus) in [("idle_pct", 1), ("idle_pct_2", 2), ("idle_pct_4", 4)] {
        eprintln!("{name} …");
        let percent = idle_percent(binary, guest, cpus)?;
        rows.push(Row::at_most(name, "% of a processor", IDLE, &[percent]));
    }
    Ok(rows)
}

fn idle_percent(binary: &Path, guest: &Guest, cpus: u32) -> anyhow::Result<f64> {
    let mut command = dunlin(binary, guest, cpus, "console=ttyS0 quiet dunlin.init=shell");
    let mut guard = Guard::spawn(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null()),
    )?;
    let output = guard.child().stdout.take();
    let mut output = BufReader::new(output.context("standard output is piped")?);
    let mut line = String::new();
    while !line.contains("dunlin-init: ready") {
        line.clear();
        if output.read_line(&mut line)? == 0 {
            bail!("the guest that was to be idle ended before it was ready");
        }
    }
    std::thread::sleep(SETTLE);
    let (before, begun) = (processor_time(guard.id())?, Instant::now());
    std::thread::sleep(IDLE_LOOK);
    process::check_interrupt()?;
    let used = processor_time(guard.id())?.saturating_sub(before);
    Ok(used.as_secs_f64() / begun.elapsed().as_secs_f64() * 100.0)
}

/// What process `pid` and its children have used of processors.
fn processor_time(pid: u32) -> anyhow::Result<Duration> {
    // SAFETY: sysconf reads no memory of ours.
    #[expect(unsafe_code, reason = "std does not tell the unit of /proc/PID/stat")]
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    let mut ticks = 0;
    let mut found = false;
    for entry in fs::read_dir("/proc")? {
        let Ok(text) = fs::read_to_string(entry?.path().join("stat")) else {
            continue;
        };
        // proc(5): after the name in parentheses, the state is field 3, the parent 4, the times 14, 15.
        let Some((own, rest)) = text.rsplit_once(") ") else {
            continue;
        };
        let own = own.split(' ').next().and_then(|pid| pid.parse().ok());
        let fields: Vec<u64> = rest
            .split(' ')
            .map(|field| field.parse().unwrap_or(0))
            .collect();
        let parent = fields.get(1).copied();
        if own == Some(pid) || parent == Some(u64::from(pid)) {
            ticks += fields.get(11).unwrap_or(&0) + fields.get(12).unwrap_or(&0);
            found |= own != Some(pid);
        }
    }
    if !found {
        bail!("the VM's process has ended");
    }
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// How far the guest's clock is off after a minute of sleep, with all processors of the host busy.
pub(super) fn clock(binary: &Path, guest: &Guest) -> anyhow::Result<Row> {
    eprintln!("clock_drift …");
    let _load = Load::start()?;
    let cmdline = "console=ttyS0 quiet dunlin.init=work dunlin.work=clock";
    let session = Session::run(&mut dunlin(binary, guest, 2, cmdline), CLOCK_LIMIT)?;
    let behind = |half: &str| {
        least_behind(&session, half).with_context(|| format!("no clock of the {half} half"))
    };
    let drift = (behind("second")? - behind("first")?).abs() * 1e3;
    Ok(Row::at_most(
        "clock_drift",
        "ms in a minute",
        DRIFT,
        &[drift],
    ))
}

/// By how much the guest's clock was behind the host's, as told before or after the sleep, in
/// seconds. The least is what was heard soonest.
fn least_behind(session: &Session, half: &str) -> Option<f64> {
    let mark = format!("dunlin-clock: {half} ");
    let told = session.lines.iter().filter_map(|(outside, line)| {
        let inside: f64 = line.split_once(&mark)?.1.trim().parse().ok()?;
        Some(outside.as_secs_f64() - inside)
    });
    told.reduce(f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_processor_time_is_counted() {
        let me = std::process::id();
        assert!(processor_time(me).is_err(), "there is no child yet");
        let mut child = std::process::Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        let before = processor_time(me).unwrap();
        while processor_time(me).unwrap() < before + Duration::from_millis(50) {
            assert!(Instant::now() < end, "a busy child used nothing");
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
