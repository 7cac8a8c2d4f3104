//! Whatever bytes a guest executes, the software CPU neither panics nor leaves its RAM.
//!
//! Input: a byte for the mode and for when a block is translated, two bytes for each general register, code.

#![no_main]

use std::num::NonZeroU32;

use dunlin_fuzz::processor::{Machine, Mode};
use dunlin_x86::state::gpr;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&[mode, ref registers @ ..], code)) = data.split_first_chunk::<33>() else {
        return;
    };
    let runs = NonZeroU32::MIN.saturating_add(u32::from(mode / 4 % 3));
    let mode = [Mode::Real, Mode::Protected, Mode::Kernel, Mode::User][usize::from(mode % 4)];
    // Blocks that run once, or traces of those that lead somewhere already.
    let mut machine = Machine::new(mode, runs, code);
    let mut state = machine.cpu.state();
    for (index, value) in registers.chunks_exact(2).enumerate() {
        if index != gpr::RSP {
            // Signed, and four times as much as fits 16 bits: addresses in RAM, and a few beyond.
            let value = i64::from(i16::from_le_bytes([value[0], value[1]])) * 8;
            state.gpr[index] = value as u64;
        }
    }
    machine
        .cpu
        .set_state(&state)
        .expect("any value fits a register");
    machine.run();
});
