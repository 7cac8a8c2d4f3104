//! The control messages: all frames but those of pages.

use dunlin_guest::SavedState;
use prost::Message as _;

pub use super::postcopy::{Arrivals, Complete, Ended, Gone, Missing, Resume, Wanted};
use super::{Kind, ProtocolError};
use crate::transport::{PeerProcess, ProcessIdentity};

/// One contiguous range of RAM, as [`dunlin_guest::RamRegion`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Region {
    /// First guest physical address.
    #[prost(uint64, tag = "1")]
    pub start: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub size: u64,
    /// RAM offset of the first byte.
    #[prost(uint64, tag = "3")]
    pub offset: u64,
}

/// What the destination must build.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Configuration {
    /// The machine's own description, opaque here.
    #[prost(bytes = "vec", tag = "1")]
    pub machine: Vec<u8>,
    /// Bytes of RAM.
    #[prost(uint64, tag = "2")]
    pub ram_bytes: u64,
    /// Where RAM lies.
    #[prost(message, repeated, tag = "3")]
    pub regions: Vec<Region>,
    /// 0: no hashes; 1: compared after the hand-over; 2: compared before it.
    #[prost(uint32, tag = "4")]
    pub verification: u32,
    /// Page lanes that the source would open, at most.
    #[prost(uint32, tag = "5")]
    pub lanes: u32,
}

/// The machine is built and empty.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ready {
    /// Names the destination process: 16 bytes, new at each start.
    #[prost(bytes = "vec", tag = "1")]
    pub incarnation: Vec<u8>,
    /// Page lanes that it takes.
    #[prost(uint32, tag = "2")]
    pub lanes: u32,
    /// Why pages cannot arrive behind the running guest; absent when they can.
    #[prost(string, optional, tag = "3")]
    pub no_post_copy: Option<String>,
    /// The destination's process, by which a source on the same host knows whether it lives.
    #[prost(message, optional, tag = "4")]
    pub process: Option<Process>,
}

/// A process among all that run on any host.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Process {
    /// Its kernel's run: `boot_id`.
    #[prost(string, tag = "1")]
    pub boot: String,
    /// Inode of its namespace of process ids.
    #[prost(uint64, tag = "2")]
    pub namespace: u64,
    /// Its id in there.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    /// When it began, in clock ticks since the kernel did.
    #[prost(uint64, tag = "4")]
    pub started: u64,
}

impl Process {
    /// This process, where that can be told.
    pub(crate) fn own() -> Option<Self> {
        let ProcessIdentity {
            boot,
            namespace,
            pid,
            started,
        } = ProcessIdentity::own()?;
        Some(Self {
            boot,
            namespace,
            pid,
            started,
        })
    }

    /// Holds the process, if it runs on this host.
    pub(crate) fn find(self) -> Option<PeerProcess> {
        PeerProcess::identified(&ProcessIdentity {
            boot: self.boot,
            namespace: self.namespace,
            pid: self.pid,
            started: self.started,
        })
    }
}

/// The page lanes are open.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Lanes {
    /// How many: numbers 0 to one less.
    #[prost(uint32, tag = "1")]
    pub count: u32,
}

/// A round begins.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RoundBegin {
    /// Number of the round, from 0.
    #[prost(uint32, tag = "1")]
    pub round: u32,
    /// Pages that will come in it.
    #[prost(uint64, tag = "2")]
    pub pages: u64,
}

/// A round was sent, as a whole or as far as its deadline allowed.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RoundEnd {
    /// Number of the round.
    #[prost(uint32, tag = "1")]
    pub round: u32,
    /// Pages with content.
    #[prost(uint64, tag = "2")]
    pub pages: u64,
    /// Pages of zeros.
    #[prost(uint64, tag = "3")]
    pub zero_pages: u64,
    /// Pages that the destination has already as they are.
    #[prost(uint64, tag = "4")]
    pub same_pages: u64,
    /// Lanes that took part, from number 0 on; zero in a file.
    #[prost(uint32, tag = "5")]
    pub lanes: u32,
}

