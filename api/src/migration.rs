//! Asking for a move, and following it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::ApiError;
use crate::plan::{Compression, MoveMode};
use crate::security::Security;

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
    /// Compare hashes of all memory on both sides.
    #[serde(default)]
    pub verify: Verify,
    /// Pre-copy, post-copy, or what fits.
    #[serde(default)]
    pub mode: MoveMode,
    /// Connections that carry pages; as many as gain something when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub streams: Option<u16>,
    /// Whether pages are compressed.
    #[serde(default)]
    pub compression: Compression,
    /// Time for the whole move, in milliseconds; without end when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Silence of the other side after which it counts as lost, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_timeout_ms: Option<u64>,
    /// Time for a new connection after that of a guest whose memory follows it broke, in
    /// milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reconnect_window_ms: Option<u64>,
    /// What protects the connections.
    #[serde(default, skip_serializing_if = "Security::is_automatic")]
    pub security: Security,
}

/// Whether and when both sides compare a hash of all RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// Checksums of the stream alone.
    #[default]
    Off,
    /// After the hand-over; costs no pause.
    After,
    /// During the pause, before the guest changes hands; the pause grows with RAM.
    Before,
}

fn default_downtime() -> u64 {
    DEFAULT_DOWNTIME_MS
}

/// How a move ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs at the source; the move failed.
    #[default]
    Failed,
    /// The guest runs at the destination.
    Moved,
    /// The guest runs at the source; what remained never fitted the downtime limit.
    DidNotConverge,
    /// The guest runs at the source; the move was cancelled.
    Cancelled,
    /// The guest is paused at the source; it may run at the destination.
    InDoubt,
    /// The guest went to the destination, which cannot get the rest of its memory.
    Lost,
}

/// Was the guest running during a round?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoundKind {
    /// It ran.
    #[default]
    Live,
    /// It was paused, and then moved.
    Final,
    /// It was paused, and then ran on here.
    TakenBack,
}

/// One pass over pages that the destination lacked.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RoundReport {
    /// Number of the round, from 0.
    pub round: u32,
    /// Was the guest running?
    pub kind: RoundKind,
    /// Pages sent with their content.
    pub pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Pages that were written with what the destination had already.
    pub same_pages: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// When it began, counted from the start of the move, in milliseconds.
    pub start_ms: f64,
    /// Until the destination confirmed that it has stored the round, in milliseconds.
    pub duration_ms: f64,
    /// Bytes a second, as confirmed by the destination.
    pub goodput: f64,
    /// Pages that the guest wrote meanwhile.
    pub dirtied_pages: u64,
    /// Bytes a second that the guest dirtied meanwhile, counted in whole pages.
    pub dirty_rate: f64,
}

/// Where the time of a switch-over went at the source, in milliseconds from the pause.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct SwitchOverReport {
    /// vCPUs and devices had stopped.
    pub stopped_ms: f64,
    /// States were saved and the last pages known.
    pub saved_ms: f64,
    /// The last byte was handed to the kernel.
    pub sent_ms: f64,
    /// The destination had restored everything.
    pub prepared_ms: f64,
    /// The destination's word that the guest runs had arrived.
    pub running_ms: f64,
    /// Bytes of states.
    pub state_bytes: u64,
}

/// What the destination measured.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct DestinationReport {
    /// Giving every component its state, in milliseconds.
    pub restore_ms: f64,
    /// Starting the guest, in milliseconds.
    pub start_ms: f64,
    /// From the announcement of the pause to the start, in milliseconds.
    pub blackout_ms: f64,
    /// Processor time of the receiving thread, in seconds.
    pub cpu_seconds: f64,
}

