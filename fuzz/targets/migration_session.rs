//! Whatever a peer says to a waiting destination, on however many connections, it goes on waiting.

#![no_main]

use dunlin_fuzz::session;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: {
    dunlin_fuzz::survive_hang_ups();
    session::WAITS.store(true, std::sync::atomic::Ordering::Relaxed);
}, |script: &[u8]| {
    session::play(script, dunlin_fuzz::folder());
});
