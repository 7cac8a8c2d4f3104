//! Subroutines of the program in ring 3.

use super::{COMMAND_LINE, PAGE, PORT, value};
use crate::assembler::Condition::{Above, Below, Equal, NotEqual};
use crate::assembler::Operation::{Add, And, Compare, Sub, Xor};
use crate::assembler::Place::{At, By};
use crate::assembler::Register::{R10, R11, Rax, Rcx, Rdi, Rdx, Rsi};
use crate::assembler::{Code, Label, Register};
use crate::parameters::Key;
use crate::stream::kind;

/// Spreads page numbers over all seeds.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Subroutines. They change RAX, RCX, RDX, RSI and RDI.
pub(super) struct Routines {
    /// Sends a record: its kind in RSI, its numbers in RAX and RDI.
    pub(super) emit: Label,
    /// Where the value of the parameter begins whose name is at RSI: RAX, 0 when it is not given.
    pub(super) find: Label,
    /// The decimal number at RAX.
    pub(super) number: Label,
    /// Fills the page at RDI.
    pub(super) fill_page: Label,
    /// Looks whether the page at RDI holds what it was filled with; sends a record if not.
    pub(super) check_page: Label,
}

impl Routines {
    pub(super) fn write(code: &mut Code) -> Self {
        let emit = emit(code);
        Self {
            emit,
            find: find(code),
            number: number(code),
            fill_page: fill_page(code),
            check_page: check_page(code, emit),
        }
    }
}

pub(super) fn out(code: &mut Code) {
    code.raw(&[0xee]); // out dx, al
}

pub(super) fn port(code: &mut Code) {
    code.raw(&[0x66, 0xba]).raw(&PORT.to_le_bytes()); // mov dx, port
}

fn emit(code: &mut Code) -> Label {
    let (five, next) = (code.label(), code.label());
    let start = code.here();
    port(code);
    code.raw(&[0x57, 0x50]).copy(Rax, Rsi); // push rdi; push rax
    out(code);
    code.raw(&[0x58])
        .call(five) // pop rax
        .raw(&[0x58]) // pop rax
        .place(five)
        .set(Rcx, 5)
        .place(next)
        .copy(Rsi, Rax)
        .apply_value(And, Rax, 0x7f);
    out(code);
    code.copy(Rax, Rsi)
        .shift_right(Rax, 7)
        .apply_value(Sub, Rcx, 1)
        .jump_if(NotEqual, next)
        .done();
    start
}

fn find(code: &mut Code) -> Label {
    let (compare, found, differs, none) = (code.label(), code.label(), code.label(), code.label());
    let start = code.here();
    code.load(Rdi, At(COMMAND_LINE))
        .apply_value(Compare, Rdi, 0)
        .jump_if(Equal, none);
    let next = code.here();
    code.set(Rcx, 0)
        .place(compare)
        .copy(Rdx, Rsi)
        .apply(Add, Rdx, Rcx)
        .load_byte(Rax, By(Rdx, 0))
        .apply_value(Compare, Rax, 0)
        .jump_if(Equal, found)
        .copy(Rdx, Rdi)
        .apply(Add, Rdx, Rcx)
        .load_byte(Rdx, By(Rdx, 0))
        .apply(Compare, Rax, Rdx)
        .jump_if(NotEqual, differs)
        .apply_value(Add, Rcx, 1)
        .jump(compare)
        .place(differs)
        .load_byte(Rax, By(Rdi, 0))
        .apply_value(Compare, Rax, 0)
        .jump_if(Equal, none)
        .apply_value(Add, Rdi, 1)
        .jump(next)
        .place(found)
        .copy(Rax, Rdi)
        .apply(Add, Rax, Rcx)
        .done()
        .place(none)
        .set(Rax, 0)
        .done();
    start
}

fn number(code: &mut Code) -> Label {
    let end = code.label();
    let start = code.here();
    code.copy(Rsi, Rax).set(Rax, 0);
    let next = code.here();
    code.load_byte(Rcx, By(Rsi, 0))
        .apply_value(Sub, Rcx, b'0'.into())
        .apply_value(Compare, Rcx, 9)
        .jump_if(Above, end)
        .set(Rdx, 10)
        .multiply(Rax, Rdx)
        .apply(Add, Rax, Rcx)
        .apply_value(Add, Rsi, 1)
        .jump(next)
        .place(end)
        .done();
    start
}