/// What the destination has in its RAM.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Stored {
    /// Number of the round.
    #[prost(uint32, tag = "1")]
    pub round: u32,
    /// Pages with content stored in this round.
    #[prost(uint64, tag = "2")]
    pub pages: u64,
    /// Pages of zeros stored in this round.
    #[prost(uint64, tag = "3")]
    pub zero_pages: u64,
    /// Is the round complete?
    #[prost(bool, tag = "4")]
    pub complete: bool,
    /// Pages of this round that were there already.
    #[prost(uint64, tag = "5")]
    pub same_pages: u64,
    /// Pages with content that have come since the session began.
    #[prost(uint64, tag = "6")]
    pub all_content_pages: u64,
}

/// Names one switch-over: `SwitchOver`, `Back` and `Commit`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Attempt {
    /// Number of the switch-over, from 1.
    #[prost(uint32, tag = "1")]
    pub attempt: u32,
}

/// Everything but RAM.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct States {
    /// Number of the switch-over.
    #[prost(uint32, tag = "1")]
    pub attempt: u32,
    /// The states.
    #[prost(message, repeated, tag = "2")]
    pub states: Vec<SavedState>,
    /// Does the destination hash its RAM before it answers?
    #[prost(bool, tag = "3")]
    pub hash_wanted: bool,
}

/// The guest could run at the destination.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Prepared {
    /// Number of the switch-over.
    #[prost(uint32, tag = "1")]
    pub attempt: u32,
    /// Microseconds that restoring took.
    #[prost(uint64, tag = "2")]
    pub restore_us: u64,
    /// Hash of RAM before restoring, when it was wanted.
    #[prost(uint64, optional, tag = "3")]
    pub hash: Option<u64>,
    /// Pages that restoring wrote, by index. When the switch-over is taken back, the source sends
    /// them again.
    #[prost(uint64, repeated, tag = "4")]
    pub changed_pages: Vec<u64>,
}

/// The guest runs at the destination.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Running {
    /// Microseconds that restoring took.
    #[prost(uint64, tag = "1")]
    pub restore_us: u64,
    /// Microseconds that starting took.
    #[prost(uint64, tag = "2")]
    pub start_us: u64,
    /// Microseconds from `SwitchOver` to the start, by the destination's clock.
    #[prost(uint64, tag = "3")]
    pub blackout_us: u64,
    /// Microseconds of CPU time that the receiving thread took.
    #[prost(uint64, tag = "4")]
    pub cpu_us: u64,
    /// Hash of what was stored, when verification was asked for.
    #[prost(uint64, optional, tag = "5")]
    pub hash: Option<u64>,
}

/// The session is over.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Abort {
    /// Why.
    #[prost(string, tag = "1")]
    pub reason: String,
}

/// Nothing but a sign of life.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct KeepAlive {
    /// Non-zero: send it back with zero and the same number.
    #[prost(uint32, tag = "1")]
    pub echo: u32,
    /// Tells one from another.
    #[prost(uint64, tag = "2")]
    pub number: u64,
}

/// Who owns the guest of the connection's session?
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WhoOwns {
    /// The destination process that the guest was offered to.
    #[prost(bytes = "vec", tag = "1")]
    pub incarnation: Vec<u8>,
}

/// The answer to [`WhoOwns`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Answer {
    /// Not said: never valid.
    Unsaid = 0,
    /// The guest runs here.
    Running = 1,
    /// The guest is owned here and about to start: ask again.
    Starting = 2,
    /// The guest does not run here and never will: a promise.
    Relinquished = 3,
    /// Another process than the one that the guest was offered to.
    Unknown = 4,
}

/// Who owns the guest.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ownership {
    /// The answer.
    #[prost(enumeration = "Answer", tag = "1")]
    pub answer: i32,
    /// As `Running` said or would have said.
    #[prost(message, optional, tag = "2")]
    pub running: Option<Running>,
}

/// One component in a saved guest.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Component {
    /// As in its saved state.
    #[prost(string, tag = "1")]
    pub name: String,
    /// As in its saved state.
    #[prost(string, tag = "2")]
    pub kind: String,
    /// As in its saved state.
    #[prost(uint32, tag = "3")]
    pub version: u32,
    /// Bytes of its body.
    #[prost(uint64, tag = "4")]
    pub bytes: u64,
}

