//! Moves that go wrong: at a random place of the conversation of source and destination something
//! breaks, and
//! afterwards exactly one whole guest must live, or its loss must have been said.
//!
//! A run is a fresh guest, a fresh pair of hosts and one fault, all of it drawn from the run's
//! number and the seed;
//! the same numbers draw the same fault again, though the guest writes as it pleases. First one
//! move of each mode without a fault shows which frames there are, and how many; a fault picks one
//! of their
//! kinds, and then one of that kind, so that the few frames that decide are struck as often as the
//! many that carry pages.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use dunlin_guest_migbench::Parameters;
use serde::Serialize;

use crate::hosts::Host;
use crate::mover::{Engine, Mover, NAME, Setup};
use crate::process::{self, Guard};
use crate::proxy::{Fault, Harm, Point, Proxy, Trace, Way};

/// Silence after which a side counts as lost, for `--peer-timeout`.
const PEER_TIMEOUT: &str = "1s";
/// The command that moves must have ended by then.
const MOVE_LIMIT: Duration = Duration::from_secs(60);
/// It must be plain by then where the guest is.
const SETTLED: Duration = Duration::from_secs(20);
/// A guest that has ticked no longer ago than this lives.
const ALIVE: Duration = Duration::from_millis(250);
/// Time for a guest to check all of its memory.
const SCRUBBED: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The `dunlin` to use.
    pub binary: PathBuf,
    /// Home of sockets and logs.
    pub folder: PathBuf,
    /// Engine on both hosts.
    pub engine: Engine,
    /// Values for `--mode`.
    pub modes: Vec<&'static str>,
    /// Where the drawing begins.
    pub seed: u64,
    /// Numbers of the runs.
    pub runs: std::ops::Range<u64>,
}

/// How a run ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The guest lives at the destination, whole.
    Moved,
    /// The guest lives at the source, whole.
    Stayed,
    /// The source did not know, and said so; the destination was dead for certain, and the guest
    /// went on at the
    /// source when asked to.
    ResumedAfterDoubt,
    /// The guest's host was killed, and it was said that the guest is lost.
    LostWithHost,
    /// The source was killed when parts of the guest's memory were still there; the destination
    /// says that it waits for them.
    LacksMemory,
}

/// What came of all runs.
#[derive(Debug, Default, Serialize)]
pub struct Summary {
    /// Runs.
    pub runs: u64,
    /// Runs that ended well.
    pub ok: u64,
    /// Moves that ended before their fault, and were drawn anew.
    pub missed: u64,
    /// How often each good end was.
    pub verdicts: BTreeMap<Verdict, u64>,
    /// Runs that did not end well: which, the fault, and what was wrong.
    pub failures: Vec<String>,
}

/// Runs the plan; `progress` hears of each run.
///
/// # Errors
/// When a move without a fault fails, or the user wants to stop. A run that ends badly is no error
/// but a failure in
/// the summary.
pub fn run(plan: &Plan, mut progress: impl FnMut(u64, &str)) -> anyhow::Result<Summary> {
    let mut traces = Vec::new();
    for mode in &plan.modes {
        let Attempt { ended, trace, .. } = attempt(plan, mode, None)?;
        let verdict = ended.with_context(|| format!("a {mode} move without a fault failed"))?;
        if verdict != Verdict::Moved {
            bail!("a {mode} move without a fault ended as {verdict:?}");
        }
        traces.push(trace);
    }
    let mut summary = Summary::default();
    for number in plan.runs.clone() {
        process::check_interrupt()?;
        let mut random = Random::new(plan.seed, number);
        // A move that ends well before its fault says nothing: another is drawn.
        let (mode, fault, ended, hit) = loop {
            let which = random.below(plan.modes.len() as u64) as usize;
            let (mode, fault) = (plan.modes[which], draw(&mut random, &traces[which])?);
            let Attempt { ended, hit, .. } = attempt(plan, mode, Some(fault))?;
            if hit || ended.is_err() {
                break (mode, fault, ended, hit);
            }
            summary.missed += 1;
            if summary.missed > 2 * plan.runs.end {
                bail!("most faults are never reached");
            }
        };
        summary.runs += 1;
        let ended = ended.and_then(|verdict| {
            if hit {
                Ok(verdict)
            } else {
                bail!("it failed before its fault")
            }
        });
        let text = match ended {
            Ok(verdict) => {
                summary.ok += 1;
                *summary.verdicts.entry(verdict).or_default() += 1;
                format!("{mode}, {fault:?}: {verdict:?}")
            }
            Err(error) => {
                let text = format!("{mode}, {fault:?}: {error:#}");
                summary.failures.push(format!("run {number}: {text}"));
                text
            }
        };
        progress(number, &text);
    }
    Ok(summary)
}

