//! Who owns the guest, and how ownership passes.
//!
//! Exactly one side may run the guest. Two processes that talk over a connection that can break
//! at any byte cannot both always know that the other knows (the two generals' problem), so the
//! protocol does not try. It places the decision in *one* word of memory, the custody that the
//! destination keeps for the session's token, and makes everybody else ask for it:
//!
//! ```text
//!              Commit of the session                 the guest was started
//!   Offered ───────────────────────────▶ Owned ───────────────────────────▶ Running
//!      │                                   │
//!      │ the session ended without Commit, │ a part did not start
//!      │ or the source asked who owns      │
//!      ▼                                   ▼
//!   Relinquished ◀─────────────────────────┘        (a promise: never starts any more)
//! ```
//!
//! The source gives the guest up at the moment at which it begins to write `Commit`:
//!
//! 1. *Before* that it resumes whenever anything fails, without asking: the destination cannot
//!    leave `Offered` without a `Commit`, and none was written.
//! 2. *After* that it never resumes by itself. When `Running` does not arrive it connects anew
//!    and asks `WhoOwns` with the same token. The question itself forces a decision: a
//!    destination that still has `Offered` moves to `Relinquished` before it answers, and a
//!    `Commit` that arrives later finds the word taken. So the answer is either *running there*
//!    (the move is complete), or *relinquished* (the source resumes, the guest is whole, since it
//!    was paused all the time).
//! 3. A destination that is *dead* answers nothing, and runs nothing. Where the source can know
//!    that ([`crate::transport::Fencing`]: a process on the same machine, held by a descriptor),
//!    it resumes. What the guest may have done
//!    between its start there and that death is lost, as with any host that dies.
//! 4. Where it cannot know, the guest stays paused at the source, and the move ends as
//!    [`crate::Whereabouts::InDoubt`] with what is needed to ask again ([`Doubt`]). A person, or a
//!    cluster's fence, decides: claim it here, or discard it. Guessing would risk two running
//!    copies, which is worse than a pause.
//!
//! For 2 to hold, a destination that runs the guest keeps its listening socket until the source
//! has said `Settled`; see [`crate::Witness`].
//!
//! `docs/adr/0003-hand-over.md` has what was considered instead.

use crate::protocol::Token;

/// An open question: what is needed to ask the destination again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Doubt {
    /// The session.
    pub token: Token,
    /// The destination process that the guest was offered to.
    pub incarnation: Token,
}
