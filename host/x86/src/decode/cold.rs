//! Rare instructions: a function that is given the decoded instruction itself.

use iced_x86::{Code, Instruction, Mnemonic as M};

use crate::cpu::Cpu;
use crate::exec::op::{At, Exit, Handler, Op};
use crate::exec::{Abort, Result, far, interrupt, msr, segment, stack, string, system, xsave};

/// What a rare instruction does. `Cpu::rip` is that of the next instruction when it is called,
/// and may be changed by an instruction that ends its block.
pub(crate) type Body = fn(&mut Cpu, &Op, &Instruction) -> Result;

/// A rare instruction, pointed to by `Op::imm`.
#[derive(Debug)]
pub(crate) struct Cold {
    pub(crate) body: Body,
    pub(crate) instruction: Instruction,
}

#[inline(always)]
fn call(cpu: &mut Cpu, at: At) -> Result {
    let op = at.get();
    let pointer = std::ptr::with_exposed_provenance::<Cold>(op.imm as usize);
    // SAFETY: operations with these handlers are made together with the `Cold` that they point
    // to, which belongs to the same block.
    #[expect(unsafe_code, reason = "an operation has no room for the instruction")]
    let cold = unsafe { &*pointer };
    let next = at.next_rip(cpu);
    cpu.rip = if cpu.is_64_bit() {
        next
    } else {
        next & 0xffff_ffff
    };
    (cold.body)(cpu, op, &cold.instruction)
}

/// The handler of a rare instruction after which the next one is run.
pub(super) const STRAIGHT: Handler = |cpu, at| match call(cpu, at) {
    Ok(()) => {
        let next = at.next();
        (next.get().handler)(cpu, next)
    }
    Err(Abort) => cpu.aborted(at),
};

/// The handler of a rare instruction that ends its block.
pub(super) const ENDING: Handler = |cpu, at| match call(cpu, at) {
    Ok(()) => Exit::Next,
    Err(Abort) => cpu.aborted(at),
};

/// The handler of one that ends its block when something is due.
pub(super) const MAY_END: Handler = |cpu, at| match call(cpu, at) {
    Ok(()) if cpu.budget == 0 => {
        cpu.ended_behind(at);
        Exit::Next
    }
    Ok(()) => {
        let next = at.next();
        (next.get().handler)(cpu, next)
    }
    Err(Abort) => cpu.aborted(at),
};

/// Whether a rare instruction ends its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ends {
    Never,
    Sometimes,
    Always,
}

/// The function of a rare instruction, and whether it ends its block.
pub(super) fn body(instruction: &Instruction) -> Option<(Body, Ends)> {
    const STRAIGHT: Ends = Ends::Never;
    const ENDS: Ends = Ends::Always;
    let body: (Body, Ends) = match instruction.mnemonic() {
        M::Cpuid => (system::cpuid, ENDS),
        M::Rdtsc | M::Rdtscp => (system::time_stamp, STRAIGHT),
        M::Rdpmc => (system::performance_counter, STRAIGHT),
        M::Rdmsr | M::Wrmsr => (msr::msr, ENDS),
        M::Lmsw | M::Smsw | M::Clts => (system::machine_status, ENDS),
        M::Lgdt | M::Lidt => (system::load_table, STRAIGHT),
        M::Sgdt | M::Sidt => (system::store_table, STRAIGHT),
        M::Lldt | M::Ltr => (system::load_system_segment, STRAIGHT),
        M::Sldt | M::Str => (system::store_system_segment, STRAIGHT),
        M::Invlpg => (system::invalidate_page, ENDS),
        M::Invd | M::Wbinvd => (system::cache, STRAIGHT),
        M::Clflush => (system::flush_line, STRAIGHT),
        M::Mfence | M::Lfence | M::Sfence => (system::fence, STRAIGHT),
        M::Xsave | M::Xsave64 => (xsave::save, STRAIGHT),
        M::Xrstor | M::Xrstor64 => (xsave::restore, STRAIGHT),
        M::Xgetbv => (xsave::get, STRAIGHT),
        M::Xsetbv => (xsave::set, ENDS),
        M::Pause => (system::pause, ENDS),
        M::Hlt => (system::halt, ENDS),
        M::Cli => (system::interrupt_flag, STRAIGHT),
        M::Sti => (system::interrupt_flag, Ends::Sometimes),
        M::Pushf | M::Pushfd | M::Pushfq => (system::push_flags, STRAIGHT),
        M::Popf | M::Popfd | M::Popfq => (system::pop_flags, ENDS),
        M::Swapgs => (system::swap_gs, STRAIGHT),
        M::Cmpxchg8b | M::Cmpxchg16b => (system::compare_exchange_wide, STRAIGHT),
        M::In | M::Out => (system::port, ENDS),
        M::Lar | M::Lsl | M::Verr | M::Verw => (segment::inspect, STRAIGHT),
        M::Arpl => (segment::arpl, STRAIGHT),
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => (segment::load_far, ENDS),
        M::Int | M::Int3 | M::Int1 | M::Into => (interrupt::int, ENDS),
        M::Iret | M::Iretd | M::Iretq => (interrupt::iret, ENDS),
        M::Retf => (far::ret, ENDS),
        M::Syscall | M::Sysret | M::Sysretq | M::Sysenter | M::Sysexit | M::Sysexitq => {
            (far::system_call, ENDS)
        }
        M::Pusha | M::Pushad => (stack::push_all, STRAIGHT),
        M::Popa | M::Popad => (stack::pop_all, STRAIGHT),
        M::Enter => (stack::enter, STRAIGHT),
        M::Leave => (stack::leave, STRAIGHT),
        M::Bound => (stack::bound, STRAIGHT),
        M::Xlatb => (stack::xlat, STRAIGHT),
        M::Aaa | M::Aas | M::Aad | M::Aam | M::Daa | M::Das => (stack::decimal, STRAIGHT),
        M::Salc => (stack::salc, STRAIGHT),
        M::Movsb
        | M::Movsw
        | M::Movsd
        | M::Movsq
        | M::Stosb
        | M::Stosw
        | M::Stosd
        | M::Stosq
        | M::Lodsb
        | M::Lodsw
        | M::Lodsd
        | M::Lodsq
        | M::Cmpsb
        | M::Cmpsw
        | M::Cmpsd
        | M::Cmpsq
        | M::Scasb
        | M::Scasw
        | M::Scasd
        | M::Scasq
        | M::Insb
        | M::Insw
        | M::Insd
        | M::Outsb
        | M::Outsw
        | M::Outsd
            if instruction.is_string_instruction() =>
        {
            (string::string, ENDS)
        }
        M::Call => match instruction.code() {
            Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
            | Code::Call_ptr1616
            | Code::Call_ptr1632 => (far::call, ENDS),
            _ => (stack::call, ENDS),
        },
        M::Jmp => match instruction.code() {
            Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Jmp_ptr1616
            | Code::Jmp_ptr1632 => (far::jmp, ENDS),
            _ => (stack::jmp, ENDS),
        },
        M::Ret => (stack::ret, ENDS),
        _ => return None,
    };
    Some(body)
}
