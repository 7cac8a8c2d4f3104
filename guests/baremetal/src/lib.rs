//! A 32-bit multiboot program of the bare-metal kind: it tells what its loader told it, programs the
//! 8259s and the 8254 of the first PCs, and ends by the debug exit port 0xf4.
//!
//! It prints to the first serial port, numbers as eight hexadecimal digits:
//!
//! ```text
//! magic 2badb002                      EAX
//! command line PATH ARGUMENTS
//! module SIZE SUM PATH ARGUMENTS      each module: bytes, and their sum
//! memory LOWER UPPER                  KiB
//! map START SIZE KIND                 each range, start and size with sixteen digits
//! ticks COUNT IN-SERVICE              at least ten interrupts of channel 0 in mode 2
//! output BEFORE                       channel 2 came to its end; OUT before it was loaded
//! serial interrupts COUNT             of the empty transmitter, line 4
//! end                                 then it writes 0x10 to port 0xf4
//! ```
//!
//! A command line that ends with "short" leaves out what needs the legacy devices. Must not depend
//! on anything of ours. The host's assembler makes the program, so it exists on x86-64 hosts only.
#![cfg(target_arch = "x86_64")]

use assembled::program;

/// Where the program lies in the guest.
const BASE: u32 = 0x10_0000;
/// The entry lies behind the multiboot header.
const ENTRY: u32 = BASE + 16;
/// Bytes of memory, variables and stack included.
const MEMORY_SIZE: u32 = 0x2_0000;
/// The exit status with which a VM ends that ran it: what it writes, doubled, plus one.
pub const EXIT_STATUS: i32 = 0x10 << 1 | 1;

/// The assembled program.
#[expect(
    unsafe_code,
    reason = "what an assembler makes between two labels is foreign to Rust"
)]
mod assembled {
    use std::arch::global_asm;

    global_asm!(include_str!("program.s"), options(att_syntax));

    // SAFETY: both are labels of `program.s`, of which only the addresses are used.
    unsafe extern "C" {
        static dunlin_baremetal_start: u8;
        static dunlin_baremetal_end: u8;
    }

    pub(super) fn program() -> &'static [u8] {
        let start = &raw const dunlin_baremetal_start;
        let end = &raw const dunlin_baremetal_end;
        // SAFETY: the labels are the borders of one piece of read-only data.
        unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
    }
}

/// The program as an ELF32 file with one segment.
pub fn elf() -> Vec<u8> {
    const HEADER: u32 = 52;
    const PROGRAM_HEADER: u32 = 32;
    let program = program();
    let at = HEADER + PROGRAM_HEADER;
    let size = program.len() as u32;
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    let (executable, machine_386) = (2u16, 3u16);
    file.extend(
        [executable, machine_386]
            .map(u16::to_le_bytes)
            .as_flattened(),
    );
    for word in [1, ENTRY, HEADER, 0, 0] {
        file.extend(u32::to_le_bytes(word));
    }
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let (load, read_write_execute) = (1, 7);
    for word in [
        load,
        at,
        BASE,
        BASE,
        size,
        MEMORY_SIZE,
        read_write_execute,
        4,
    ] {
        file.extend(u32::to_le_bytes(word));
    }
    file.extend(program);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_begins_with_its_header_and_leaves_room_for_its_variables() {
        let words: Vec<u32> = (program().chunks_exact(4).take(3))
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        assert_eq!(words[..2], [0x1bad_b002, 3]);
        assert_eq!(
            words.iter().fold(0u32, |sum, word| sum.wrapping_add(*word)),
            0
        );
        assert!(program().len() < 0x1_0000);
    }
}