/// One move that meets this fault.
///
/// # Errors
/// When it does not end well, or never comes as far as the fault.
pub fn strike(plan: &Plan, mode: &'static str, fault: Fault) -> anyhow::Result<Verdict> {
    let Attempt { ended, hit, .. } = attempt(plan, mode, Some(fault))?;
    let verdict = ended?;
    if !hit {
        bail!("the move ended as {verdict:?} before the fault");
    }
    Ok(verdict)
}

/// Numbers drawn from a seed (splitmix64).
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64, number: u64) -> Self {
        let mut random = Self(seed ^ number.wrapping_mul(0xd134_2543_de82_ef95));
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `bound`, which is not 0.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

fn draw(random: &mut Random, trace: &Trace) -> anyhow::Result<Fault> {
    let harm = Harm::ALL[random.below(Harm::ALL.len() as u64) as usize];
    let lanes: Vec<_> = trace
        .others
        .iter()
        .enumerate()
        .flat_map(|(skip, bytes)| {
            let ways = [Way::ToDestination, Way::ToSource];
            ways.map(|way| (skip, way, bytes[way as usize]))
        })
        .filter(|lane| lane.2 > 0)
        .collect();
    let frames: Vec<_> = trace.frames.iter().collect();
    let point = if !lanes.is_empty() && random.below(4) == 0 {
        let (skip, way, bytes) = lanes[random.below(lanes.len() as u64) as usize];
        let offset = random.below(bytes);
        Point::Byte { skip, way, offset }
    } else {
        if frames.is_empty() {
            bail!("the move without a fault showed no frames");
        }
        let (&(way, kind), &count) = frames[random.below(frames.len() as u64) as usize];
        let skip = random.below(count);
        Point::Frame { way, kind, skip }
    };
    Ok(Fault { point, harm })
}

/// What a run is about.
struct Scene {
    mover: Mover,
    mode: &'static str,
    fault: Option<Fault>,
    /// Was the fault reached?
    struck: bool,
}

/// What the command that moves said, and whether it reported success.
struct Said {
    text: String,
    success: bool,
}

/// What came of a run.
struct Attempt {
    ended: anyhow::Result<Verdict>,
    trace: Trace,
    /// Was the fault reached?
    hit: bool,
}

/// One guest, one move, perhaps one fault.
fn attempt(plan: &Plan, mode: &'static str, fault: Option<Fault>) -> anyhow::Result<Attempt> {
    let scrub_pages = if plan.engine == Engine::SOFT { 4 } else { 64 };
    let setup = Setup {
        binary: plan.binary.clone(),
        folder: plan.folder.clone(),
        engine: plan.engine,
        memory_mebibytes: 64,
        parameters: Parameters {
            fill_mebibytes: Some(16),
            working_set_mebibytes: 4,
            rate_mebibytes: 20,
            scrub_pages,
            ..Parameters::default()
        },
    };
    let mut mover = Mover::start(&setup)?;
    let target = mover.await_guest(&["--peer-timeout", PEER_TIMEOUT])?;
    let target: SocketAddrV4 = target
        .strip_prefix("tcp://")
        .context("the place is at a TCP address")?
        .parse()?;
    let victims = [vm_process(mover.host())?, vm_process(mover.other())?];
    let kill = Box::new(move |harm| match harm {
        Harm::KillSource => end_process(victims[0]),
        _ => end_process(victims[1]),
    });
    let proxy = Proxy::new(target, fault, kill)?;
    let mut scene = Scene {
        mover,
        mode,
        fault,
        struck: false,
    };
    let ended = scene.play(&proxy);
    Ok(Attempt {
        ended,
        trace: proxy.trace(),
        hit: proxy.hit(),
    })
}

fn vm_process(host: &Host) -> anyhow::Result<libc::pid_t> {
    let is_machine = |pid: &libc::pid_t| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
            line.split(|&byte| byte == 0)
                .any(|word| word == b"vm-process")
        })
    };
    let pids = host.machine_pids();
    let machine = pids.into_iter().find(is_machine);
    machine.context("a host has a VM's process")
}

fn end_process(pid: libc::pid_t) {
    // SAFETY: sending a signal touches no memory; the process is one of this run's own hosts, and
    // its parent has not reaped it while the run goes on.
    #[expect(unsafe_code, reason = "std cannot signal a process that is no child")]
    unsafe {
        libc::kill(pid, libc::SIGKILL);
    }
}

/// Where the guest ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Life {
    source: bool,
    destination: bool,
}

/// The frame that decides: the source gives the guest away.
const COMMIT: (Way, u16) = (Way::ToDestination, 12);
/// The destination runs the guest.
pub const RUNNING: (Way, u16) = (Way::ToSource, 13);

