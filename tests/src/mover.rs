//! The benchmark guest on two hosts, between which it moves back and forth while it is heard.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use dunlin_guest_migbench::{Event, Parameters};
use serde_json::Value;

use crate::hosts::{FIRST, Host, SECOND, Testbed};
use crate::ticks::{Recorder, Ticks, write_rate};

/// The guest's name on both hosts.
pub const NAME: &str = "bench";
/// Time for a guest to fill its memory: where a kernel runs in a virtual machine itself, each
/// page costs it tens of microseconds.
const FILLED: Duration = Duration::from_secs(120);
/// Time for a guest that has arrived to say so.
const ARRIVED: Duration = Duration::from_secs(30);
/// Time for a move, for `--timeout`.
const MOVED: &str = "90s";
/// How long a guest is heard before and after each move.
pub const CALM: Duration = Duration::from_millis(200);

/// What runs the guest's processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Engine {
    /// For `--engine`.
    pub name: &'static str,
    /// For `--baseline`.
    pub baseline: &'static str,
}

impl Engine {
    /// What to try, the best first.
    pub const ALL: [Self; 3] = [
        Self {
            name: "kvm",
            baseline: "x86-64-v2",
        },
        Self {
            name: "kvm",
            baseline: "x86-64-v1",
        },
        Self::SOFT,
    ];
    /// What runs everywhere.
    pub const SOFT: Self = Self {
        name: "soft",
        baseline: "x86-64-v2",
    };

    /// The best one under which the benchmark guest ticks here.
    ///
    /// # Errors
    /// When it runs under none.
    pub fn best(binary: &Path, folder: &Path) -> anyhow::Result<Self> {
        let mut reasons = Vec::new();
        for engine in Self::ALL {
            let setup = Setup {
                binary: binary.to_owned(),
                folder: folder.join("engine"),
                engine,
                memory_mebibytes: 32,
                parameters: Parameters {
                    fill_mebibytes: Some(1),
                    ..Parameters::default()
                },
            };
            let ticks = Mover::start(&setup).and_then(|mut mover| {
                let limit = Duration::from_secs(10);
                mover
                    .recorder
                    .wait("a tick", limit, |heard| heard.len() > 100)
            });
            match ticks {
                Ok(()) => return Ok(engine),
                Err(error) => reasons.push(format!("{}: {error:#}", engine.name)),
            }
        }
        bail!(
            "the benchmark guest runs under no engine:\n{}",
            reasons.join("\n")
        );
    }
}

/// What is moved.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The `dunlin` to use.
    pub binary: PathBuf,
    /// Emptied, then home of sockets and logs.
    pub folder: PathBuf,
    /// Engine on both hosts.
    pub engine: Engine,
    /// RAM of the guest.
    pub memory_mebibytes: u64,
    /// What the guest does.
    pub parameters: Parameters,
}

/// The guest and its hosts.
#[derive(Debug)]
pub struct Mover {
    hosts: [Host; 2],
    /// Where the guest is.
    at: usize,
    recorder: Recorder,
}

/// The command that moves failed: the guest should be where it was.
#[derive(Debug)]
pub struct NotMoved;

impl std::fmt::Display for NotMoved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the move was given up")
    }
}

/// What one move was.
#[derive(Debug)]
pub struct Hop {
    /// What `dunlin migrate --json` printed.
    pub report: Value,
    /// The guest's longest silence at the change of hosts, in milliseconds; `None` for a guest
    /// that does not tick.
    pub blackout_ms: Option<f64>,
    /// The longest silence in the calm before the move, in milliseconds.
    pub control_ms: Option<f64>,
    /// The longest silence from the start of the move to the calm after it, the blackout among
    /// them, in milliseconds.
    pub worst_gap_ms: Option<f64>,
    /// Processor time of both processes during the command, in seconds.
    pub cpu_seconds: f64,
    /// When the command ran, from the recorder's start.
    pub span: (Duration, Duration),
    /// When the guest was first heard at the destination.
    pub arrived: Option<Duration>,
}

impl Mover {
    /// Does memory follow a guest here, or is userfaultfd not permitted?
    pub fn memory_follows(setup: &Setup) -> bool {
        let moved = Self::start(setup).and_then(|mut mover| mover.hop(&["--mode", "post"], &[]));
        moved.is_ok_and(|hop| !hop.report["post_copy"].is_null())
    }

