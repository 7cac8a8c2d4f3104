//! VM processes, driven by the command line as a user drives them, with guests of a few bytes.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, in helpers too"
)]

mod baselines;
mod engines;
mod following;
mod handover;
mod life;
mod moves;
mod profile;
mod saved;
mod support;
