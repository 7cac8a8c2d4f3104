//! The control socket: a unix stream that carries one JSON object a line in both directions.
//!
//! ```text
//! → {"op":"counters"}
//! ← {"ok":true,"result":[{"name":"vm1","device":"/run/…","counters":{"received_frames":12,…}}]}
//! → {"op":"remove-port","name":"vm9"}
//! ← {"ok":false,"error":"failed to find port \"vm9\""}
//! ```
//!
//! Requests are the variants of [`ControlRequest`], named with hyphens, their fields beside
//! `op`. Answers come in the order of requests.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::unix::remove_socket;
use crate::poll::{Interest, Ready, Registrar};
use crate::{ForwardConfig, PortConfig, SwitchError};

/// Longest line that is read.
const MAX_REQUEST: usize = 64 << 10;
/// Answers that may wait for a client that does not read.
const MAX_WAITING: usize = 8 << 20;
const MAX_CLIENTS: usize = 16;
/// How long [`ControlClient`] waits for an answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

const LISTENER: u32 = 0;

/// What a switch process can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ControlRequest {
    /// Ports with what they have carried and dropped.
    Counters,
    /// Learned stations: VLAN, address, port, seconds since they were heard.
    Fdb,
    /// The configuration as it is now.
    Config,
    /// Adds a port.
    AddPort {
        /// The new port.
        port: PortConfig,
    },
    /// Removes a port; its socket disappears.
    RemovePort {
        /// Its name.
        name: String,
    },
    /// Lets a TCP port of the host lead to a guest.
    AddForward {
        /// Name of the gateway's port; not needed when there is one gateway.
        #[serde(default)]
        gateway: Option<String>,
        /// From where to where.
        forward: ForwardConfig,
    },
    /// Takes a forward back; its connections are reset.
    RemoveForward {
        /// As in `add-forward`.
        #[serde(default)]
        gateway: Option<String>,
        /// Where the host listens.
        listen: SocketAddr,
    },
    /// Ends the process.
    Shutdown,
}

/// The answer's form on the wire.
pub(super) fn answer(result: Result<Value, SwitchError>) -> Value {
    match result {
        Ok(result) => json!({ "ok": true, "result": result }),
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            json!({ "ok": false, "error": text })
        }
    }
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    is_watched_for_writing: bool,
}

/// The switch's side of the control socket.
#[derive(Debug)]
pub(super) struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
    clients: BTreeMap<u32, Client>,
    next: u32,
    registrar: Registrar,
}

impl ControlServer {
    pub(super) fn new(path: &Path, registrar: Registrar) -> Result<Self, SwitchError> {
        let bound = (|| {
            if path.exists() {
                if UnixStream::connect(path).is_ok() {
                    return Err(io::ErrorKind::AddrInUse.into());
                }
                remove_socket(path);
            }
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            registrar.add(&listener, LISTENER, Interest::Read)?;
            Ok(listener)
        })();
        let listener = bound.map_err(SwitchError::io("bind control socket", path.display()))?;
        let path = path.to_owned();
        Ok(ControlServer {
            listener,
            path,
            clients: BTreeMap::new(),
            next: LISTENER + 1,
            registrar,
        })
    }

    /// Handles a descriptor that became ready. `handle` answers one request.
    pub(super) fn ready(
        &mut self,
        token: u32,
        ready: Ready,
        mut handle: impl FnMut(ControlRequest) -> Result<Value, SwitchError>,
    ) {
        if token == LISTENER {
            self.accept();
            return;
        }
        let Some(client) = self.clients.get_mut(&token) else {
            return;
        };
        let mut result = Ok(());
        if ready.readable || ready.broken {
            result = client.read(&mut handle);
        }
        if client.write(&self.registrar, token).and(result).is_err() {
            self.clients.remove(&token);
        }
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok((stream, _)) => {
                let number = self.next;
                self.next = self.next.checked_add(1).unwrap_or(LISTENER + 1);
                let watched = stream
                    .set_nonblocking(true)
                    .and_then(|()| self.registrar.add(&stream, number, Interest::Read));
                if watched.is_ok() && self.clients.len() < MAX_CLIENTS {
                    let client = Client {
                        stream,
                        inbox: Vec::new(),
                        outbox: Vec::new(),
                        is_watched_for_writing: false,
                    };
                    self.clients.insert(number, client);
                }
            }
            Err(error) => tracing::debug!(%error, "failed to accept on the control socket"),
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        remove_socket(&self.path);
    }
}