/// All of the memory of a guest that went before it is there.
const COMPLETE: (Way, u16) = (Way::ToSource, 34);
/// Kinds of frames by which it is decided who runs the guest: from `Prepared` to `Settled`, and
/// question and answer about it.
const DECISIVE: [u16; 7] = [10, 11, 12, 13, 14, 17, 18];
/// All time-outs of a move have struck so long after its command ended.
const LATEST: Duration = Duration::from_millis(2500);

const SOURCE: usize = 0;
const DESTINATION: usize = 1;

impl Scene {
    fn play(&mut self, proxy: &Proxy) -> anyhow::Result<Verdict> {
        let said = self.migrate(proxy.address())?;
        let told = Instant::now();
        self.struck = proxy.hit();
        let life = self.settle()?;
        let trace = proxy.trace();
        let text = &said.text;
        let verdict = match life {
            Life {
                source: true,
                destination: true,
            } => bail!("the guest lives on both hosts; the move said: {text}"),
            Life {
                destination: true, ..
            } => {
                let killed = self.harm() == Some(Harm::KillSource);
                if killed && self.lacks_memory() {
                    return self.give_up();
                }
                if !killed && !said.success {
                    bail!("the guest moved, yet the move said: {text}");
                }
                self.whole(&[SOURCE, DESTINATION])?;
                Verdict::Moved
            }
            Life { source: true, .. } => {
                if said.success {
                    bail!("the guest stayed, yet the move said: {text}");
                }
                self.nobody_else_ran(&trace)?;
                self.whole(&[SOURCE])?;
                Verdict::Stayed
            }
            _ => return self.nobody_lives(&said, &trace),
        };
        self.stays_so(life, told)?;
        Ok(verdict)
    }

    /// Where something decisive was late or lost, another guest might begin to run by a timer of its
    /// own: looks again when all of those have struck.
    fn stays_so(&mut self, life: Life, told: Instant) -> anyhow::Result<()> {
        let decisive = match self.fault.map(|fault| fault.point) {
            Some(Point::Frame { kind, .. }) => DECISIVE.contains(&kind),
            Some(Point::Byte { .. }) | None => false,
        };
        if !self.struck || !decisive {
            return Ok(());
        }
        std::thread::sleep(LATEST.saturating_sub(told.elapsed()));
        let now = self.life();
        if now != life {
            bail!("the guest lived as {life:?}, and {LATEST:?} later as {now:?}");
        }
        Ok(())
    }

    /// Asks for the move; returns what the command said.
    fn migrate(&mut self, proxy: SocketAddrV4) -> anyhow::Result<Said> {
        let log = self.mover.host().log("migrate");
        let file = std::fs::File::create(&log)?;
        let target = format!("tcp://{proxy}");
        let mut command = self.mover.host().command(&["migrate", NAME]);
        command
            .args(["--to", &target, "--mode", self.mode])
            .args(["--peer-timeout", PEER_TIMEOUT, "--json"])
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let mut guard = Guard::spawn(&mut command)?;
        let ended = guard.wait(MOVE_LIMIT);
        let said = std::fs::read_to_string(log)?;
        if !ended {
            bail!("the move does not end; it said: {said}");
        }
        let success = guard.child().wait()?.success();
        Ok(Said {
            text: said,
            success,
        })
    }

    fn life(&mut self) -> Life {
        let recorder = self.mover.recorder();
        let now = recorder.now();
        let alive = |stream| {
            let last = recorder.last_word(stream);
            last.is_some_and(|last| last + ALIVE > now)
        };
        Life {
            source: alive(SOURCE),
            destination: alive(DESTINATION),
        }
    }