    /// Starts the guest on the first host, and waits until its memory is filled.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(setup: &Setup) -> anyhow::Result<Self> {
        let testbed = Testbed::new(&setup.binary, &setup.folder)?;
        let hosts = [testbed.host("a", FIRST)?, testbed.host("b", SECOND)?];
        let kernel = setup.folder.join("migbench.elf");
        std::fs::write(&kernel, dunlin_guest_migbench::elf())?;
        let recorder = Recorder::new(&setup.folder.join("port"))?;
        let mut mover = Self {
            hosts,
            at: 0,
            recorder,
        };
        let port = mover.port();
        let host = &mut mover.hosts[0];
        let mut command = host.command(&["run", "--name", NAME]);
        command
            .args(["--engine", setup.engine.name])
            .args(["--baseline", setup.engine.baseline])
            .args(["--memory", &format!("{}M", setup.memory_mebibytes)])
            .args(["--cmdline", &setup.parameters.to_string()])
            .args(["--debugcon", &port])
            .arg("--kernel")
            .arg(&kernel);
        host.bring_up(command, NAME)?;
        mover
            .recorder
            .wait("filling the guest's memory", FILLED, |heard| {
                heard
                    .iter()
                    .any(|heard| matches!(heard.event, Event::Ready { .. }))
            })?;
        Ok(mover)
    }

    fn port(&self) -> String {
        format!("unix:{}", self.recorder.path().display())
    }

    /// What the guest says.
    pub fn recorder(&mut self) -> &mut Recorder {
        &mut self.recorder
    }

    /// Where the guest is.
    pub fn host(&mut self) -> &mut Host {
        &mut self.hosts[self.at]
    }

    /// Where the guest is not.
    pub fn other(&mut self) -> &mut Host {
        &mut self.hosts[1 - self.at]
    }

    /// The guest has come to the other host.
    pub fn changed_hosts(&mut self) {
        self.at = 1 - self.at;
    }

    /// Process id of the guest's VM.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn pid(&self) -> anyhow::Result<u32> {
        let status = self.hosts[self.at].query(&["inspect", NAME])?;
        let pid = status["status"]["pid"].as_u64();
        Ok(u32::try_from(pid.context("a VM has a process id")?)?)
    }

    /// Makes a place on the other host; returns its address.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn await_guest(&mut self, arguments: &[&str]) -> anyhow::Result<String> {
        let port = self.port();
        let mut all = vec!["--debugcon", port.as_str()];
        all.extend(arguments);
        self.other().commands().retain_mut(|guard| !guard.exited());
        self.other().receive_with(NAME, &all)
    }

    /// Moves the guest to the other host, with more arguments for `migrate` and `receive`.
    ///
    /// # Errors
    /// When the move fails, the guest does not tick at the destination, or has lost something.
    pub fn hop(&mut self, migrate: &[&str], receive: &[&str]) -> anyhow::Result<Hop> {
        let target = self.await_guest(receive)?;
        self.hop_to(&target, migrate)
    }

    /// Moves the guest to a place that [`Mover::await_guest`] has made, perhaps by a way round.
    ///
    /// # Errors
    /// As [`Mover::hop`].
    pub fn hop_to(&mut self, target: &str, migrate: &[&str]) -> anyhow::Result<Hop> {
        let ticking = !Ticks::of(self.recorder.heard()?).is_empty();
        if ticking {
            self.listen_for(CALM)?;
        }
        let pids = self.processes();
        let before = ProcessorTime::of(&pids);
        let watch = Watch::start(pids.clone());
        let start = self.recorder.now();
        let mut arguments = vec!["migrate", NAME, "--to", target, "--timeout", MOVED];
        arguments.extend(migrate);
        let report = self.hosts[self.at].query(&arguments);
        let end = self.recorder.now();
        let cpu_seconds = watch.end().since(&before);
        let report = report.context(NotMoved)?;
        let mut hop = Hop {
            report,
            blackout_ms: None,
            control_ms: None,
            worst_gap_ms: None,
            cpu_seconds,
            span: (start, end),
            arrived: None,
        };
        self.changed_hosts();
        if ticking {
            self.hear_arrival(&mut hop)?;
        }
        Ok(hop)
    }

    /// Makes sure, after a move that failed, that the guest goes on where it was, and clears the
    /// other host.
    ///
    /// # Errors
    /// When it does not, or has lost something.
    pub fn stay(&mut self) -> anyhow::Result<()> {
        self.other().kill_machines();
        let status = self.host().query(&["inspect", NAME])?;
        let state = &status["status"]["state"];
        if state != "running" {
            bail!("the guest was to go on where it was, and is {state}");
        }
        self.listen_for(CALM)
    }

    fn hear_arrival(&mut self, hop: &mut Hop) -> anyhow::Result<()> {
        let (start, end) = hop.span;
        let stream = self.recorder.streams() - 1;
        self.recorder
            .wait("a tick at the destination", ARRIVED, |heard| {
                heard.last().is_some_and(|last| last.stream == stream)
            })?;
        self.listen_for(CALM)?;
        let now = self.recorder.now();
        let ticks = Ticks::of(self.recorder.heard()?);
        let ms = |gap: Option<Duration>| gap.map(|gap| gap.as_secs_f64() * 1e3);
        hop.arrived = ticks.first_on(stream);
        hop.blackout_ms = ms(ticks.blackout(stream));
        hop.control_ms = ms(ticks.worst_gap(start.saturating_sub(CALM), start));
        hop.worst_gap_ms = ms(ticks.worst_gap(start, now.max(end)));
        Ok(())
    }

    /// Listens for some time.
    ///
    /// # Errors
    /// When the guest has lost something.
    pub fn listen_for(&mut self, time: Duration) -> anyhow::Result<()> {
        let end = self.recorder.now() + time;
        self.recorder.wait("a tick", time + ARRIVED, |heard| {
            heard.last().is_some_and(|last| last.at >= end)
        })
    }

    /// Waits until the guest has checked all of its memory, in a pass that begins now.
    ///
    /// # Errors
    /// When something is wrong in it.
    pub fn scrubbed(&mut self, limit: Duration) -> anyhow::Result<()> {
        let from = self.recorder.now();
        self.recorder.wait("a check of all memory", limit, |heard| {
            let passes = heard
                .iter()
                .filter(|heard| heard.at > from && matches!(heard.event, Event::Scrubbed { .. }));
            passes.count() >= 2
        })
    }

    /// Writes a second in a span of time.
    ///
    /// # Errors
    /// When the guest has lost something.
    pub fn write_rate(&mut self, from: Duration, to: Duration) -> anyhow::Result<Option<f64>> {
        Ok(write_rate(self.recorder.heard()?, from, to))
    }

    /// Process ids of both hosts' VM processes.
    fn processes(&self) -> Vec<u32> {
        let pids = self.hosts.iter().flat_map(Host::machine_pids);
        pids.filter_map(|pid| u32::try_from(pid).ok()).collect()
    }
}

