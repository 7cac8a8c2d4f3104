//! Guests in files: what such a file holds, how one is made, how its guest comes back.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ApiError;
use crate::config::VmConfig;

/// What a saved file says about its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Version of the file's format.
    pub format_version: u16,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The guest's configuration.
    pub config: VmConfig,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Components with a state in the file: name, kind, bytes.
    pub components: Vec<SnapshotComponent>,
}

/// One component's state in a saved file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotComponent {
    /// Name within the machine.
    pub name: String,
    /// Kind of component.
    pub kind: String,
    /// Schema version.
    pub version: u32,
    /// Bytes of state.
    pub bytes: u64,
}

/// A request to save the guest to a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveRequest {
    /// The file, which must not exist yet; on the host of the VM's process.
    pub to: PathBuf,
    /// The guest runs on: it stops for a moment, and the file holds that moment.
    #[serde(default)]
    pub live: bool,
    /// Save a guest that runs on although it writes to disks, which are not in the file.
    #[serde(default)]
    pub without_disks: bool,
}

/// When the pages of a saved guest are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reading {
    /// Behind the running guest, where the host permits that.
    #[default]
    Lazy,
    /// Before it runs.
    Eager,
}

/// How a guest came back from a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// When its pages are read.
    pub reading: Reading,
    /// Why they were read before it ran although that was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_eager: Option<String>,
    /// From the beginning until the guest ran, in milliseconds, without a wait for somebody who
    /// watches it; absent until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_ms: Option<f64>,
    /// Pages that have not been read yet.
    pub pages_missing: u64,
}

/// What a save took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SaveReport {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of the guest's RAM.
    pub ram_bytes: u64,
    /// Pages with content.
    pub pages: u64,
    /// Pages of zeros, which take no room.
    pub zero_pages: u64,
    /// From the beginning until the file was on disk, in milliseconds.
    pub total_ms: f64,
    /// Hash of RAM, in hexadecimal.
    pub ram_hash: String,
    /// How long a guest that ran on was stopped, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<f64>,
    /// How often something of a guest that ran on waited for a copy before it could write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writers_held: Option<u64>,
}

/// Where a save of a running guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SavePhase {
    /// There was none.
    #[default]
    None,
    /// The guest runs, and its memory is written.
    Writing,
    /// The file is whole and on disk.
    Done,
    /// It failed; there is no file.
    Failed,
    /// It was cancelled; there is no file.
    Cancelled,
}

/// Progress of the current save of a running guest, or the result of the last one.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct SaveStatus {
    /// Phase.
    pub phase: SavePhase,
    /// Pages that are safe from the guest.
    pub pages_done: u64,
    /// Pages of RAM.
    pub pages_total: u64,
    /// Bytes written so far.
    pub bytes: u64,
    /// The report, once done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<SaveReport>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
}
