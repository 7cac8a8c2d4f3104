//! Whatever a saved processor holds, it is refused, or runs.
//!
//! Input: a byte for the mode, then fields that replace those of a valid state: of a field that
//! comes twice in a message, the later one counts.

#![no_main]

use std::num::NonZeroU32;

use dunlin_fuzz::processor::{Machine, Mode};
use dunlin_x86::saved;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&mode, fields)) = data.split_first() else {
        return;
    };
    // By itself first.
    let _refused = saved::decode(fields);
    let mode = [Mode::Real, Mode::Protected, Mode::Kernel, Mode::User][usize::from(mode % 4)];
    let mut machine = Machine::new(mode, NonZeroU32::MIN, &[0x90, 0x0f, 0xa2, 0xf4]);
    let mut body = saved::encode(&machine.cpu.state());
    body.extend_from_slice(fields);
    if let Ok(state) = saved::decode(&body)
        && machine.cpu.set_state(&state).is_ok()
    {
        machine.run();
    }
});
