//! What a host offers to guests.

use serde::{Deserialize, Serialize};

/// One thing that a host has or lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeItem {
    /// What was looked at, e.g. `processor`, `kvm`, `tap`.
    pub name: String,
    /// Is it usable?
    pub usable: bool,
    /// What was found, and when unusable what to do about it.
    pub detail: String,
}

/// What a host offers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ProbeReport {
    /// The engine that `--engine auto` takes.
    pub engine: String,
    /// Why.
    pub engine_reason: String,
    /// All that was looked at.
    pub items: Vec<ProbeItem>,
}
