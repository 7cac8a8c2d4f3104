//! Branches that took a comparison in agree with the flags.

use super::*;
use crate::state::gpr;

#[test]
fn a_branch_behind_a_comparison_goes_where_setcc_says() {
    // CMP and TEST of registers and with an immediate, for 1, 4 and 8 bytes.
    let forms: [&[u8]; 9] = [
        &[0x39, 0xc8],
        &[0x48, 0x39, 0xc8],
        &[0x83, 0xf8, 0x80],
        &[0x48, 0x83, 0xf8, 0x80],
        &[0x3c, 0x80],
        &[0x85, 0xc8],
        &[0x48, 0x85, 0xc8],
        &[0x84, 0xc8],
        &[0xa8, 0x81],
    ];
    let values = [
        (0, 0),
        (1, 2),
        (2, 1),
        (0x80, 0x7f),
        (0x7fff_ffff, 0x8000_0000),
        (1 << 63, 1),
        (1, 1 << 63),
        (u64::MAX, u64::MAX - 0x7f),
        (u64::MAX - 0x7f, 1),
    ];
    for form in forms {
        for code in 0..16 {
            let set = [0x0f, 0x90 + code, 0xc3];
            // Jcc over MOV DL, 1; HLT.
            let branch = [0x70 + code, 2, 0xb2, 1, 0xf4];
            let mut machine = Machine::long(&[form, &set, form, &branch].concat());
            for (a, b) in values {
                machine = machine.with(|state| {
                    state.activity = Activity::Running;
                    state.rip = CODE;
                    (state.gpr[gpr::RAX], state.gpr[gpr::RCX]) = (a, b);
                    (state.gpr[gpr::RBX], state.gpr[gpr::RDX]) = (0, 0);
                });
                let state = machine.halt();
                let (set, fell) = (state.gpr[gpr::RBX], state.gpr[gpr::RDX]);
                assert_eq!(
                    set,
                    1 - fell,
                    "{form:x?} condition {code} of {a:#x} and {b:#x}"
                );
            }
        }
    }
}
