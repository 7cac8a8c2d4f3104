//! The work: writes, ticks, checks, sleep.

use super::routines::{Routines, out, port};
use super::{
    HLT, INTERVAL, LATENESS, LONGEST_SLEEP, NAP, PAGE, PAGES, RANGES, RANGES_END, SPACING, STRIDE,
    value,
};
use crate::assembler::Condition::{Below, Equal, Greater, Less, NotEqual, NotLess};
use crate::assembler::Operation::{Add, And, Compare, Sub};
use crate::assembler::Place::{At, By};
use crate::assembler::Register::{
    R8, R9, R10, R11, R12, R13, R14, R15, Rax, Rbp, Rbx, Rcx, Rdi, Rdx, Rsi, Rsp,
};
use crate::assembler::{Code, Label};
use crate::parameters::Key;
use crate::stream::kind;

/// RDI becomes the address of the page that is written next.
pub(super) fn page_of_working_set(code: &mut Code) {
    code.copy(Rdi, R9).shift_left(Rdi, 12).apply(Add, Rdi, R10);
}

/// R9 becomes the page after that. A working set may be smaller than a stride.
pub(super) fn advance(code: &mut Code) {
    let (inside, wrap) = (code.label(), code.label());
    code.apply_value(Add, R9, STRIDE)
        .place(wrap)
        .apply(Compare, R9, R11)
        .jump_if(Below, inside)
        .apply(Sub, R9, R11)
        .jump(wrap)
        .place(inside);
}

/// The loop.
pub(super) fn write(code: &mut Code, routines: &Routines) {
    let (ticks, sleep) = (code.label(), code.label());
    let idle = code.label();
    code.load(Rax, At(INTERVAL))
        .apply_value(Compare, Rax, 0)
        .jump_if(NotEqual, idle)
        .set(Rcx, 0)
        .raw(&[HLT])
        .place(idle)
        .set(R14, 0)
        .set(Rbp, 0)
        .set(Rbx, RANGES.into())
        .load(R15, By(Rbx, 0));
    count(code, routines);
    code.time().copy(R12, Rax).copy(R13, Rax);
    let top = code.here();
    code.time();
    write_what_is_due(code, routines, ticks);
    code.place(ticks);
    tick_when_due(code, routines, sleep);
    scrub(code, routines);
    code.place(sleep);
    rest(code, top);
}

/// Sends how many ticks and writes there were.
fn count(code: &mut Code, routines: &Routines) {
    code.copy(Rax, R14)
        .copy(Rdi, R8)
        .set(Rsi, kind::COUNT.into())
        .call(routines.emit);
}

/// Makes the writes that are due at the time in RAX. After a long wait, most are left out: a guest
/// that could
/// not work for a second does not work twice as fast in the next. A clock that went back, as one
/// may that changed its host, sets a new beginning.
fn write_what_is_due(code: &mut Code, routines: &Routines, done: Label) {
    let (late, early, next, right) = (code.label(), code.label(), code.label(), code.label());
    code.load(Rcx, At(SPACING))
        .apply_value(Compare, Rcx, 0)
        .jump_if(Equal, done)
        .raw(&[0x50]) // push rax
        .copy(Rdx, Rax)
        .apply(Sub, Rdx, R12)
        .apply_memory(Compare, Rdx, At(LATENESS))
        .jump_if(Less, late)
        .copy(R12, Rax)
        .apply_memory(Sub, R12, At(LATENESS))
        .place(late)
        .apply_memory(Add, Rdx, At(LATENESS))
        .jump_if(NotLess, early)
        .copy(R12, Rax)
        .place(early)
        .place(next)
        .load(Rax, By(Rsp, 0))
        .apply(Sub, Rax, R12)
        .apply_value(Compare, Rax, 0);
    let over = code.label();
    code.jump_if(Less, over);
    page_of_working_set(code);
    code.copy(Rdx, R8)
        .apply(Sub, Rdx, R11)
        .load(Rcx, By(Rdi, 0))
        .store(By(Rdi, 0), R8)
        .apply(Compare, Rcx, Rdx)
        .jump_if(Equal, right)
        .copy(Rax, Rdi)
        .shift_right(Rax, 12)
        .copy(Rdi, Rcx)
        .set(Rsi, kind::WRONG.into())
        .call(routines.emit)
        .place(right);
    advance(code);
    code.apply_value(Add, R8, 1)
        .apply_memory(Add, R12, At(SPACING))
        .jump(next)
        .place(over)
        .raw(&[0x58]); // pop rax
}

