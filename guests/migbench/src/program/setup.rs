//! What comes before the work: parameters, memory, times, and the content of memory.

use super::routines::Routines;
use super::work::{advance, page_of_working_set};
use super::{
    COMMAND_LINE, INTERVAL, LATENESS, MAP, MAP_LEFT, MEASURED, NAP, PAGE, PAGES, RANGES,
    RANGES_END, RANGES_LIMIT, SPACING, name, value,
};
use crate::assembler::Code;
use crate::assembler::Condition::{Below, Equal, Less, NotEqual, NotLess};
use crate::assembler::Operation::{Add, And, Compare, Sub};
use crate::assembler::Place::{At, By};
use crate::assembler::Register::{R8, R9, R10, R11, R14, R15, Rax, Rbx, Rcx, Rdi, Rdx, Rsi};
use crate::image::{LIMIT, USABLE};
use crate::parameters::Key;
use crate::stream::kind;

/// All of it.
pub(super) fn write(code: &mut Code, routines: &Routines) {
    read_parameters(code, routines);
    list_memory(code);
    place_working_set(code);
    derive_times(code);
    fill(code, routines);
}

fn read_parameters(code: &mut Code, routines: &Routines) {
    code.load(Rax, By(Rbx, 24)) // the start info's command line …
        .store(At(COMMAND_LINE), Rax)
        .load(Rax, By(Rbx, 40)) // … its memory map …
        .store(At(MAP), Rax)
        .load_four(Rax, By(Rbx, 48)) // … and how many entries that has
        .store(At(MAP_LEFT), Rax);
    for key in Key::ALL {
        let (given, known) = (code.label(), code.label());
        code.set(Rsi, name(key).into())
            .call(routines.find)
            .apply_value(Compare, Rax, 0)
            .jump_if(NotEqual, given)
            .set(Rax, key.default_value())
            .jump(known)
            .place(given);
        if key.is_word() {
            code.load_byte(Rax, By(Rax, 0));
        } else {
            code.call(routines.number);
        }
        code.place(known).store(At(value(key)), Rax);
    }
}

/// Lists the RAM from [`USABLE`] to [`LIMIT`], and of that no more than is to be filled.
fn list_memory(code: &mut Code) {
    let (entry, skip, low, high, some, end) = (
        code.label(),
        code.label(),
        code.label(),
        code.label(),
        code.label(),
        code.label(),
    );
    code.set(Rdi, RANGES.into())
        .load(Rsi, At(MAP))
        .load(R8, At(value(Key::FillMebibytes)))
        .shift_left(R8, 20) // bytes that may still be filled
        .place(entry)
        .load(Rax, At(MAP_LEFT))
        .apply_value(Sub, Rax, 1)
        .jump_if(Less, end)
        .store(At(MAP_LEFT), Rax)
        .load_four(Rax, By(Rsi, 16))
        .apply_value(Compare, Rax, 1) // RAM
        .jump_if(NotEqual, skip)
        .load(Rax, By(Rsi, 0))
        .load(Rcx, By(Rsi, 8))
        .apply(Add, Rcx, Rax)
        .apply_value(Compare, Rax, USABLE as i32)
        .jump_if(NotLess, low)
        .set(Rax, USABLE.into())
        .place(low)
        .apply_value(Add, Rax, PAGE - 1)
        .apply_value(And, Rax, -PAGE)
        .apply_value(And, Rcx, -PAGE)
        .set(Rdx, LIMIT)
        .apply(Compare, Rcx, Rdx)
        .jump_if(Below, high)
        .copy(Rcx, Rdx)
        .place(high)
        .copy(Rdx, Rcx)
        .apply(Sub, Rdx, Rax) // bytes in this range
        .jump_if(Less, skip)
        .jump_if(Equal, skip)
        .apply(Compare, Rdx, R8)
        .jump_if(Below, some)
        .copy(Rdx, R8)
        .copy(Rcx, Rax)
        .apply(Add, Rcx, Rdx)
        .place(some)
        .apply_value(Compare, Rdx, 0)
        .jump_if(Equal, end)
        .apply(Sub, R8, Rdx)
        .store(By(Rdi, 0), Rax)
        .store(By(Rdi, 8), Rcx)
        .apply_value(Add, Rdi, 16)
        .apply_value(Compare, Rdi, RANGES_LIMIT as i32)
        .jump_if(Equal, end)
        .place(skip)
        .apply_value(Add, Rsi, 24)
        .jump(entry)
        .place(end)
        .store(At(RANGES_END), Rdi);
}

