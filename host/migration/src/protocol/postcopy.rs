//! The control messages of a post-copy; see [`crate::postcopy`].

use super::message::Running;

/// Pages that the destination lacks although its guest runs, or is about to.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Missing {
    /// How many pages those are.
    #[prost(uint64, tag = "1")]
    pub count: u64,
    /// Their bitmap, as one LZ4 block when `packed`.
    #[prost(bytes = "vec", tag = "2")]
    pub bitmap: Vec<u8>,
    /// Is the bitmap packed?
    #[prost(bool, tag = "3")]
    pub packed: bool,
    /// Number of the switch-over; 0 in an answer to `Resume`.
    #[prost(uint32, tag = "4")]
    pub attempt: u32,
    /// Number of the set of connections that the pages come over.
    #[prost(uint32, tag = "5")]
    pub generation: u32,
    /// Bulk lanes in it.
    #[prost(uint32, tag = "6")]
    pub bulk_lanes: u32,
}

/// Pages that the destination's guest waits for.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Wanted {
    /// Which.
    #[prost(uint64, repeated, tag = "1")]
    pub pages: Vec<u64>,
}

/// A post-copy goes on over new connections, of which this is the first.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Resume {
    /// The destination process that the guest was offered to.
    #[prost(bytes = "vec", tag = "1")]
    pub incarnation: Vec<u8>,
    /// Number of the set of connections; greater than any before.
    #[prost(uint32, tag = "2")]
    pub generation: u32,
    /// Bulk lanes in it.
    #[prost(uint32, tag = "3")]
    pub bulk_lanes: u32,
}

/// The post-copy cannot go on: its guest is not here, or no longer.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Gone {
    /// Why.
    #[prost(string, tag = "1")]
    pub reason: String,
}

/// Every page is there.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Complete {
    /// As `Running` said or would have said.
    #[prost(message, optional, tag = "1")]
    pub running: Option<Running>,
    /// What was counted.
    #[prost(message, optional, tag = "2")]
    pub counts: Option<Arrivals>,
    /// Hash of what was stored, when verification was asked for.
    #[prost(uint64, optional, tag = "3")]
    pub hash: Option<u64>,
}

/// What the destination of a post-copy has counted.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Arrivals {
    /// Pages that were missing when the guest came.
    #[prost(uint64, tag = "1")]
    pub missing: u64,
    /// Pages that something waited for.
    #[prost(uint64, tag = "2")]
    pub faults: u64,
    /// Pages that came on the urgent lane.
    #[prost(uint64, tag = "3")]
    pub urgent_pages: u64,
    /// Pages that came ahead of their turn, since a neighbour was waited for.
    #[prost(uint64, tag = "4")]
    pub prefetched_pages: u64,
    /// All other pages.
    #[prost(uint64, tag = "5")]
    pub bulk_pages: u64,
    /// Pages that came although they were there.
    #[prost(uint64, tag = "6")]
    pub duplicates: u64,
    /// Bytes of the messages that brought pages.
    #[prost(uint64, tag = "7")]
    pub bytes: u64,
    /// Times at which the connections were made anew.
    #[prost(uint32, tag = "8")]
    pub recoveries: u32,
    /// Half of the faults were served within so many microseconds.
    #[prost(uint64, tag = "9")]
    pub fault_p50_us: u64,
    /// 99 of 100 were.
    #[prost(uint64, tag = "10")]
    pub fault_p99_us: u64,
    /// All were.
    #[prost(uint64, tag = "11")]
    pub fault_max_us: u64,
    /// From the start of the guest until every page was there, in microseconds.
    #[prost(uint64, tag = "12")]
    pub duration_us: u64,
}

/// The destination's guest has ended, and needs no more memory.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ended {
    /// Why.
    #[prost(string, tag = "1")]
    pub reason: String,
}
