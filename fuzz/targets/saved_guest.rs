//! Whatever a saved guest's file says, it is understood or refused.

#![no_main]

use dunlin_fuzz::saved;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let folder = dunlin_fuzz::folder();
    saved::read(input, &folder.join("saved"));
});
