//! A stock kernel that runs from power-on to power-off under Dunlin or QEMU, and what it says on its
//! console, with the times.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::guest::Guest;
use dunlin_testbed::process::{self, Guard};

/// Memory of the guest, in mebibytes.
const MEMORY: u64 = 512;
/// Power-off ends the program within this time.
const LAST: Duration = Duration::from_secs(20);

/// What a guest said, from the program's start on.
pub(super) struct Session {
    pub(super) lines: Vec<(Duration, String)>,
    /// Did the program end well by itself?
    pub(super) clean: bool,
}

impl Session {
    /// Runs to the end, or until the limit.
    pub(super) fn run(command: &mut Command, limit: Duration) -> anyhow::Result<Self> {
        process::check_interrupt()?;
        let start = Instant::now();
        let mut guard = Guard::spawn(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::null()),
        )?;
        let output = guard.child().stdout.take();
        let output = output.context("standard output is piped")?;
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(output);
            let mut line = Vec::new();
            while reader
                .read_until(b'\n', &mut line)
                .is_ok_and(|read| read > 0)
            {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                // The receiver is gone when the session was given up.
                let _ = sender.send((start.elapsed(), text));
                line.clear();
            }
        });
        let mut lines = Vec::new();
        let clean = loop {
            process::check_interrupt()?;
            match receiver.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => lines.push(line),
                Err(RecvTimeoutError::Timeout) if start.elapsed() < limit => {}
                Err(RecvTimeoutError::Timeout) => break false,
                Err(RecvTimeoutError::Disconnected) => {
                    break guard.wait(LAST) && guard.child().wait()?.success();
                }
            }
        };
        Ok(Self { lines, clean })
    }

    /// When the guest first said something with these words.
    pub(super) fn said(&self, words: &str) -> Option<Duration> {
        let line = self.lines.iter().find(|line| line.1.contains(words));
        line.map(|line| line.0)
    }
}

/// Dunlin's software CPU with this guest.
pub(super) fn dunlin(binary: &Path, guest: &Guest, cpus: u32, cmdline: &str) -> Command {
    let mut command = Command::new(binary);
    command
        .args(["run", "--engine", "soft", "--memory", &format!("{MEMORY}M")])
        .args(["--cpus", &cpus.to_string()])
        .args(["--name", &format!("bench-{}", std::process::id())])
        .arg("--kernel")
        .arg(&guest.elf)
        .arg("--initrd")
        .arg(&guest.initramfs)
        .args(["--cmdline", cmdline]);
    command
}

/// QEMU's software CPU with the same guest.
pub(super) fn qemu(guest: &Guest, cpus: u32, cmdline: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg,thread=multi", "-machine", "q35"])
        .args(["-m", &MEMORY.to_string(), "-smp", &cpus.to_string()])
        .args(["-nodefaults", "-no-reboot", "-display", "none"])
        .args(["-serial", "stdio"])
        .arg("-kernel")
        .arg(&guest.elf)
        .arg("-initrd")
        .arg(&guest.initramfs)
        .args(["-append", cmdline]);
    command
}
