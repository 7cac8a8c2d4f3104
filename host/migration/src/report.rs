//! What a move took.

use serde::{Deserialize, Serialize};

use crate::protocol::message::Arrivals;

/// Everything measured in one attempt to move a guest. Times are milliseconds, sizes bytes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct MigrationReport {
    /// How it ended.
    pub outcome: Outcome,
    /// `tcp` or `unix`.
    pub transport: String,
    /// Size of the guest's RAM.
    pub ram_bytes: u64,
    /// The rounds, in order; the last one of a completed move ran while the guest was paused.
    pub rounds: Vec<RoundReport>,
    /// Switch-overs that were taken back because they would have missed the downtime limit.
    pub switch_overs_aborted: u32,
    /// Each pause of a switch-over that was taken back.
    pub aborted_pauses_ms: Vec<f64>,
    /// From the start to the end.
    pub total_ms: f64,
    /// The downtime limit that was asked for.
    pub downtime_limit_ms: f64,
    /// When the pause of the switch-over began, counted from the start.
    pub paused_at_ms: Option<f64>,
    /// From the pause until the destination's word that the guest runs had arrived.
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
    /// CPU time of the sending threads.
    pub cpu_seconds: f64,
    /// Whether the hashes of RAM were equal, when verification was asked for.
    pub verified: Option<bool>,
    /// Hash of RAM at the hand-over, in hexadecimal, when verification was asked for.
    pub ram_hash: Option<String>,
    /// Why memory could not follow the guest; absent when it could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_post_copy: Option<String>,
    /// How memory followed the guest, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<PostCopyReport>,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoundKind {
    /// It ran.
    Live,
    /// It was paused, and then moved.
    Final,
    /// It was paused, and then ran on here.
    TakenBack,
}

/// One pass over pages that the destination lacked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// When it began, counted from the start of the move.
    pub start_ms: f64,
    /// Until the destination confirmed that it has stored the round.
    pub duration_ms: f64,
    /// Bytes a second, as confirmed by the destination.
    pub goodput: f64,
    /// Pages that the guest wrote meanwhile.
    pub dirtied_pages: u64,
    /// Bytes a second that the guest dirtied meanwhile, counted in whole pages.
    pub dirty_rate: f64,
}

/// Where the time of a switch-over went, at the source. Each is a point counted from the pause.
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

/// How memory followed its guest, as both sides counted it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
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

impl PostCopyReport {
    /// What the destination has counted.
    pub(crate) fn from_arrivals(counts: &Arrivals) -> Self {
        Self {
            missing_pages: counts.missing,
            faults: counts.faults,
            fault_p50_us: counts.fault_p50_us,
            fault_p99_us: counts.fault_p99_us,
            fault_max_us: counts.fault_max_us,
            urgent_pages: counts.urgent_pages,
            prefetched_pages: counts.prefetched_pages,
            bulk_pages: counts.bulk_pages,
            duplicates: counts.duplicates,
            bytes: counts.bytes,
            recoveries: counts.recoveries,
            duration_ms: counts.duration_us as f64 / 1e3,
        }
    }
}

/// What the destination measured.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct DestinationReport {
    /// Giving every component its state.
    pub restore_ms: f64,
    /// Starting the guest.
    pub start_ms: f64,
    /// From the announcement of the pause to the start.
    pub blackout_ms: f64,
    /// CPU time of the receiving threads.
    pub cpu_seconds: f64,
}
