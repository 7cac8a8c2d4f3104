//! What a VM's process tells about itself.

use serde::{Deserialize, Serialize};

use crate::name::VmName;
use crate::snapshot::RestoreReport;

/// Where a VM is in its life. The transitions are drawn in `dunlin_vmm::lifecycle`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Built, not started.
    Created,
    /// Waiting for the rest of a guest that arrives from a peer or a file.
    Incoming,
    /// The guest runs.
    Running,
    /// The guest is stopped and can go on.
    Paused,
    /// The guest runs elsewhere now; this process only keeps the report.
    Moved,
    /// The connection broke at the hand-over: nobody here knows whether the other side runs the
    /// guest. It stays paused until somebody decides.
    InDoubt,
    /// The guest went to another host before all of its memory, and was lost there. What is here is
    /// the guest as it was at the hand-over; it stays paused until somebody decides.
    Lost,
    /// The guest powered off or was stopped.
    Stopped,
}

/// A VM at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Version of this type, [`crate::VERSION`].
    pub version: u32,
    /// Name.
    pub name: VmName,
    /// Its process.
    pub pid: u32,
    /// Version of the program that the process runs.
    #[serde(default)]
    pub program: String,
    /// State.
    pub state: VmState,
    /// Engine that runs it, `soft` or `kvm`.
    pub engine: String,
    /// Why that engine, one line.
    pub engine_reason: String,
    /// Virtual processors.
    pub cpus: u32,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Percent of its time that each processor sleeps so that a move can end; empty when none
    /// does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub throttled_percent: Vec<u8>,
    /// How the guest came back, when it came from a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<RestoreReport>,
    /// Pages of its memory that are still at the host that it came from; absent when all are here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_pages: Option<u64>,
    /// The host that it came from cannot be reached: where the guest needs one of those pages it
    /// stands still.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub waits_for_source: bool,
    /// Milliseconds since this process took the guest.
    pub uptime_ms: u64,
    /// The process of this host that the guest was handed over to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<u32>,
    /// Why the VM left `running`, when it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The exit status that the guest chose by its debug exit port, when it ended the VM so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_status: Option<u8>,
}

/// How often each kind of exit happened, since the process took the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExitCounts {
    /// IN.
    pub port_reads: u64,
    /// OUT.
    pub port_writes: u64,
    /// Loads from memory-mapped registers.
    pub mmio_reads: u64,
    /// Stores to memory-mapped registers.
    pub mmio_writes: u64,
    /// Times a processor halted and waited.
    pub halts: u64,
    /// Times a processor was interrupted by its own process.
    pub kicks: u64,
    /// Ends of level-triggered interrupts.
    pub end_of_interrupts: u64,
    /// Instructions that were interpreted, where the engine does so. Those of translated code are not
    /// counted.
    pub instructions: u64,
}

/// Exits of each processor, and what follows from two looks at them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExitReport {
    /// Per virtual processor; none while memory is still arriving from another host, for which a
    /// processor may wait without an answer.
    pub cpus: Vec<ExitCounts>,
    /// Length of the look, in milliseconds.
    pub interval_ms: u64,
    /// Interpreted instructions a second over the look, all processors.
    pub instructions_per_second: f64,
    /// Exits a second over the look, all processors.
    pub exits_per_second: f64,
    /// Pages a second that the guest and its devices dirtied over the look; absent while a
    /// migration harvests the log, and while the VM does not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_pages_per_second: Option<f64>,
}
