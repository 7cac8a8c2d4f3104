//! What x87 instructions leave beside their results.

use super::*;

#[test]
fn an_instruction_that_does_nothing_is_the_last_all_the_same() {
    let mut machine = Machine::assembled(|a| {
        a.fninit().unwrap();
        a.fld1().unwrap();
        a.fnop().unwrap();
        a.hlt().unwrap();
    });
    let image = machine.halt().xsave;
    assert_eq!(image[6..8], [0xd0, 0x01]);
    // FNINIT and FLD1 have two bytes each.
    assert_eq!(image[8..16], (CODE + 4).to_le_bytes());
}
