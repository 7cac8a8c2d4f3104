//! Inputs of the fuzz target that are kept: they lead far into the code.

#![expect(
    unreachable_pub,
    reason = "the module is that of the fuzz target, which uses it from outside"
)]

#[path = "../../../fuzz/src/lane.rs"]
mod lane;

use std::path::Path;

use proptest::prelude::*;

#[test]
fn peers_that_were_strange_once_are_refused_or_understood() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/lane_stream");
    let mut count = 0;
    for entry in std::fs::read_dir(seeds).unwrap() {
        let path = entry.unwrap().path();
        let outcome = lane::play(&std::fs::read(&path).unwrap());
        let name = path.file_name().unwrap().to_string_lossy();
        let (messages, orderly) = match &*name {
            "good" => (2, true),
            "outside" | "too-many-places" | "too-long" | "no-checksum" | "overlap" => (1, false),
            "cut" => (1, true),
            other => panic!("what is {other} to lead to?"),
        };
        let found = (outcome.messages.len(), outcome.orderly);
        assert_eq!(found, (messages, orderly), "{name}");
        count += 1;
    }
    assert!(count > 5, "some inputs are kept");
}

proptest! {
    #[test]
    fn any_peer_is_refused_or_understood(script in prop::collection::vec(any::<u8>(), 0..400)) {
        lane::play(&script);
    }
}