impl Client {
    /// Reads what is there and answers whole lines; an error ends the client.
    fn read(
        &mut self,
        handle: &mut impl FnMut(ControlRequest) -> Result<Value, SwitchError>,
    ) -> io::Result<()> {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => self.inbox.extend_from_slice(&chunk[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
        while let Some(end) = self.inbox.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.inbox.drain(..=end).collect();
            let reply = match serde_json::from_slice(&line) {
                Ok(request) => answer(handle(request)),
                Err(error) => {
                    json!({ "ok": false, "error": format!("failed to read the request: {error}") })
                }
            };
            serde_json::to_writer(&mut self.outbox, &reply)?;
            self.outbox.push(b'\n');
            if self.outbox.len() > MAX_WAITING {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
        }
        if self.inbox.len() > MAX_REQUEST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }

    fn write(&mut self, registrar: &Registrar, token: u32) -> io::Result<()> {
        while !self.outbox.is_empty() {
            match self.stream.write(&self.outbox) {
                Ok(length) => drop(self.outbox.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if self.is_watched_for_writing == self.outbox.is_empty() {
            self.is_watched_for_writing = !self.outbox.is_empty();
            registrar.modify(
                &self.stream,
                token,
                Interest::of(true, self.is_watched_for_writing),
            );
        }
        Ok(())
    }
}

/// Why a switch process did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It cannot be reached, or does not answer in time.
    #[error("failed to ask the switch at \"{path}\"")]
    Io {
        /// The control socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Its answer makes no sense.
    #[error("failed to read the answer of the switch at \"{path}\"")]
    Answer {
        /// The control socket.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// It said no.
    #[error("{0}")]
    Refused(String),
}

/// Asks a switch process over its control socket; blocks for the answer.
#[derive(Debug)]
pub struct ControlClient {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connects to a control socket.
    ///
    /// # Errors
    /// [`ControlError::Io`] when nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let connected = UnixStream::connect(path).and_then(|stream| {
            stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
            stream.set_write_timeout(Some(CLIENT_TIMEOUT))?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => Ok(ControlClient {
                path: path.to_owned(),
                stream: BufReader::new(stream),
            }),
            Err(source) => Err(ControlError::Io {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Sends a request and returns the `result` of the answer.
    ///
    /// # Errors
    /// [`ControlError`] when it is refused or when the switch does not answer.
    pub fn ask(&mut self, request: &ControlRequest) -> Result<Value, ControlError> {
        #[derive(Deserialize)]
        struct Answer {
            ok: bool,
            #[serde(default)]
            result: Value,
            #[serde(default)]
            error: String,
        }
        let path = || self.path.clone();
        let failed = |source| ControlError::Answer {
            path: path(),
            source,
        };
        let mut line = serde_json::to_string(request).map_err(failed)?;
        line.push('\n');
        let mut reply = String::new();
        let exchanged = self
            .stream
            .get_mut()
            .write_all(line.as_bytes())
            .and_then(|()| {
                (&mut self.stream)
                    .take(MAX_WAITING as u64)
                    .read_line(&mut reply)
            })
            .and_then(|read| {
                if read == 0 {
                    Err(io::ErrorKind::UnexpectedEof.into())
                } else {
                    Ok(())
                }
            });
        exchanged.map_err(|source| ControlError::Io {
            path: self.path.clone(),
            source,
        })?;
        let answer: Answer =
            serde_json::from_str(&reply).map_err(|source| ControlError::Answer {
                path: self.path.clone(),
                source,
            })?;
        if answer.ok {
            Ok(answer.result)
        } else {
            Err(ControlError::Refused(answer.error))
        }
    }
}
