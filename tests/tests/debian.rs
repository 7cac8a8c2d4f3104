//! A Debian with systemd on a disk boots to its login, works, and switches itself off; what it wrote
//! is on the disk, whose file system is whole.
#![expect(
    clippy::unwrap_used,
    reason = "a test may stop at what it cannot do without"
)]

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use dunlin_testbed::guest;
use dunlin_testbed::hosts::Testbed;
use dunlin_testbed::process::{self, Guard};

/// How long a boot, or the end of a command, may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

/// One at a time: the times that are told are each one's own.
static ALONE: Mutex<()> = Mutex::new(());

/// A VM in the foreground, whose console is the test's.
struct Console {
    guard: Guard,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// All that the guest said.
    said: String,
    /// How much of it was looked at.
    seen: usize,
}

impl Console {
    fn open(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut guard = Guard::spawn(command.stderr(Stdio::inherit())).unwrap();
        let input = guard.child().stdin.take().unwrap();
        let mut stream = guard.child().stdout.take().unwrap();
        let (sender, output) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            guard,
            input,
            output,
            said: String::new(),
            seen: 0,
        }
    }

    /// Waits until the guest says `words`, and returns what it said before.
    fn until(&mut self, words: &str) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.said[self.seen..].find(words) {
                let before = self.said[self.seen..][..at].to_owned();
                self.seen += at + words.len();
                return before;
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.said.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("no {words:?} ({error}):\n{}", self.said),
            }
        }
    }

    fn type_line(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// Logs in as root, to a shell that echoes nothing.
    fn log_in(&mut self) {
        self.type_line("root");
        self.until("# ");
        self.type_line("exec sh");
        self.until("# ");
        self.type_line("stty -echo; echo rea''dy");
        self.until("ready");
    }

    /// What a command says that must end well.
    fn run(&mut self, command: &str) -> String {
        self.type_line(&format!("({command}); echo \"<$?>\""));
        let output = self.until("<");
        let status = self.until(">");
        assert_eq!(status, "0", "{command}: {output}");
        output.trim_start_matches(['#', ' ', '\r', '\n']).to_owned()
    }

    /// Waits for the VM's end, which must be a good one.
    fn ends(mut self) {
        let ended = self.guard.wait(LIMIT);
        for bytes in self.output.iter() {
            self.said.push_str(&String::from_utf8_lossy(&bytes));
        }
        assert!(ended, "the guest did not switch itself off:\n{}", self.said);
        let status = self.guard.child().wait().unwrap();
        assert!(status.success(), "{status}:\n{}", self.said);
    }
}

/// What a program of e2fsprogs says about the image.
fn about_disk(words: &[&str], disk: &Path) -> String {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).arg(disk);
    process::output(command.env("PATH", process::administrator_path())).unwrap()
}

/// A copy, with its holes.
fn copy(image: &Path, folder: &Path) -> PathBuf {
    let disk = folder.join("disk.raw");
    let mut command = Command::new("cp");
    process::run(command.args(["--sparse=always"]).args([image, &disk])).unwrap();
    disk
}

fn boots_works_and_powers_off(series: &str, cpus: u32) {
    let (Some(binary), Some(guest), Some(image)) =
        (guest::binary(), guest::stock(series), guest::debian())
    else {
        return;
    };
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let disk = copy(&image, folder.path());
    let testbed = Testbed::new(&binary, &folder.path().join("bed")).unwrap();
    let host = testbed.host("a", [127, 0, 0, 2].into()).unwrap();
    let begun = Instant::now();
    let mut console = Console::open(
        host.command(&["run", "--name", "debian", "--engine", "soft"])
            .args(["--memory", "512M", "--cpus", &cpus.to_string()])
            .args([
                "--cmdline",
                "console=ttyS0 quiet dunlin.init=root dunlin.root=/dev/vda",
            ])
            .arg("--kernel")
            .arg(&guest.kernel)
            .arg("--initrd")
            .arg(&guest.initramfs)
            .arg("--disk")
            .arg(&disk),
    );
    console.until("dunlin login: ");
    let to_login = begun.elapsed();
    console.log_in();
    let state = console.run("systemctl is-system-running --wait");
    let failed = console.run("systemctl --failed --no-legend --plain");
    assert_eq!((state.trim(), failed.trim()), ("running", ""));
    assert_eq!(console.run("nproc").trim(), cpus.to_string());
    assert_eq!(
        console.run("findmnt -no SOURCE,FSTYPE /").trim(),
        "/dev/vda ext4"
    );
    let trouble = console.run("dmesg | grep -iE 'lockup|rcu.*stall|BUG:|Call Trace' || true");
    assert_eq!(trouble.trim(), "");
    console.run("seq 100000 > /root/mark; sync");
    console.type_line("systemctl poweroff");
    console.ends();
    println!(
        "MEASURED: Debian with systemd on {series}, {cpus} vCPUs: login after {:.1} s, the end after {:.1} s",
        to_login.as_secs_f64(),
        begun.elapsed().as_secs_f64(),
    );
    about_disk(&["e2fsck", "-f", "-n"], &disk);
    let mut mark = String::new();
    for number in 1..=100_000 {
        let _ = writeln!(mark, "{number}");
    }
    let read = about_disk(&["debugfs", "-R", "cat /root/mark"], &disk);
    assert!(read == mark, "the guest's file is not on its disk");
}

#[test]
fn debian_boots_to_a_login_on_6_1_and_powers_off() {
    boots_works_and_powers_off("6.1", 1);
}

#[test]
fn debian_boots_to_a_login_on_6_12_with_two_processors_and_powers_off() {
    boots_works_and_powers_off("6.12", 2);
}