/// Ticks when that is due at the time in RAX, and every so often sends the counts.
fn tick_when_due(code: &mut Code, routines: &Routines, not_due: Label) {
    let (forward, due, counted, ahead) = (code.label(), code.label(), code.label(), code.label());
    code.copy(Rdx, Rax)
        .apply(Sub, Rdx, R13)
        .jump_if(NotLess, due)
        .apply_memory(Add, Rdx, At(LATENESS))
        .jump_if(NotLess, forward)
        .copy(R13, Rax) // the clock went back
        .jump(due)
        .place(forward)
        .jump(not_due)
        .place(due)
        .copy(Rax, R14)
        .apply_value(And, Rax, 0x7f);
    port(code);
    out(code);
    code.apply_value(Add, R14, 1)
        .copy(Rax, R14)
        .apply_value(And, Rax, 0x7f)
        .jump_if(NotEqual, counted);
    count(code, routines);
    code.place(counted)
        .apply_memory(Add, R13, At(INTERVAL))
        .time()
        .apply(Compare, R13, Rax)
        .jump_if(Greater, ahead)
        .copy(R13, Rax)
        .apply_memory(Add, R13, At(INTERVAL))
        .place(ahead);
}

/// Checks as many pages as are to be checked at each tick, and tells when all have been.
fn scrub(code: &mut Code, routines: &Routines) {
    let (next, over, go) = (code.label(), code.label(), code.label());
    code.load(Rcx, At(value(Key::ScrubPages)))
        .raw(&[0x51]) // push rcx
        .place(next)
        .raw(&[0x59]) // pop rcx
        .apply_value(Sub, Rcx, 1)
        .jump_if(Less, over)
        .raw(&[0x51]) // push rcx
        .copy(Rdi, R15)
        .call(routines.check_page)
        .apply_value(Add, R15, PAGE)
        .apply_memory(Compare, R15, By(Rbx, 8))
        .jump_if(Below, next)
        .apply_value(Add, Rbx, 16)
        .apply_memory(Compare, Rbx, At(RANGES_END))
        .jump_if(Below, go)
        .apply_value(Add, Rbp, 1)
        .copy(Rax, Rbp)
        .load(Rdi, At(PAGES))
        .set(Rsi, kind::SCRUBBED.into())
        .call(routines.emit)
        .set(Rbx, RANGES.into())
        .place(go)
        .load(R15, By(Rbx, 0))
        .jump(next)
        .place(over);
}

/// Sleeps until the next tick, when that is worth it.
fn rest(code: &mut Code, top: Label) {
    let short = code.label();
    code.load(Rax, At(value(Key::Wait)))
        .apply_value(Compare, Rax, b'h'.into())
        .jump_if(NotEqual, top)
        .time()
        .copy(Rcx, R13)
        .apply(Sub, Rcx, Rax)
        .apply_memory(Compare, Rcx, At(NAP))
        .jump_if(Less, top)
        .set(Rax, 1_000_000)
        .multiply(Rax, Rcx)
        .load(Rcx, At(value(Key::TscKilohertz)))
        .divide(Rcx)
        .copy(Rcx, Rax)
        .set(Rdx, LONGEST_SLEEP)
        .apply(Compare, Rcx, Rdx)
        .jump_if(Below, short)
        .copy(Rcx, Rdx)
        .place(short)
        .raw(&[HLT])
        .jump(top);
}