/// At the start of the first range, and no larger than that.
fn place_working_set(code: &mut Code) {
    let fits = code.label();
    code.load(R10, At(RANGES))
        .load(R11, At(value(Key::WorkingSetMebibytes)))
        .shift_left(R11, 8)
        .load(Rax, At(RANGES + 8))
        .apply(Sub, Rax, R10)
        .shift_right(Rax, 12)
        .apply(Compare, R11, Rax)
        .jump_if(Below, fits)
        .copy(R11, Rax)
        .place(fits);
}

/// From microseconds and mebibytes to TSC ticks.
fn derive_times(code: &mut Code) {
    let (known, idle, some) = (code.label(), code.label(), code.label());
    code.load(R8, At(value(Key::TscKilohertz)))
        .apply_value(Compare, R8, 0)
        .jump_if(NotEqual, known)
        .load(R8, At(MEASURED))
        .store(At(value(Key::TscKilohertz)), R8)
        .place(known)
        .set(Rcx, 1000)
        .load(Rax, At(value(Key::IntervalMicroseconds)))
        .multiply(Rax, R8)
        .divide(Rcx)
        .store(At(INTERVAL), Rax)
        .shift_left(Rax, 2)
        .store(At(LATENESS), Rax)
        .copy(Rax, R8)
        .set(Rcx, 50) // a fiftieth of a millisecond
        .divide(Rcx)
        .store(At(NAP), Rax)
        .set(Rax, 0)
        .load(Rcx, At(value(Key::RateMebibytes)))
        .shift_left(Rcx, 8) // pages a second
        .jump_if(Equal, idle)
        .apply_value(Compare, R11, 0)
        .jump_if(Equal, idle)
        .set(Rax, 1000)
        .multiply(Rax, R8)
        .divide(Rcx)
        .apply_value(Compare, Rax, 0)
        .jump_if(NotEqual, some)
        .set(Rax, 1)
        .place(some)
        .place(idle)
        .store(At(SPACING), Rax);
}

/// Fills all ranges, gives the working set its first values, and says so.
fn fill(code: &mut Code, routines: &Routines) {
    let (range, page, filled) = (code.label(), code.label(), code.label());
    code.set(R14, 0) // pages
        .set(Rbx, RANGES.into())
        .place(range)
        .apply_memory(Compare, Rbx, At(RANGES_END))
        .jump_if(Equal, filled)
        .load(R15, By(Rbx, 0))
        .place(page)
        .copy(Rdi, R15)
        .call(routines.fill_page)
        .apply_value(Add, R14, 1)
        .apply_value(Add, R15, PAGE)
        .apply_memory(Compare, R15, By(Rbx, 8))
        .jump_if(Below, page)
        .apply_value(Add, Rbx, 16)
        .jump(range)
        .place(filled)
        .store(At(PAGES), R14);
    // Write number n expects to find n less the number of pages.
    let (next, done) = (code.label(), code.label());
    code.set(R9, 0)
        .set(R8, 0)
        .place(next)
        .apply(Compare, R8, R11)
        .jump_if(Equal, done)
        .copy(Rax, R8)
        .apply(Sub, Rax, R11);
    page_of_working_set(code);
    code.store(By(Rdi, 0), Rax);
    advance(code);
    code.apply_value(Add, R8, 1).jump(next).place(done);
    code.set(R9, 0)
        .set(R8, 0)
        .load(Rax, At(value(Key::TscKilohertz)))
        .load(Rdi, At(PAGES))
        .set(Rsi, kind::READY.into())
        .call(routines.emit);
}
