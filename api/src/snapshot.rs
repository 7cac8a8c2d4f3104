//! Guests in files: what such a file holds, how one is made, how its guest comes back.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