/// RAX becomes the seed of the page at RDI; changes RCX.
fn seed(code: &mut Code) {
    code.copy(Rax, Rdi)
        .shift_right(Rax, 12)
        .apply_value(Add, Rax, 1)
        .set(Rcx, SPREAD)
        .multiply(Rax, Rcx);
}

/// RAX becomes the next random number (Marsaglia, "Xorshift RNGs", 13, 7, 17); changes RCX.
fn random(code: &mut Code) {
    code.copy(Rcx, Rax)
        .shift_left(Rcx, 13)
        .apply(Xor, Rax, Rcx)
        .copy(Rcx, Rax)
        .shift_right(Rcx, 7)
        .apply(Xor, Rax, Rcx)
        .copy(Rcx, Rax)
        .shift_left(Rcx, 17)
        .apply(Xor, Rax, Rcx);
}

/// Leads to `zero` or `compressible` when that is how pages are filled; changes RCX.
fn by_content(code: &mut Code, zero: Label, compressible: Label) {
    code.load(Rcx, At(value(Key::Fill)))
        .apply_value(Compare, Rcx, b'z'.into())
        .jump_if(Equal, zero)
        .apply_value(Compare, Rcx, b'c'.into())
        .jump_if(Equal, compressible);
}

fn fill_page(code: &mut Code) -> Label {
    let (zero, compressible) = (code.label(), code.label());
    let start = code.here();
    by_content(code, zero, compressible);
    seed(code);
    code.set(Rdx, 512);
    let next = code.here();
    random(code);
    code.store(By(Rdi, 0), Rax)
        .apply_value(Add, Rdi, 8)
        .apply_value(Sub, Rdx, 1)
        .jump_if(NotEqual, next)
        .done()
        .place(zero)
        .set(Rax, 0)
        .set(Rcx, 512)
        .raw(&[0xf3, 0x48, 0xab]) // rep stosq
        .done()
        .place(compressible);
    seed(code);
    code.set(Rdx, 128).copy(Rsi, Rax);
    let next = code.here();
    random(code);
    code.store(By(Rdi, 0), Rax);
    for offset in [8, 16, 24] {
        code.store(By(Rdi, offset), Rsi);
    }
    code.apply_value(Add, Rdi, 32)
        .apply_value(Sub, Rdx, 1)
        .jump_if(NotEqual, next)
        .done();
    start
}

fn check_page(code: &mut Code, emit: Label) -> Label {
    let (zero, any, compressible) = (code.label(), code.label(), code.label());
    let start = code.here();
    by_content(code, zero, compressible);
    seed(code);
    code.jump(any)
        .place(zero)
        // The random numbers that follow zero are zero.
        .set(Rax, 0)
        .place(any)
        .set(Rdx, 512);
    let next = code.here();
    random(code);
    check(code, Rax, 0, emit);
    code.apply_value(Add, Rdi, 8)
        .apply_value(Sub, Rdx, 1)
        .jump_if(NotEqual, next)
        .done()
        .place(compressible);
    seed(code);
    code.set(Rdx, 128).copy(Rsi, Rax);
    let next = code.here();
    random(code);
    check(code, Rax, 0, emit);
    for offset in [8, 16, 24] {
        check(code, Rsi, offset, emit);
    }
    code.apply_value(Add, Rdi, 32)
        .apply_value(Sub, Rdx, 1)
        .jump_if(NotEqual, next)
        .done();
    start
}

/// Sends a record and returns from the routine when the memory at RDI plus `offset` is not
/// `expected`, unless a write of the working set made that so. Changes RCX.
fn check(code: &mut Code, expected: Register, offset: i32, emit: Label) {
    let (right, wrong) = (code.label(), code.label());
    code.apply_memory(Compare, expected, By(Rdi, offset))
        .jump_if(Equal, right);
    if offset == 0 {
        // The first 8 bytes of a page of the working set hold the number of its last write.
        code.copy(Rcx, Rdi)
            .apply_value(And, Rcx, PAGE - 1)
            .jump_if(NotEqual, wrong)
            .copy(Rcx, Rdi)
            .apply(Sub, Rcx, R10)
            .shift_right(Rcx, 12)
            .apply(Compare, Rcx, R11)
            .jump_if(Below, right)
            .place(wrong);
    }
    code.copy(Rax, Rdi)
        .shift_right(Rax, 12)
        .load(Rdi, By(Rdi, offset))
        .set(Rsi, kind::WRONG.into())
        .jump(emit)
        .place(right);
}
