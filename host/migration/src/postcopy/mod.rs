//! Memory that follows its guest: the guest changes hands before all of its pages have, and whoever
//! touches a page that has not come waits in the kernel until it has.
//!
//! ```text
//! source                                   destination
//!   │ connections: requests, urgent, bulk… ──▶ │
//!   │ Missing ───────────────────────────────▶ │ makes room for what will be missing
//!   │ SwitchOver ────────────────────────────▶ │
//!   │ (pauses) Missing, States ──────────────▶ │ forgets the missing pages, watches over memory,
//!   │ ◀──────────────── Wanted (on requests)   │ restores; what that touches is asked for
//!   │ page (on urgent) ──────────────────────▶ │
//!   │ ◀────────────────────────────── Prepared │
//!   │ Commit ────────────────────────────────▶ │ starts the guest
//!   │ ◀─────────────────────────────── Running │
//!   │ pages (on bulk) ═══════════════════════▶ │ places each page once
//!   │ ◀──────────────────────────────── Wanted │ … as the guest touches them
//!   │ ◀────────────────────────────── Complete │ lets go of memory
//!   │ Settled ───────────────────────────────▶ │
//! ```
//!
//! One set of connections is a *generation*. When any of them breaks or falls silent, both sides end
//! all of them and keep what they have: the source its frozen memory, the destination the pages that
//! came, while its guest waits at those that did not.
//!
//! ```text
//!   source:       Serving ──a connection broke──▶ Reconnecting ──window over, or dead──▶ Lost
//!                  │   ▲                               │   │
//!                  │   └───── Missing ◀── Resume ──────┘   └── never started there ──▶ (resumes)
//!                  └── Complete or Ended ──▶ (done)
//!
//!   destination:  Arriving ──a connection broke──▶ Waiting ──window over──▶ Lost
//!                  │   ▲                             │
//!                  │   └────── new connections ──────┘
//!                  └── last page ──▶ Complete
//! ```
//!
//! The destination says what it lacks, so nothing that arrived is sent again; what was under way when
//! the connections broke is. A page is placed once: the kernel refuses to fill what is there, and the
//! memory that it is read from does not change any more.
//!
//! Who owns the guest is decided as ever ([`crate::ownership`]). What differs is the time after
//! `Running`: then neither side has a whole guest until `Complete`, and if either is lost the guest
//! is. Both say so; the source keeps its memory, paused, and never resumes by itself.
//!
//! `docs/adr/0008-post-copy.md` has what was considered instead.

mod follow;
mod inflow;
mod keeper;
mod latency;
mod links;
mod missing;
mod outflow;
pub mod parcel;
mod plan;
mod watch;

#[cfg(test)]
mod tests;

use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::error::MigrationError;

pub(crate) use follow::{Follow, Followed, counted_here};
pub(crate) use inflow::{Basin, Inflow, make_room};
pub(crate) use keeper::Keeper;
pub(crate) use links::{Event, Switchboard, collect, open_links};
pub use missing::hear;
pub(crate) use missing::tell;
pub(crate) use outflow::{Outflow, Sent, SourceLinks, Terms};
pub use watch::{Following, Standing};

/// How often a wait looks whether its generation has ended.
const SLICE: Duration = Duration::from_millis(20);

fn spawn(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, MigrationError> {
    let spawned = Builder::new().name(name.to_owned()).spawn(work);
    spawned.map_err(|source| MigrationError::Host {
        what: "a thread",
        source,
    })
}
