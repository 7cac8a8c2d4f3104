//! Why a guest could not be saved to a file, or restored from one.

use std::io;

use crate::machine::MachineError;
use crate::protocol::{Kind, Message, ProtocolError};
use crate::uffd::UffdError;

/// Why a guest could not be saved to a file, or restored from one. Whoever shows it names the
/// file.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The host refused an operation on the file.
    #[error("failed to {action} the file")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It is not a saved guest, or not all of one.
    #[error("it is not a whole saved guest: {reason}")]
    NotWhole {
        /// What is wrong with it.
        reason: String,
    },
    /// It was written by a newer build.
    #[error("it has format version {found}, this build reads up to version {newest}")]
    Version {
        /// The file's version.
        found: u16,
        /// The newest that this build reads.
        newest: u16,
    },
    /// It needs something that this build lacks.
    #[error("it requires features {unknown:#x} that this build does not have")]
    Features {
        /// The unknown feature bits.
        unknown: u64,
    },
    /// A frame cannot be.
    #[error("it is damaged")]
    Frame(#[from] ProtocolError),
    /// Pages are not what was written, or no longer there.
    #[error("its pages from {page:#x} on are damaged")]
    Pages {
        /// Index of the first page.
        page: u64,
    },
    /// Faults of guest memory cannot be served any more.
    #[error(transparent)]
    Faults(#[from] UffdError),
    /// A thread of this process failed.
    #[error("the thread that {what} failed")]
    Lost {
        /// What it was for.
        what: &'static str,
    },
    /// It was told to stop.
    #[error("it was cancelled")]
    Cancelled,
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its RAM does not lie where this build places RAM.
    #[error("its RAM of {saved} bytes does not lie where this build places {built} bytes")]
    Ram {
        /// Bytes of RAM in the file.
        saved: u64,
        /// Bytes of RAM of the machine that was built for it.
        built: u64,
    },
}

impl SnapshotError {
    /// An [`SnapshotError::Io`] of one action.
    pub(super) fn io(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }

    pub(super) fn not_whole(reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self::NotWhole { reason }
    }

    pub(super) fn unexpected(message: &Message, state: &'static str) -> Self {
        Self::misplaced(message.kind(), state)
    }

    pub(super) fn misplaced(kind: Kind, state: &'static str) -> Self {
        Self::Frame(ProtocolError::Unexpected { kind, state })
    }
}
