//! Drives the binary as a user does, in a runtime directory of its own.

pub(crate) mod guest;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for anything: the machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);

/// A runtime directory and what runs in it.
pub(crate) struct Bed {
    folder: tempfile::TempDir,
    children: Vec<Child>,
}

impl Bed {
    pub(crate) fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            children: Vec::new(),
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn runtime(&self) -> PathBuf {
        self.folder().join("run")
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dunlin"));
        command
            .args(arguments)
            .env("DUNLIN_RUNTIME_DIR", self.runtime())
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs a command that must succeed; its one JSON object.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.command(arguments).arg("--json").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "{arguments:?}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_str(text.trim()).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text}"))
    }

    /// Runs a command that must fail; what it said on standard error.
    pub(crate) fn fails(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code().is_some_and(|code| code != 0),
            "{arguments:?}: {text}"
        );
        assert!(!text.contains("panicked"), "{text}");
        text
    }

    /// Starts a VM that goes on by itself.
    pub(crate) fn run(&self, name: &str, code: &[u8], more: &[&str]) -> Value {
        self.run_as((engine(), "x86-64-v1"), name, code, more)
    }

    /// Starts a VM under an engine, with a baseline.
    pub(crate) fn run_as(
        &self,
        (engine, baseline): (&str, &str),
        name: &str,
        code: &[u8],
        more: &[&str],
    ) -> Value {
        let kernel = guest::kernel(self.folder(), code);
        self.run_kernel((engine, baseline), name, &kernel, more)
    }

    /// Starts a VM with a kernel of its own.
    pub(crate) fn run_kernel(
        &self,
        (engine, baseline): (&str, &str),
        name: &str,
        kernel: &Path,
        more: &[&str],
    ) -> Value {
        let kernel = kernel.to_str().unwrap();
        let mut arguments = vec!["run", "--detach", "--name", name, "--memory", "8M"];
        arguments.extend(["--baseline", baseline, "--engine", engine]);
        arguments.extend(["--kernel", kernel]);
        arguments.extend(more);
        self.json(&arguments)
    }

    /// Starts `receive` and waits until it listens; where.
    pub(crate) fn receive(&mut self, more: &[&str]) -> String {
        let mut arguments = vec!["receive", "--listen", "tcp://127.0.0.1:0"];
        arguments.extend(more);
        let mut child = self
            .command(&arguments)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        self.children.push(child);
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        // Keep reading, so that it never waits for us.
        std::thread::spawn(move || lines.read_to_end(&mut Vec::new()));
        let endpoint = line.trim().rsplit(' ').next().unwrap().to_owned();
        assert!(endpoint.starts_with("tcp://"), "{line}");
        endpoint
    }

    /// Attaches to a console.
    pub(crate) fn console(&self, name: &str) -> Console {
        let socket = self.runtime().join(name).join("console.sock");
        let mut stream = UnixStream::connect(&socket).unwrap();
        let (sender, output) = channel();
        // Read at once: a VM that ends does not wait for long for readers that are busy.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Console {
            output,
            text: String::new(),
        }
    }

    /// Nothing is left in the runtime directory.
    pub(crate) fn is_empty(&self) -> bool {
        std::fs::read_dir(self.runtime()).is_ok_and(|mut entries| entries.next().is_none())
    }

    /// Waits until nothing is left in the runtime directory.
    pub(crate) fn wait_until_empty(&self) {
        let end = Instant::now() + LIMIT;
        while !self.is_empty() {
            assert!(
                Instant::now() < end,
                "something is left in the runtime directory"
            );
            std::thread::yield_now();
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let names = std::fs::read_dir(self.runtime())
            .into_iter()
            .flatten()
            .flatten();
        let names: Vec<_> = names.map(|entry| entry.file_name()).collect();
        for name in names {
            let _gone = self.output(&["stop", "--kill", &name.to_string_lossy()]);
        }
        for child in &mut self.children {
            let _gone = child.kill();
            let _gone = child.wait();
        }
    }
}

/// A reader of a console.
pub(crate) struct Console {
    output: Receiver<Vec<u8>>,
    text: String,
}

impl Console {
    /// All that was read so far, at least `count` bytes.
    pub(crate) fn at_least(&mut self, count: usize) -> &str {
        while self.text.len() < count {
            let Ok(bytes) = self.output.recv_timeout(LIMIT) else {
                panic!("the console ended or stalled after {:?}", self.text);
            };
            self.text.push_str(&String::from_utf8_lossy(&bytes));
        }
        &self.text
    }

    /// Reads to the end.
    pub(crate) fn rest(mut self) -> String {
        loop {
            match self.output.recv_timeout(LIMIT) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Disconnected) => return self.text,
                Err(RecvTimeoutError::Timeout) => panic!("the console does not end"),
            }
        }
    }
}

/// Do the letters follow each other without a gap?
pub(crate) fn assert_no_gap(text: &str) {
    for pair in text.as_bytes().windows(2) {
        let expected = (pair[0] - b'a' + 1) % 26 + b'a';
        assert_eq!(pair[1], expected, "gap in {text}");
    }
}

/// The engine to test; `DUNLIN_TEST_ENGINE` names another one.
pub(crate) fn engine() -> &'static str {
    match std::env::var("DUNLIN_TEST_ENGINE").as_deref() {
        Ok("kvm") => "kvm",
        _ => "soft",
    }
}
