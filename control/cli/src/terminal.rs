//! This terminal as a guest's serial console.

use std::io::{IsTerminal, Read, Write};

use rustix::termios::{self, OptionalActions, Termios};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::error::CliError;

/// Ctrl-], as in telnet and virsh.
const DETACH_KEY: u8 = 0x1d;

/// How an attachment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The user typed Ctrl-].
    Detached,
    /// The VM's process closed the console.
    Closed,
    /// A signal asked this process to end.
    Interrupted,
}

/// Where the guest's output goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Standard output.
    Standard,
    /// Standard error: standard output carries the result for programs.
    Error,
}

/// Restores the terminal when dropped.
struct RawMode(Termios);

impl RawMode {
    /// Makes standard input raw, when it is a terminal.
    fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = termios::tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _gone = termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// SIGINT, SIGTERM or SIGHUP, whichever comes first.
#[derive(Debug)]
pub struct Interrupts([Signal; 3]);

impl Interrupts {
    /// From now on these signals no longer end the process.
    ///
    /// # Errors
    /// [`CliError::Host`] when the host refuses.
    pub fn listen() -> Result<Self, CliError> {
        let on = |kind| signal(kind).map_err(CliError::host("listen for signals"));
        Ok(Self([
            on(SignalKind::interrupt())?,
            on(SignalKind::terminate())?,
            on(SignalKind::hangup())?,
        ]))
    }

    /// Waits for one.
    pub async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// Carries bytes between this terminal and a console until one side ends it.
///
/// # Errors
/// [`CliError::Host`] when the console breaks.
pub async fn attach(
    console: UnixStream,
    interrupts: &mut Interrupts,
    output: Output,
) -> Result<Ending, CliError> {
    let raw = RawMode::enter();
    let mut input = keyboard();
    let (mut from_guest, mut writer) = console.into_split();
    let (to_guest, mut pending) = mpsc::channel::<Vec<u8>>(256);
    let writing = tokio::spawn(async move {
        while let Some(bytes) = pending.recv().await {
            // A guest that is gone shows as the end of its output.
            if writer.write_all(&bytes).await.is_err() {
                break;
            }
        }
        // Dropping the half would end the guest's output too.
        std::future::pending::<()>().await;
    });
    let mut buffer = vec![0; 16 << 10];
    let ending = loop {
        tokio::select! {
            count = from_guest.read(&mut buffer) => match count {
                Ok(0) => break Ending::Closed,
                Ok(count) => show(&buffer[..count], output),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break Ending::Closed,
                Err(error) => {
                    return Err(CliError::host("read the console")(error));
                }
            },
            typed = input.recv() => {
                let (bytes, detach) = until_detach(&typed, raw.is_some());
                // A guest that does not read loses what is typed, as at a full serial line.
                let _lost = to_guest.try_send(bytes.to_vec());
                if detach {
                    break Ending::Detached;
                }
            }
            () = interrupts.next() => break Ending::Interrupted,
        }
    };
    writing.abort();
    drop(raw);
    Ok(ending)
}

/// What of the typed bytes goes to the guest, and whether the detach key follows.
fn until_detach(bytes: &[u8], terminal: bool) -> (&[u8], bool) {
    match bytes.iter().position(|&byte| byte == DETACH_KEY) {
        Some(at) if terminal => (&bytes[..at], true),
        _ => (bytes, false),
    }
}

fn show(bytes: &[u8], output: Output) {
    // Nobody reads (a closed pipe): the VM goes on all the same.
    let _gone = match output {
        Output::Standard => {
            let mut out = std::io::stdout().lock();
            out.write_all(bytes).and_then(|()| out.flush())
        }
        Output::Error => std::io::stderr().lock().write_all(bytes),
    };
}

/// Reads standard input on a thread of its own: a terminal cannot be polled everywhere, and
/// making it non-blocking would change it for other processes.
fn keyboard() -> Input {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        let mut stdin = std::io::stdin().lock();
        while let Ok(count @ 1..) = stdin.read(&mut buffer) {
            if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    Input::Open(receiver)
}

/// Standard input; at its end it waits for ever.
enum Input {
    Open(mpsc::Receiver<Vec<u8>>),
    Ended,
}

impl Input {
    async fn recv(&mut self) -> Vec<u8> {
        if let Self::Open(receiver) = self {
            if let Some(bytes) = receiver.recv().await {
                return bytes;
            }
            *self = Self::Ended;
        }
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detach_key_counts_on_a_terminal_only() {
        assert_eq!(until_detach(b"ab\x1dcd", true), (&b"ab"[..], true));
        assert_eq!(until_detach(b"ab\x1dcd", false), (&b"ab\x1dcd"[..], false));
    }
}
