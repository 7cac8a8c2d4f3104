//! A bare-metal program runs through the binary as it does under QEMU: loaded by multiboot, with the
//! legacy interrupt controllers and timer, ended by the debug exit port.
#![expect(
    clippy::unwrap_used,
    reason = "a test may stop at what it cannot do without"
)]
#![cfg(target_arch = "x86_64")]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use dunlin_guest_baremetal::EXIT_STATUS;
use dunlin_testbed::guest;
use dunlin_testbed::hosts::Testbed;
use dunlin_testbed::process::{self, Guard};
use serde_json::Value;

/// How long the program may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// The program and two modules in a folder.
struct Program {
    folder: tempfile::TempDir,
    kernel: PathBuf,
    /// As both command lines take them.
    modules: String,
}

impl Program {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        let kernel = file("program", &dunlin_guest_baremetal::elf());
        let (one, two) = (file("one", &[9; 5000]), file("two", b"abc"));
        let modules = format!("{} x=1 y,{}", one.display(), two.display());
        Self {
            folder,
            kernel,
            modules,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Runs a command with its output in files, to its end.
fn run(command: &mut Command, output: &Path, errors: &Path) -> (ExitStatus, String) {
    let stdout = std::fs::File::create(output).unwrap();
    let stderr = std::fs::File::create(errors).unwrap();
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    let mut guard = Guard::spawn(command).unwrap();
    let ended = guard.wait(LIMIT);
    let read = |path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
    let (text, errors) = (read(output), read(errors));
    assert!(ended, "the program does not end:\n{text}{errors}");
    let status = guard.child().wait().unwrap();
    // What the exit status does not tell, the error text does.
    assert!(
        status.code() == Some(EXIT_STATUS),
        "{status}\n{text}{errors}"
    );
    (status, text.replace('\r', ""))
}

/// Runs the program under Dunlin; the console's lines.
fn under_dunlin(program: &Program, arguments: &[&str], more: &[&str]) -> Option<String> {
    let binary = guest::binary()?;
    let testbed = Testbed::new(&binary, &program.path("bed")).unwrap();
    let host = testbed.host("a", [127, 0, 0, 2].into()).unwrap();
    let mut command = host.command(&["run", "--name", "bare", "--engine", "soft"]);
    command
        .args([
            "--memory",
            "64M",
            "--isa-debug-exit",
            "iobase=0xf4,iosize=4",
        ])
        .args(more)
        .arg("--kernel")
        .arg(&program.kernel)
        .args(["--initrd", &program.modules])
        .args(["--cmdline", &arguments.join(" ")]);
    let (output, errors) = (program.path("output"), program.path("errors"));
    Some(run(&mut command, &output, &errors).1)
}

/// The lines that do not tell where the machine has its memory.
fn comparable(text: &str) -> Vec<&str> {
    let lines = text.lines().map(str::trim_end);
    lines
        .filter(|line| !line.starts_with("map ") && !line.starts_with("memory "))
        .collect()
}

#[test]
fn a_multiboot_program_is_told_its_memory_and_modules_and_chooses_the_exit_status() {
    let program = Program::new();
    let Some(text) = under_dunlin(&program, &["a", "short"], &[]) else {
        return;
    };
    let (folder, kernel) = (program.folder.path().display(), program.kernel.display());
    let expected = format!(
        "magic 2badb002\n\
         command line {kernel} a short\n\
         module 00001388 0000afc8 {folder}/one x=1 y\n\
         module 00000003 00000126 {folder}/two\n\
         memory 00000280 0000fc00\n\
         map 0000000000000000 00000000000a0000 00000001\n\
         map 00000000000a0000 0000000000040000 00000002\n\
         map 00000000000e0000 0000000000020000 00000003\n\
         map 0000000000100000 0000000003f00000 00000001\n\
         map 00000000e0000000 0000000010000000 00000002\n\
         end\n"
    );
    assert_eq!(text, expected);
}

#[test]
fn the_exit_status_is_in_the_json_result() {
    let program = Program::new();
    let Some(text) = under_dunlin(&program, &["short"], &["--json"]) else {
        return;
    };
    let result: Value = serde_json::from_str(text.trim()).unwrap();
    assert_eq!(result["exit_status"], EXIT_STATUS);
    assert_eq!(result["state"], "stopped");
    let reason = result["reason"].as_str().unwrap();
    assert!(
        reason.contains("wrote 0x10 to its debug exit port"),
        "{reason}"
    );
}

#[test]
fn interrupts_of_timer_and_serial_port_come_through_the_legacy_controllers() {
    let program = Program::new();
    let Some(text) = under_dunlin(&program, &["all"], &["--legacy"]) else {
        return;
    };
    let lines: Vec<_> = text.lines().rev().take(4).collect();
    let expected = [
        "end",
        "serial interrupts 00000001",
        "output 00000000",
        "ticks 0000000a 00000001",
    ];
    assert_eq!(lines, expected, "{text}");
}

#[test]
fn the_program_prints_the_same_under_qemu() {
    if !process::installed("qemu-system-x86_64") {
        eprintln!("SKIP: qemu-system-x86_64 is not installed");
        return;
    }
    let program = Program::new();
    let Some(ours) = under_dunlin(&program, &["all"], &["--legacy"]) else {
        return;
    };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg", "-machine", "pc", "-m", "64"])
        .args(["-nodefaults", "-no-reboot", "-display", "none"])
        .args(["-serial", "stdio", "-append", "all"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .arg("-kernel")
        .arg(&program.kernel)
        .args(["-initrd", &program.modules]);
    let (output, errors) = (program.path("qemu-output"), program.path("qemu-errors"));
    let theirs = run(&mut command, &output, &errors).1;
    assert_eq!(comparable(&ours), comparable(&theirs));
}