/// Processor time of some processes, in clock ticks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessorTime(Vec<(u32, u64)>);

impl ProcessorTime {
    /// User and system time that each has used so far; those that have ended are left out.
    pub fn of(pids: &[u32]) -> Self {
        let time = |&pid: &u32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name, in parentheses, may hold spaces.
            let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
            let user: u64 = fields.next()?.parse().ok()?;
            let system: u64 = fields.next()?.parse().ok()?;
            Some((pid, user + system))
        };
        Self(pids.iter().filter_map(time).collect())
    }

    /// Seconds since an earlier look.
    pub fn since(&self, before: &Self) -> f64 {
        let earlier = |pid| before.0.iter().find(|(other, _)| *other == pid);
        let ticks = self.0.iter();
        let used = ticks.map(|&(pid, now)| now - earlier(pid).map_or(0, |(_, then)| *then));
        used.sum::<u64>() as f64 / ticks_per_second()
    }

    /// Takes over what is newer; keeps the last word of a process that has ended.
    fn update(&mut self, newer: Self) {
        for (pid, ticks) in newer.0 {
            match self.0.iter_mut().find(|(other, _)| *other == pid) {
                Some(entry) => entry.1 = ticks,
                None => self.0.push((pid, ticks)),
            }
        }
    }
}

fn ticks_per_second() -> f64 {
    // SAFETY: sysconf has no preconditions.
    #[expect(unsafe_code, reason = "std does not tell the unit of /proc")]
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    ticks.max(1) as f64
}

/// Looks at processes all the time, since one that ends takes its count with it.
#[derive(Debug)]
pub struct Watch {
    stop: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<ProcessorTime>,
}

impl Watch {
    /// Begins.
    pub fn start(pids: Vec<u32>) -> Self {
        let (stop, stopped) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut last = ProcessorTime::of(&pids);
            let pause = Duration::from_millis(5);
            while stopped.recv_timeout(pause) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                last.update(ProcessorTime::of(&pids));
            }
            last.update(ProcessorTime::of(&pids));
            last
        });
        Self { stop, thread }
    }

    /// The last word of each process.
    pub fn end(self) -> ProcessorTime {
        // The thread takes the end of the channel for the same.
        let _ = self.stop.send(());
        self.thread.join().unwrap_or(ProcessorTime(Vec::new()))
    }
}
