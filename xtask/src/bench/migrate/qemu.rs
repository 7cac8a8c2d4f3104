//! The peer: QEMU with the same guest, moved between two processes over loopback TCP by QMP.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use dunlin_guest_migbench::Event;
use serde_json::{Value, json};

use dunlin_testbed::hosts::{FIRST, free_tcp_port};
use dunlin_testbed::mover::{CALM, ProcessorTime, Setup};
use dunlin_testbed::process::{self, Guard};
use dunlin_testbed::ticks::{Recorder, Ticks};

pub(super) const PROGRAM: &str = "qemu-system-x86_64";
/// Time for a guest to fill its memory, and for a move.
const PATIENCE: Duration = Duration::from_secs(180);
/// As much as goes.
const NO_LIMIT: u64 = 1 << 40;

/// How QEMU runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    Tcg,
}

/// How QEMU moves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Settings {
    /// Connections of multifd; without multifd when absent.
    pub(super) channels: Option<u8>,
    /// Its downtime limit.
    pub(super) downtime_ms: u64,
}

/// The guest in QEMU.
pub(super) struct Peer {
    folder: PathBuf,
    accelerator: Accelerator,
    memory_mebibytes: u64,
    command_line: String,
    machine: Process,
    recorder: Recorder,
    /// Numbers the processes.
    count: u32,
}

/// What one move was.
#[derive(Debug)]
pub(super) struct Moved {
    /// As QEMU tells.
    pub(super) total_ms: f64,
    /// As QEMU tells.
    pub(super) downtime_ms: f64,
    /// As the guest shows.
    pub(super) blackout_ms: Option<f64>,
    /// Of both processes.
    pub(super) cpu_seconds: f64,
}

struct Process {
    // The process goes before its socket is left.
    guard: Guard,
    reader: BufReader<UnixStream>,
}

impl Peer {
    /// Starts the guest, and waits until its memory is filled.
    pub(super) fn start(setup: &Setup, accelerator: Accelerator) -> anyhow::Result<Self> {
        let folder = setup.folder.clone();
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("migbench.elf"), dunlin_guest_migbench::elf())?;
        let recorder = Recorder::new(&folder.join("port"))?;
        let line = setup.parameters.to_string();
        let memory = setup.memory_mebibytes;
        let machine = Process::start(&folder, 0, &arguments(accelerator, memory, &line), None)?;
        let mut peer = Self {
            folder,
            accelerator,
            memory_mebibytes: memory,
            command_line: line,
            machine,
            recorder,
            count: 0,
        };
        peer.recorder
            .wait("filling the guest's memory in QEMU", PATIENCE, |heard| {
                heard
                    .iter()
                    .any(|heard| matches!(heard.event, Event::Ready { .. }))
            })?;
        Ok(peer)
    }

    /// Moves the guest to a new process.
    pub(super) fn hop(&mut self, settings: Settings) -> anyhow::Result<Moved> {
        let ticking = !Ticks::of(self.recorder.heard()?).is_empty();
        self.count += 1;
        let port = free_tcp_port(FIRST)?;
        let target = format!("tcp:{FIRST}:{port}");
        let arguments = arguments(self.accelerator, self.memory_mebibytes, &self.command_line);
        let mut destination = Process::start(&self.folder, self.count, &arguments, Some("defer"))?;
        for side in [&mut self.machine, &mut destination] {
            side.configure(settings)?;
        }
        destination.execute("migrate-incoming", &json!({"uri": target}))?;
        let pids = [self.machine.guard.id(), destination.guard.id()];
        let before = ProcessorTime::of(&pids);
        self.machine.execute("migrate", &json!({"uri": target}))?;
        let info = self.machine.completed()?;
        let cpu_seconds = ProcessorTime::of(&pids).since(&before);
        let mut moved = Moved {
            total_ms: info["total-time"].as_f64().context("QEMU tells a time")?,
            downtime_ms: info["downtime"].as_f64().context("QEMU tells a downtime")?,
            blackout_ms: None,
            cpu_seconds,
        };
        self.machine = destination;
        if ticking {
            let stream = self.recorder.streams() - 1;
            self.recorder
                .wait("a tick in QEMU's destination", PATIENCE, |heard| {
                    heard.last().is_some_and(|last| last.stream == stream)
                })?;
            let end = self.recorder.now() + CALM;
            self.recorder.wait("a tick", PATIENCE, |heard| {
                heard.last().is_some_and(|last| last.at >= end)
            })?;
            let ticks = Ticks::of(self.recorder.heard()?);
            moved.blackout_ms = ticks.blackout(stream).map(|gap| gap.as_secs_f64() * 1e3);
        }
        Ok(moved)
    }
}

