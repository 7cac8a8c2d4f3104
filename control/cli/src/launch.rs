//! Starting a VM process and hearing from it.

use std::io::Write;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::Duration;

use dunlin_api::launch::{DETACH, GuestOrigin, LaunchReply, LaunchSpec, StandardInput, Start};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::unix::pipe;

use crate::client::runtime_directory;
use crate::error::CliError;

/// A VM process that this process started.
#[derive(Debug)]
pub struct VmProcess {
    child: Child,
    lifeline: Option<ChildStdin>,
    replies: Lines<BufReader<pipe::Receiver>>,
}

impl VmProcess {
    /// Starts a process for a guest. It ends with this one unless it is told to
    /// [`VmProcess::detach`].
    ///
    /// # Errors
    /// [`CliError::Host`] when the host refuses.
    pub fn start(guest: GuestOrigin, start: Start) -> Result<Self, CliError> {
        let spec = LaunchSpec {
            version: dunlin_api::VERSION,
            runtime: runtime_directory().path().to_owned(),
            guest,
            standard_input: StandardInput::Lifeline,
            start,
        };
        let starting = || CliError::host("start the VM's process");
        let spec = serde_json::to_string(&spec)
            .map_err(std::io::Error::other)
            .map_err(starting())?;
        let program = std::env::current_exe().map_err(starting())?;
        let mut child = Command::new(program)
            .arg("vm-process")
            .arg(spec)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(starting())?;
        let lifeline = child.stdin.take();
        let pipe = child.stdout.take().ok_or_else(|| CliError::ProcessEnded {
            status: "without output".into(),
        })?;
        let pipe = pipe::Receiver::from_owned_fd(pipe.into()).map_err(starting())?;
        Ok(Self {
            child,
            lifeline,
            replies: BufReader::new(pipe).lines(),
        })
    }

    /// The next thing that the process says; `None` once it has ended.
    ///
    /// # Errors
    /// [`CliError::Host`] when what it says is unreadable.
    pub async fn reply(&mut self) -> Result<Option<LaunchReply>, CliError> {
        let reading = || CliError::host("read from the VM's process");
        let Some(line) = self.replies.next_line().await.map_err(reading())? else {
            return Ok(None);
        };
        serde_json::from_str(&line)
            .map(Some)
            .map_err(std::io::Error::other)
            .map_err(reading())
    }

    /// Lets the process outlive this one.
    ///
    /// # Errors
    /// [`CliError::Host`] when the process is gone already.
    pub fn detach(&mut self) -> Result<(), CliError> {
        if let Some(mut lifeline) = self.lifeline.take() {
            (lifeline.write_all(&[DETACH]))
                .map_err(CliError::host("detach from the VM's process"))?;
        }
        Ok(())
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Tells a process that waits for a guest to wait no longer. One that has it lives on.
    pub fn let_go(&mut self) {
        drop(self.lifeline.take());
    }

    /// Ends the process, gently first.
    pub async fn end(mut self) {
        drop(self.lifeline.take());
        for _ in 0..100 {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }

    /// Waits for the end of a process that has said its last.
    pub fn wait(mut self) -> Result<ExitStatus, CliError> {
        self.child
            .wait()
            .map_err(CliError::host("wait for the VM's process"))
    }

    /// The error for a process that ended without a word.
    pub fn ended(self) -> CliError {
        match self.wait() {
            Ok(status) => CliError::ProcessEnded {
                status: status.to_string(),
            },
            Err(error) => error,
        }
    }
}
