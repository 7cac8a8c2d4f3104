//! The wire protocol of a move, and the format of a saved guest.
//!
//! A connection starts with a [`Preamble`] from each side, source first. It is fixed in form and
//! readable without decoding anything else, so two versions that share nothing more can still
//! tell each other which they are. Then typed frames follow ([`frame`]): each has a header with
//! length, kind and sequence number, a CRC-32 of that header, and a CRC-32 of its payload. A
//! frame out of sequence, out of bounds or out of state ends the session.
//!
//! | kind | message | from | when | body |
//! |---:|---|---|---|---|
//! | 1 | Configuration | source | first | machine configuration, RAM size and regions, verification, page lanes wanted |
//! | 2 | Ready | destination | answer to 1 | who answers (incarnation), page lanes taken |
//! | 3 | RoundBegin | source | copying, switching | round number, pages to come |
//! | 4 | Pages | file, version 1 | within a round | runs of page indices, then the pages ([`runs`]) |
//! | 5 | ZeroPages | file, version 1 | within a round | runs of page indices |
//! | 6 | RoundEnd | source | within a round | pages sent of each sort, lanes that took part |
//! | 7 | Stored | destination | within a round, and answer to 6 | what is stored so far |
//! | 8 | SwitchOver | source | copying | number of the switch-over; the guest is about to pause |
//! | 9 | States | source | switching, after the round | saved states, hash of RAM |
//! | 10 | Prepared | destination | answer to 9 | time to restore, hash of RAM |
//! | 11 | Back | source | switching, prepared | the guest runs on at the source; copying goes on |
//! | 12 | Commit | source | prepared | the destination owns the guest |
//! | 13 | Running | destination | answer to 12 | times, hash of what was stored |
//! | 14 | Settled | source | answer to 13 or 18 | no question is open; the destination may forget |
//! | 15 | Abort | both | before 12 | why; the session is over |
//! | 16 | KeepAlive | both | any time | number; a non-zero echo asks for it back |
//! | 17 | WhoOwns | source | first, on a connection of kind inquiry | incarnation that was asked to take the guest |
//! | 18 | Ownership | destination | answer to 17 | running, starting, relinquished, unknown |
//! | 19 | FileHeader | file | first | what `inspect` shows |
//! | 20 | End | file | last | how many frames came before |
//! | 21 | Lanes | source | after 2 | how many page lanes are open |
//! | 30 | Missing | both | before 8; switching, before 9; answer to 32 | the pages that the destination lacks |
//! | 31 | Wanted | destination | post-copy, on its connection for requests | pages that are waited for |
//! | 32 | Resume | source | first, on a new control connection of a post-copy | who is meant, how many connections follow |
//! | 33 | Gone | destination | answer to 32 | the guest is not here |
//! | 34 | Complete | destination | post-copy | every page is there |
//! | 35 | Ended | destination | post-copy | the guest needs no more pages |
//! | 40 | Descriptors | source | hand-over, after 1 | names of the descriptors that come with it |
//! | 41 | Leftovers | source | hand-over, after 13 | what the machine can have later |
//! | 45 | PageTable | file | behind the pages | where in the file which pages are, and their checksums |
//!
//! A move without trouble:
//!
//! ```text
//! source                               destination
//!   │ preamble ───────────────────────────▶ │
//!   │ ◀─────────────────────────── preamble │
//!   │ Configuration ──────────────────────▶ │ builds the machine
//!   │ ◀────────────────────────────── Ready │
//!   │ (connects page lanes) Lanes ────────▶ │
//!   │ RoundBegin, RoundEnd ───────────────▶ │ waits for the lanes' marks
//!   │ ═ page lanes: pages…, mark ═════════▶ │ stores
//!   │ ◀───────────────────────────── Stored │      … again, until what remains fits the limit
//!   │ SwitchOver ─────────────────────────▶ │
//!   │ (pauses) RoundBegin … RoundEnd ─────▶ │
//!   │ ═ page lanes: pages…, mark ═════════▶ │ stores
//!   │ ◀───────────────────────────── Stored │
//!   │ States ─────────────────────────────▶ │ restores
//!   │ ◀─────────────────────────── Prepared │
//!   │ Commit ─────────────────────────────▶ │ owns the guest, starts it
//!   │ ◀──────────────────────────── Running │
//!   │ Settled ────────────────────────────▶ │
//! ```
//!
//! A hand-over to another process of the same host ([`crate::handover`]) is the same without
//! pages: `Descriptors` brings the guest's RAM, and `Leftovers` comes before `Settled`.
//!
//! Pages travel on connections of their own, the page lanes ([`lane`]). Nothing is ordered between
//! lanes, nor between a lane and the control connection. So a round is a barrier: the next one
//! begins when the destination has said `Stored` with all pages of the last, and nothing is restored
//! while lanes write.
//!
//! The two state machines are drawn beside their enums, [`crate::source::Phase`] and
//! [`crate::destination::Stage`]; who owns the guest when, in [`crate::ownership`].

