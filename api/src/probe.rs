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
    /// Every CPU baseline under every engine.
    #[serde(default)]
    pub baselines: Vec<ProbeBaseline>,
}

/// Whether an engine can give a CPU baseline on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeBaseline {
    /// Name of the baseline.
    pub name: String,
    /// Name of the engine.
    pub engine: String,
    /// Can it?
    pub usable: bool,
    /// Names of the features that the engine lacks here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// Why the engine cannot be had at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