    /// Waits until one guest lives and has for a while, or the time is over.
    fn settle(&mut self) -> anyhow::Result<Life> {
        let end = Instant::now() + SETTLED;
        let mut since: Option<(Life, Instant)> = None;
        loop {
            process::check_interrupt()?;
            let life = self.life();
            let start = match since {
                Some((known, start)) if known == life => start,
                _ => {
                    since = Some((life, Instant::now()));
                    Instant::now()
                }
            };
            let steady = start.elapsed() > 2 * ALIVE;
            let one = life.source != life.destination;
            if steady && (one || self.lost_for_certain()) || Instant::now() > end {
                return Ok(life);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Was the host of the guest killed, and is nothing left to wait for?
    fn lost_for_certain(&self) -> bool {
        matches!(self.harm(), Some(Harm::KillSource | Harm::KillDestination))
            && self.mover.pid().is_err()
    }

    fn harm(&self) -> Option<Harm> {
        let fault = self.fault.filter(|_| self.struck);
        fault.map(|fault| fault.harm)
    }

    /// Does the destination say that it waits for pages of a host that it cannot reach?
    fn lacks_memory(&mut self) -> bool {
        let status = self.mover.other().query(&["inspect", NAME]);
        status.is_ok_and(|status| {
            let status = &status["status"];
            status["missing_pages"].as_u64() > Some(0) && status["waits_for_source"] == true
        })
    }

    /// The guest waits for memory that is lost: it can be stopped all the same.
    fn give_up(&mut self) -> anyhow::Result<Verdict> {
        self.mover.other().query(&["stop", NAME])?;
        Ok(Verdict::LacksMemory)
    }

    fn nobody_else_ran(&mut self, trace: &Trace) -> anyhow::Result<()> {
        // A source that has heard so may not go back to what the guest was before.
        if trace.passed.contains_key(&RUNNING) {
            bail!("the source was told that the guest runs elsewhere, and went on with it");
        }
        let killed = self.harm() == Some(Harm::KillDestination);
        let ran = self.mover.recorder().last_word(DESTINATION).is_some();
        if ran && !killed {
            bail!("the guest lives at the source, yet ran at the destination");
        }
        Ok(())
    }

    fn whole(&mut self, streams: &[usize]) -> anyhow::Result<()> {
        self.mover.recorder().whole(streams, SCRUBBED)
    }

    /// No guest ticks: it must be in doubt, or its host was killed and that was said.
    fn nobody_lives(&mut self, said: &Said, trace: &Trace) -> anyhow::Result<Verdict> {
        let harm = self.harm();
        if harm == Some(Harm::KillSource) && self.lacks_memory() {
            return self.give_up();
        }
        let at_source = self.mover.host().query(&["inspect", NAME]);
        if let Ok(status) = &at_source
            && status["migration"]["phase"] == "in-doubt"
        {
            if harm != Some(Harm::KillDestination) {
                bail!(
                    "the source is in doubt though the destination is alive; the move said: {}",
                    said.text
                );
            }
            if trace.passed.contains_key(&RUNNING) {
                bail!("the source was told that the guest runs elsewhere, and doubts it");
            }
            self.mover.host().query(&["resume", NAME])?;
            let end = Instant::now() + SETTLED;
            while !self.life().source {
                if Instant::now() > end {
                    bail!("the guest was resumed after doubt and does not live");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            self.whole(&[SOURCE])?;
            return Ok(Verdict::ResumedAfterDoubt);
        }
        let log = self.mover.other().log(&format!("{NAME}-incoming"));
        let heard = std::fs::read_to_string(log).unwrap_or_default();
        let passed = |frame| trace.passed.contains_key(&frame);
        // What the source waits for before it ends: of a guest whose memory follows, that all came.
        let all = if self.mode == "post" {
            COMPLETE
        } else {
            RUNNING
        };
        match harm {
            // Told to run the guest, the destination has to, whatever becomes of the source; unless
            // memory was to follow, and it knew already that the source is gone, and said so.
            Some(Harm::KillSource)
                if !said.success
                    && (!passed(COMMIT)
                        || self.mode == "post" && heard.contains("its memory stopped coming")) =>
            {
                Ok(Verdict::LostWithHost)
            }
            // The source has ended after it was told that all went well, or says that the guest was
            // given away and is lost.
            Some(Harm::KillDestination)
                if at_source.as_ref().map_or(passed(all), |status| {
                    status["migration"]["phase"] == "lost" && passed(COMMIT) && !said.success
                }) =>
            {
                Ok(Verdict::LostWithHost)
            }
            _ => bail!(
                "the guest lives nowhere; the move said: {}; the destination said: {heard}; \
                 the source is {:?}",
                said.text,
                at_source.map(|status| status["status"]["state"].clone())
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_numbers_draw_the_same_fault_and_all_kinds_are_drawn() {
        let mut trace = Trace::default();
        trace.frames.insert((Way::ToDestination, 4), 1000);
        trace.frames.insert((Way::ToSource, 13), 1);
        trace.others.push([1 << 20, 0]);
        let fault = |number| draw(&mut Random::new(1, number), &trace).unwrap();
        let mut decisive = 0;
        for number in 0..400 {
            assert_eq!(fault(number), fault(number));
            match fault(number).point {
                Point::Frame { kind: 13, .. } => decisive += 1,
                Point::Frame { skip, .. } => assert!(skip < 1000),
                Point::Byte { skip, way, offset } => {
                    assert_eq!((skip, way), (0, Way::ToDestination));
                    assert!(offset < 1 << 20);
                }
            }
        }
        assert!(decisive > 100, "{decisive} of 400 strike the rare frame");
        for harm in Harm::ALL {
            assert!((0..400).any(|number| fault(number).harm == harm));
        }
    }
}