pub mod frame;
pub mod lane;
pub mod message;
mod postcopy;
pub mod preamble;
pub mod runs;

pub use frame::{Header, Kind};
pub use message::Message;
pub use preamble::{Preamble, Purpose, Token, VERSION};

/// Why what the peer (or a file) said was refused.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The first bytes are not ours.
    #[error("the peer does not speak Dunlin's migration protocol")]
    Magic,
    /// The other side speaks another version.
    #[error("the peer speaks migration protocol version {theirs}, this build speaks {ours}")]
    Version {
        /// The peer's version.
        theirs: u16,
        /// This build's version.
        ours: u16,
    },
    /// The other side needs a feature that this build lacks.
    #[error("the peer requires migration features {unknown:#x} that this build does not have")]
    Features {
        /// The unknown feature bits.
        unknown: u64,
    },
    /// The preamble's own fields contradict each other.
    #[error("the preamble is damaged: {reason}")]
    Preamble {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A checksum does not fit what arrived.
    #[error("the {part} of frame {sequence} is corrupted")]
    Checksum {
        /// `header` or `payload`.
        part: &'static str,
        /// Sequence number of the frame.
        sequence: u64,
    },
    /// A frame is missing or came twice.
    #[error("frame {found} arrived where frame {expected} was due")]
    Sequence {
        /// What came.
        found: u64,
        /// What had to come.
        expected: u64,
    },
    /// The kind is not in the table.
    #[error("frame of unknown kind {kind}")]
    UnknownKind {
        /// The kind's number.
        kind: u16,
    },
    /// The length is not possible for this kind.
    #[error("{kind:?} frame of {length} bytes, at most {limit} are allowed")]
    Length {
        /// The frame's kind.
        kind: Kind,
        /// Its length by its header.
        length: u64,
        /// The longest that is accepted.
        limit: u64,
    },
    /// The body does not decode.
    #[error("{kind:?} message does not decode")]
    Malformed {
        /// The message's kind.
        kind: Kind,
        /// What the decoder said.
        #[source]
        source: prost::DecodeError,
    },
    /// A field has a value that cannot be.
    #[error("{kind:?} message is invalid: {reason}")]
    Invalid {
        /// The message's kind.
        kind: Kind,
        /// Which field, and what would be valid.
        reason: String,
    },
    /// The message has no place in the present state.
    #[error("{kind:?} message while {state}")]
    Unexpected {
        /// The message's kind.
        kind: Kind,
        /// What this side was doing.
        state: &'static str,
    },
}

impl ProtocolError {
    /// An [`ProtocolError::Invalid`] about a message.
    pub(crate) fn invalid(kind: Kind, reason: impl Into<String>) -> Self {
        Self::Invalid {
            kind,
            reason: reason.into(),
        }
    }
}