/// What can be known of a saved guest without reading it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FileHeader {
    /// Seconds since 1970.
    #[prost(uint64, tag = "1")]
    pub created: u64,
    /// Bytes of RAM.
    #[prost(uint64, tag = "2")]
    pub ram_bytes: u64,
    /// Its components.
    #[prost(message, repeated, tag = "3")]
    pub components: Vec<Component>,
}

/// The end of a file.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct End {
    /// Frames before this one.
    #[prost(uint64, tag = "1")]
    pub frames: u64,
    /// Hash of RAM.
    #[prost(uint64, tag = "2")]
    pub hash: u64,
    /// Pages with content; not said by version 1 of the format.
    #[prost(uint64, tag = "3")]
    pub pages: u64,
}

/// What the machine is built around, in a hand-over: descriptors come with this message's bytes.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Descriptors {
    /// What each is, in the order of the descriptors.
    #[prost(string, repeated, tag = "1")]
    pub names: Vec<String>,
}

/// What a machine that was handed over can have while its guest runs.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Leftovers {
    /// The machine's own, opaque here.
    #[prost(bytes = "vec", tag = "1")]
    pub body: Vec<u8>,
    /// Names of descriptors that come with this message's bytes.
    #[prost(string, repeated, tag = "2")]
    pub names: Vec<String>,
}

/// A control message, decoded.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each variant is the body of the same name")]
pub enum Message {
    Configuration(Configuration),
    Ready(Ready),
    RoundBegin(RoundBegin),
    RoundEnd(RoundEnd),
    Stored(Stored),
    SwitchOver(Attempt),
    States(States),
    Prepared(Prepared),
    Back(Attempt),
    Commit(Attempt),
    Running(Running),
    Settled,
    Abort(Abort),
    KeepAlive(KeepAlive),
    WhoOwns(WhoOwns),
    Ownership(Ownership),
    FileHeader(FileHeader),
    End(End),
    Lanes(Lanes),
    Descriptors(Descriptors),
    Leftovers(Leftovers),
    Missing(Missing),
    Wanted(Wanted),
    Resume(Resume),
    Gone(Gone),
    Complete(Complete),
    Ended(Ended),
}

