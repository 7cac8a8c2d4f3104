//! Guests of a few bytes, saved to files and restored from them.

use crate::support::{Bed, assert_no_gap};

/// Saved by the release that wrote format version 1, while the guest of
/// [`crate::support::guest::letters`] was about to print a `p`.
const VERSION_1: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/vm/fixtures/version-1.saved"
);

#[test]
fn a_guest_saved_by_the_previous_release_runs_on_from_where_it_was() {
    let bed = Bed::new();
    assert_eq!(
        bed.json(&["inspect", VERSION_1])["config"]["name"],
        "letters"
    );
    bed.json(&["restore", VERSION_1, "--detach"]);
    let mut console = bed.console("letters");
    let printed = console.at_least(100);
    assert!(printed.starts_with('p'), "{printed}");
    assert_no_gap(printed);
    bed.json(&["stop", "letters"]);
}
