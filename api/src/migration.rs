//! Asking for a move, and following it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::ApiError;

/// Longest pause of the guest at the hand-over, unless asked otherwise.
pub const DEFAULT_DOWNTIME_MS: u64 = 50;

/// Where a move goes, or where a guest is awaited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Endpoint {
    /// TCP, `tcp://127.0.0.3:7000`.
    Tcp(SocketAddr),
    /// A unix stream socket, `unix:/run/x.sock`.
    Unix(PathBuf),
}

/// A text that is no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{text}\" is no address: write tcp://ADDRESS:PORT, such as tcp://127.0.0.3:7000, or unix:PATH"
)]
pub struct EndpointError {
    /// What was given.
    pub text: String,
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let bad = || EndpointError {
            text: text.to_owned(),
        };
        if let Some(address) = text.strip_prefix("tcp://") {
            return address.parse().map(Self::Tcp).ok().ok_or_else(bad);
        }
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(bad()),
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;

    fn try_from(text: String) -> Result<Self, EndpointError> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> String {
        endpoint.to_string()
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A request to move the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Where to.
    pub to: Endpoint,
    /// Longest pause of the guest, in milliseconds.
    #[serde(default = "default_downtime")]
    pub downtime_ms: u64,
    /// Most bytes a second to send; as many as go when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// Most rounds of copying while the guest runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rounds: Option<u32>,
    /// Compare a hash of all memory at the hand-over (this lengthens the pause).
    #[serde(default)]
    pub verify: bool,
}

fn default_downtime() -> u64 {
    DEFAULT_DOWNTIME_MS
}

/// A request to save the guest to a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveRequest {
    /// The file, which must not exist yet; on the host of the VM's process.
    pub to: PathBuf,
}

/// One round of copying.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RoundReport {
    /// Pages sent with their bytes.
    pub pages: u64,
    /// Pages sent as "all zero".
    pub zero_pages: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Milliseconds that it took.
    pub duration_ms: f64,
    /// Pages dirtied while it ran.
    pub dirtied_pages: u64,
    /// Bytes a second.
    pub bytes_per_second: f64,
}

/// What a finished move was.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Where it went.
    pub to: String,
    /// Rounds, the one at the hand-over last.
    pub rounds: Vec<RoundReport>,
    /// From the request to the confirmation of the destination, in milliseconds.
    pub total_ms: f64,
    /// From the guest's last instruction here to its first there, as far as both sides can tell.
    pub downtime_ms: f64,
    /// The limit that was asked for.
    pub downtime_limit_ms: u64,
    /// Bytes sent, all of them.
    pub bytes_sent: u64,
    /// RAM of the guest.
    pub ram_bytes: u64,
    /// Did a hash of all memory match on both sides? Absent when not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_verified: Option<bool>,
    /// Processor seconds that this process spent meanwhile, the guest's included.
    pub cpu_seconds: f64,
}

/// Where a move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// There was none.
    None,
    /// Rounds while the guest runs.
    Copying,
    /// The guest is paused and the rest goes over.
    HandingOver,
    /// The destination runs the guest.
    Done,
    /// It failed, and the guest goes on here.
    Failed,
    /// It was cancelled, and the guest goes on here.
    Cancelled,
    /// It broke at the hand-over and nobody knows who owns the guest.
    InDoubt,
}

/// Progress of the current move, or the result of the last one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Phase.
    pub phase: MigrationPhase,
    /// Round now, from 1.
    pub round: u32,
    /// Pages of RAM.
    pub total_pages: u64,
    /// Pages that this round still has to send.
    pub remaining_pages: u64,
    /// Bytes sent so far.
    pub bytes_sent: u64,
    /// Bytes a second, lately.
    pub bytes_per_second: f64,
    /// The report, once done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<MigrationReport>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
}

impl MigrationStatus {
    /// No move yet.
    pub fn none() -> Self {
        Self {
            phase: MigrationPhase::None,
            round: 0,
            total_pages: 0,
            remaining_pages: 0,
            bytes_sent: 0,
            bytes_per_second: 0.0,
            report: None,
            error: None,
        }
    }

    /// Is nothing under way?
    pub fn is_over(&self) -> bool {
        !matches!(
            self.phase,
            MigrationPhase::Copying | MigrationPhase::HandingOver
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_and_written() {
        for text in ["tcp://127.0.0.3:7000", "unix:/run/x.sock", "tcp://[::1]:80"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        for text in ["", "tcp://", "tcp://localhost", "unix:", "127.0.0.1:80"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_request_needs_only_its_target() {
        let request: MigrateRequest =
            serde_json::from_str(r#"{"to":"tcp://127.0.0.1:1"}"#).unwrap();
        assert_eq!(request.downtime_ms, DEFAULT_DOWNTIME_MS);
        assert!(serde_json::from_str::<MigrateRequest>(r#"{"to":"x"}"#).is_err());
    }
}