impl Message {
    /// The kind of frame that carries it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Configuration(_) => Kind::Configuration,
            Self::Ready(_) => Kind::Ready,
            Self::RoundBegin(_) => Kind::RoundBegin,
            Self::RoundEnd(_) => Kind::RoundEnd,
            Self::Stored(_) => Kind::Stored,
            Self::SwitchOver(_) => Kind::SwitchOver,
            Self::States(_) => Kind::States,
            Self::Prepared(_) => Kind::Prepared,
            Self::Back(_) => Kind::Back,
            Self::Commit(_) => Kind::Commit,
            Self::Running(_) => Kind::Running,
            Self::Settled => Kind::Settled,
            Self::Abort(_) => Kind::Abort,
            Self::KeepAlive(_) => Kind::KeepAlive,
            Self::WhoOwns(_) => Kind::WhoOwns,
            Self::Ownership(_) => Kind::Ownership,
            Self::FileHeader(_) => Kind::FileHeader,
            Self::End(_) => Kind::End,
            Self::Lanes(_) => Kind::Lanes,
            Self::Descriptors(_) => Kind::Descriptors,
            Self::Leftovers(_) => Kind::Leftovers,
            Self::Missing(_) => Kind::Missing,
            Self::Wanted(_) => Kind::Wanted,
            Self::Resume(_) => Kind::Resume,
            Self::Gone(_) => Kind::Gone,
            Self::Complete(_) => Kind::Complete,
            Self::Ended(_) => Kind::Ended,
        }
    }

    /// Encodes the body.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Configuration(body) => body.encode_to_vec(),
            Self::Ready(body) => body.encode_to_vec(),
            Self::RoundBegin(body) => body.encode_to_vec(),
            Self::RoundEnd(body) => body.encode_to_vec(),
            Self::Stored(body) => body.encode_to_vec(),
            Self::SwitchOver(body) | Self::Back(body) | Self::Commit(body) => body.encode_to_vec(),
            Self::States(body) => body.encode_to_vec(),
            Self::Prepared(body) => body.encode_to_vec(),
            Self::Running(body) => body.encode_to_vec(),
            Self::Settled => Vec::new(),
            Self::Abort(body) => body.encode_to_vec(),
            Self::KeepAlive(body) => body.encode_to_vec(),
            Self::WhoOwns(body) => body.encode_to_vec(),
            Self::Ownership(body) => body.encode_to_vec(),
            Self::FileHeader(body) => body.encode_to_vec(),
            Self::End(body) => body.encode_to_vec(),
            Self::Lanes(body) => body.encode_to_vec(),
            Self::Descriptors(body) => body.encode_to_vec(),
            Self::Leftovers(body) => body.encode_to_vec(),
            Self::Missing(body) => body.encode_to_vec(),
            Self::Wanted(body) => body.encode_to_vec(),
            Self::Resume(body) => body.encode_to_vec(),
            Self::Gone(body) => body.encode_to_vec(),
            Self::Complete(body) => body.encode_to_vec(),
            Self::Ended(body) => body.encode_to_vec(),
        }
    }

    /// Decodes the body of a control frame.
    ///
    /// # Errors
    /// [`ProtocolError`] when it does not decode, or `kind` is a frame of pages.
    pub fn decode(kind: Kind, body: &[u8]) -> Result<Self, ProtocolError> {
        fn body_of<T: prost::Message + Default>(
            kind: Kind,
            body: &[u8],
        ) -> Result<T, ProtocolError> {
            T::decode(body).map_err(|source| ProtocolError::Malformed { kind, source })
        }
        Ok(match kind {
            Kind::Configuration => Self::Configuration(body_of(kind, body)?),
            Kind::Ready => Self::Ready(body_of(kind, body)?),
            Kind::RoundBegin => Self::RoundBegin(body_of(kind, body)?),
            Kind::RoundEnd => Self::RoundEnd(body_of(kind, body)?),
            Kind::Stored => Self::Stored(body_of(kind, body)?),
            Kind::SwitchOver => Self::SwitchOver(body_of(kind, body)?),
            Kind::States => Self::States(body_of(kind, body)?),
            Kind::Prepared => Self::Prepared(body_of(kind, body)?),
            Kind::Back => Self::Back(body_of(kind, body)?),
            Kind::Commit => Self::Commit(body_of(kind, body)?),
            Kind::Running => Self::Running(body_of(kind, body)?),
            Kind::Settled if body.is_empty() => Self::Settled,
            Kind::Settled => return Err(ProtocolError::invalid(kind, "it has a body")),
            Kind::Abort => Self::Abort(body_of(kind, body)?),
            Kind::KeepAlive => Self::KeepAlive(body_of(kind, body)?),
            Kind::WhoOwns => Self::WhoOwns(body_of(kind, body)?),
            Kind::Ownership => Self::Ownership(body_of(kind, body)?),
            Kind::FileHeader => Self::FileHeader(body_of(kind, body)?),
            Kind::End => Self::End(body_of(kind, body)?),
            Kind::Lanes => Self::Lanes(body_of(kind, body)?),
            Kind::Descriptors => Self::Descriptors(body_of(kind, body)?),
            Kind::Leftovers => Self::Leftovers(body_of(kind, body)?),
            Kind::Missing => Self::Missing(body_of(kind, body)?),
            Kind::Wanted => Self::Wanted(body_of(kind, body)?),
            Kind::Resume => Self::Resume(body_of(kind, body)?),
            Kind::Gone => Self::Gone(body_of(kind, body)?),
            Kind::Complete => Self::Complete(body_of(kind, body)?),
            Kind::Ended => Self::Ended(body_of(kind, body)?),
            Kind::Pages | Kind::ZeroPages | Kind::PageTable => {
                return Err(ProtocolError::Unexpected {
                    kind,
                    state: "a control message was due",
                });
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn random_bodies_never_panic(kind in proptest::sample::select(Kind::ALL), body in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = Message::decode(kind, &body) {
                prop_assert_eq!(message.kind(), kind);
                prop_assert_eq!(Message::decode(kind, &message.encode()).unwrap(), message);
            }
        }
    }
}
