//! Whatever a peer says on a page lane, its receiver writes nowhere else, and ends.

#![no_main]

use dunlin_fuzz::lane;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| {
    lane::play(script);
});