fn arguments(accelerator: Accelerator, memory_mebibytes: u64, line: &str) -> Vec<String> {
    let (accelerator, processor) = match accelerator {
        Accelerator::Kvm => ("kvm", "qemu64"),
        Accelerator::Tcg => ("tcg", "max"),
    };
    let memory = memory_mebibytes.to_string();
    [
        "-accel",
        accelerator,
        "-cpu",
        processor,
        "-machine",
        "q35",
        "-m",
        &memory,
        "-smp",
        "1",
        "-nodefaults",
        "-no-reboot",
        "-display",
        "none",
        "-append",
        line,
    ]
    .map(str::to_owned)
    .to_vec()
}

impl Process {
    fn start(
        folder: &Path,
        number: u32,
        arguments: &[String],
        incoming: Option<&str>,
    ) -> anyhow::Result<Self> {
        let socket = folder.join(format!("qmp{number}"));
        let log = std::fs::File::create(folder.join(format!("qemu{number}.log")))?;
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments)
            .arg("-kernel")
            .arg(folder.join("migbench.elf"))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-chardev")
            .arg(format!(
                "socket,id=port,path={}",
                folder.join("port").display()
            ))
            .args(["-device", "isa-debugcon,iobase=0xe9,chardev=port"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        if let Some(incoming) = incoming {
            command.args(["-incoming", incoming]);
        }
        let mut guard = Guard::spawn(&mut command)?;
        let mut stream = None;
        process::wait_until("start of QEMU", Duration::from_secs(20), || {
            if guard.exited() {
                let log = folder.join(format!("qemu{number}.log"));
                bail!(
                    "QEMU ended at once:\n{}",
                    std::fs::read_to_string(log).unwrap_or_default()
                );
            }
            stream = UnixStream::connect(&socket).ok();
            Ok(stream.is_some())
        })?;
        let stream = stream.context("the socket was there")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut process = Self {
            guard,
            reader: BufReader::new(stream),
        };
        process.message()?; // the greeting
        process.execute("qmp_capabilities", &json!({}))?;
        Ok(process)
    }

    fn message(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU has ended");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Asks, and waits for the answer; events before it are passed over.
    fn execute(&mut self, command: &str, arguments: &Value) -> anyhow::Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.reader.get_mut(), "{request}")?;
        loop {
            let message = self.message()?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refused {command}: {error}");
            }
            if let Some(answer) = message.get("return") {
                return Ok(answer.clone());
            }
        }
    }

    fn configure(&mut self, settings: Settings) -> anyhow::Result<()> {
        let multifd = json!({"capability": "multifd", "state": settings.channels.is_some()});
        self.execute(
            "migrate-set-capabilities",
            &json!({"capabilities": [multifd]}),
        )?;
        let mut parameters = json!({
            "max-bandwidth": NO_LIMIT,
            "downtime-limit": settings.downtime_ms,
        });
        if let Some(channels) = settings.channels {
            parameters["multifd-channels"] = channels.into();
        }
        self.execute("migrate-set-parameters", &parameters)
            .map(drop)
    }

    fn completed(&mut self) -> anyhow::Result<Value> {
        let end = Instant::now() + PATIENCE;
        loop {
            process::check_interrupt()?;
            let info = self.execute("query-migrate", &json!({}))?;
            match info["status"].as_str() {
                // It is completed a moment before its time is known.
                Some("completed") if info["total-time"].as_u64().is_some_and(|ms| ms > 0) => {
                    return Ok(info);
                }
                Some("failed" | "cancelled") => bail!("QEMU's move failed: {info}"),
                _ if Instant::now() > end => bail!("QEMU's move does not end: {info}"),
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}
