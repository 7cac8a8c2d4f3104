//! What a saved file holds.

use serde::{Deserialize, Serialize};

use crate::config::VmConfig;

/// What a saved file says about its guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
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