/// Everything measured in one attempt to move a guest: what `dunlin_migration` reports.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationReport {
    /// How it ended.
    pub outcome: Outcome,
    /// `tcp`, `tls` or `unix`.
    pub transport: String,
    /// Bytes of the guest's RAM.
    pub ram_bytes: u64,
    /// The rounds, in order; the last one of a completed move ran while the guest was paused.
    pub rounds: Vec<RoundReport>,
    /// Switch-overs that were taken back because they would have missed the downtime limit.
    pub switch_overs_aborted: u32,
    /// Each pause of a switch-over that was taken back, in milliseconds.
    pub aborted_pauses_ms: Vec<f64>,
    /// From the start to the end, in milliseconds.
    pub total_ms: f64,
    /// The downtime limit that was asked for, in milliseconds.
    pub downtime_limit_ms: f64,
    /// When the pause of the switch-over began, in milliseconds from the start.
    pub paused_at_ms: Option<f64>,
    /// From the pause until the destination's word that the guest runs, in milliseconds.
    pub blackout_ms: Option<f64>,
    /// The parts of the blackout.
    pub switch_over: Option<SwitchOverReport>,
    /// What the destination measured.
    pub destination: Option<DestinationReport>,
    /// All bytes written to the connection.
    pub bytes_sent: u64,
    /// Pages sent with their content; a page sent in two rounds counts twice.
    pub pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Pages that were written with what the destination had already.
    pub same_pages: u64,
    /// Page lanes in use.
    pub streams: u16,
    /// Processor time of the sending threads, in seconds.
    pub cpu_seconds: f64,
    /// Whether the hashes of RAM were equal, when verification was asked for.
    pub verified: Option<bool>,
    /// Hash of RAM at the hand-over, in hexadecimal, when verification was asked for.
    pub ram_hash: Option<String>,
    /// Why memory could not follow the guest; absent when it could.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_post_copy: Option<String>,
    /// How memory followed the guest, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<PostCopyReport>,
}

/// How memory followed its guest.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PostCopyReport {
    /// Pages that were missing when the guest changed hands.
    pub missing_pages: u64,
    /// Pages that something waited for.
    pub faults: u64,
    /// Half of them came within so many microseconds.
    pub fault_p50_us: u64,
    /// 99 of 100 did.
    pub fault_p99_us: u64,
    /// All did.
    pub fault_max_us: u64,
    /// Pages that came because something waited for them.
    pub urgent_pages: u64,
    /// Pages that came ahead of their turn, since a neighbour was waited for.
    pub prefetched_pages: u64,
    /// All other pages.
    pub bulk_pages: u64,
    /// Pages that came although they were there.
    pub duplicates: u64,
    /// Bytes of the messages that brought pages.
    pub bytes: u64,
    /// Times at which broken connections were made anew.
    pub recoveries: u32,
    /// From the start of the guest until every page was there, in milliseconds.
    pub duration_ms: f64,
}

/// Where a move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// There was none.
    None,
    /// Reaching the destination, which builds the machine.
    Connecting,
    /// Rounds while the guest runs.
    Copying,
    /// The guest is paused and the rest goes over.
    SwitchingOver,
    /// The guest was given away; the destination has not said yet that it runs.
    HandingOver,
    /// The guest runs at the destination, and the rest of its memory follows. It can no longer be
    /// cancelled.
    Following,
    /// The destination runs the guest.
    Done,
    /// It failed, and the guest goes on here.
    Failed,
    /// It was cancelled, and the guest goes on here.
    Cancelled,
    /// It broke at the hand-over and nobody knows who owns the guest.
    InDoubt,
    /// The guest went to the destination, which cannot get the rest of its memory.
    Lost,
}

/// Progress of the current move, or the result of the last one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Phase.
    pub phase: MigrationPhase,
    /// Round now, from 0.
    pub round: u32,
    /// Pages in this round.
    pub pages_total: u64,
    /// Pages done in this round.
    pub pages_done: u64,
    /// Bytes sent so far.
    pub bytes_sent: u64,
    /// The report, once over.
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
            pages_total: 0,
            pages_done: 0,
            bytes_sent: 0,
            report: None,
            error: None,
        }
    }

    /// Is nothing under way?
    pub fn is_over(&self) -> bool {
        !matches!(
            self.phase,
            MigrationPhase::Connecting
                | MigrationPhase::Copying
                | MigrationPhase::SwitchingOver
                | MigrationPhase::HandingOver
                | MigrationPhase::Following
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
