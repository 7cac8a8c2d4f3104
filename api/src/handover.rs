//! Asking for a hand-over: another process of the same host goes on with the guest.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::migration::{DEFAULT_DOWNTIME_MS, DestinationReport, Outcome, SwitchOverReport};

/// A request to hand the guest to another process of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandOverRequest {
    /// The unix socket on which that process waits, as it said.
    pub to: PathBuf,
    /// Its process id, for messages.
    pub pid: u32,
    /// Longest pause of the guest, in milliseconds. One that would take longer is taken back, and
    /// tried again a few times.
    #[serde(default = "default_downtime")]
    pub downtime_ms: u64,
}

fn default_downtime() -> u64 {
    DEFAULT_DOWNTIME_MS
}

/// Everything measured in one hand-over: what `dunlin_migration` reports.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HandOverReport {
    /// How it ended.
    pub outcome: Outcome,
    /// Bytes of the guest's RAM, of which nothing was copied.
    pub ram_bytes: u64,
    /// The descriptors that the new process goes on with.
    pub descriptors: Vec<String>,
    /// From the start until the new process had built the machine, in milliseconds.
    pub built_ms: f64,
    /// Each pause that was taken back because it would have been too long, in milliseconds.
    pub aborted_pauses_ms: Vec<f64>,
    /// When the last pause began, in milliseconds from the start.
    pub paused_at_ms: Option<f64>,
    /// From the pause until the new process's word that the guest runs, in milliseconds.
    pub blackout_ms: Option<f64>,
    /// The parts of the blackout.
    pub switch_over: Option<SwitchOverReport>,
    /// What the new process measured.
    pub destination: Option<DestinationReport>,
    /// From the start to the end, in milliseconds.
    pub total_ms: f64,
}
