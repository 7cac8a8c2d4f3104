//! What a move may be told.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::uffd::Userfaultfd;

/// How a guest is moved. All limits have working defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationOptions {
    /// The longest pause that the guest may see. It is kept: a switch-over that would take
    /// longer is taken back and tried again.
    pub downtime_limit: Duration,
    /// Rounds of copying, at most.
    pub max_rounds: u32,
    /// Switch-overs that may be taken back before the move counts as not converging.
    pub max_switch_overs: u32,
    /// What happens when what remains never fits the downtime limit.
    pub on_no_convergence: NoConvergence,
    /// Bytes a second that the source sends at most.
    pub bandwidth_limit: Option<u64>,
    /// Whether both sides hash RAM and compare.
    pub verification: Verification,
    /// Time to reach the destination, and for it to build the machine.
    pub connect_timeout: Duration,
    /// Silence after which the peer counts as lost.
    pub idle_timeout: Duration,
    /// How long the source asks who owns the guest when the hand-over was left open.
    pub inquiry_timeout: Duration,
    /// Whether memory goes before the guest, behind it, or as the measurements suggest.
    pub mode: Mode,
    /// Page lanes: so many, or, when absent, as many as measured goodput pays for.
    pub streams: Option<u16>,
    /// Whether pages are compressed.
    pub compression: Compression,
    /// Time for the whole move, after which the guest stays where it is; none when absent.
    pub timeout: Option<Duration>,
    /// How long both sides of a post-copy wait for a new connection after theirs broke.
    pub reconnect_window: Duration,
}

impl Default for MigrationOptions {
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(50),
            max_rounds: 40,
            max_switch_overs: 16,
            on_no_convergence: NoConvergence::KeepRunning,
            bandwidth_limit: None,
            verification: Verification::Off,
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(10),
            inquiry_timeout: Duration::from_secs(30),
            mode: Mode::Auto,
            streams: None,
            compression: Compression::Auto,
            timeout: None,
            reconnect_window: Duration::from_secs(300),
        }
    }
}

/// Which side has the memory when the guest changes hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Pre-copy first; post-copy when that cannot keep the downtime limit.
    #[default]
    Auto,
    /// All memory goes before the guest does.
    Pre,
    /// The guest goes after one round, and the rest of its memory follows.
    Post,
}

/// Whether pages are made smaller on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Where it has been measured to gain time.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always, by LZ4.
    Lz4,
}

/// What to do with a guest that writes faster than can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoConvergence {
    /// It stays where it is, and runs on.
    #[default]
    KeepRunning,
    /// It is moved all the same, with a longer pause.
    Force,
}

/// Whether and when both sides compare a hash of all RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verification {
    /// Checksums of the stream alone.
    #[default]
    Off,
    /// After the hand-over the source hashes its frozen RAM, the destination tells the hash of
    /// what it stored. Costs no downtime; a difference is found, but cannot be undone.
    AfterHandOver,
    /// Both hash during the pause and compare before the guest changes hands; a difference
    /// keeps it at the source. The pause grows with RAM, and the limit does not count that.
    BeforeHandOver,
}

/// How a destination waits for a guest.
#[derive(Debug, Clone)]
pub struct DestinationOptions {
    /// The most RAM that a guest may bring.
    pub max_ram: u64,
    /// Silence after which the source counts as lost.
    pub idle_timeout: Duration,
    /// Time for a new connection to say what it is for.
    pub preamble_timeout: Duration,
    /// Page lanes that one session may have.
    pub max_lanes: u16,
    /// How long a guest that lacks memory waits for a new connection after its own broke.
    pub reconnect_window: Duration,
    /// Serves faults of guest memory, so that it can follow its guest; or why that cannot be.
    pub faults: Result<Arc<Userfaultfd>, String>,
    /// Ends the wait from another thread.
    pub cancel: CancelToken,
}

impl Default for DestinationOptions {
    fn default() -> Self {
        Self {
            max_ram: dunlin_guest::layout::MAX_RAM,
            idle_timeout: Duration::from_secs(10),
            preamble_timeout: Duration::from_secs(3),
            max_lanes: 16,
            reconnect_window: Duration::from_secs(300),
            faults: Err("faults of guest memory are not served here".to_owned()),
            cancel: CancelToken::default(),
        }
    }
}

/// Cancels a move from another thread. Clones cancel the same move.
///
/// A source heeds it until it has given the guest away; after that the move completes.
#[derive(Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that nobody has used.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Was it cancelled?
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CancelToken({})", self.is_cancelled())
    }
}

/// How far a move has come; given to the progress callback now and then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is going on.
    pub step: Step,
    /// Number of the round, from 0.
    pub round: u32,
    /// Pages done in this round.
    pub pages_done: u64,
    /// Pages in this round.
    pub pages_total: u64,
    /// Bytes sent since the beginning.
    pub bytes_sent: u64,
}

/// What a move is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Reaching the destination, which builds the machine.
    Connecting,
    /// The guest runs here, and its memory is copied.
    Copying,
    /// The guest is paused.
    SwitchingOver,
    /// The guest was given away; the destination has not said yet that it runs.
    HandingOver,
    /// The guest runs at the destination, and the rest of its memory follows.
    Following,
}
