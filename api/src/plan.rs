//! How a move is to go, and what is expected of it before it begins.

use serde::{Deserialize, Serialize};

/// Which side has the memory when the guest changes hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveMode {
    /// Pre-copy first; post-copy when that cannot keep the downtime limit.
    #[default]
    Auto,
    /// All memory goes before the guest does.
    Pre,
    /// The guest goes as soon as it can, and its memory follows.
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

/// What a move is expected to be: the answer to [`crate::route::PREDICTION`]. Times are
/// milliseconds, sizes bytes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MovePrediction {
    /// Size of the guest's RAM.
    pub ram_bytes: u64,
    /// Bytes a second that the guest dirties, measured just now.
    pub dirty_rate: f64,
    /// Bytes that the guest keeps writing: the pages dirtied during the measurement.
    pub working_set_bytes: u64,
    /// How long was measured.
    pub measured_ms: f64,
    /// Bytes a second that are expected to arrive.
    pub goodput: f64,
    /// Where that number is from.
    pub goodput_source: GoodputSource,
    /// From the start to the end.
    pub total_ms: f64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// The guest's longest pause.
    pub blackout_ms: f64,
    /// Share of its speed that the guest is expected to lose meanwhile, from 0 to 1.
    pub slowdown: f64,
    /// Rounds of copying while the guest runs.
    pub rounds: u32,
    /// Is the downtime limit expected to hold by pre-copy?
    pub converges: bool,
    /// Is post-copy expected?
    pub post_copy: bool,
}

/// Where an expected rate is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GoodputSource {
    /// Nothing is known about the path: a cautious guess.
    #[default]
    Assumed,
    /// The limit that was asked for.
    Limit,
    /// An earlier attempt of this VM confirmed it.
    Measured,
}
