//! x87 instructions, and FXSAVE with FXRSTOR.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeTableKind, OpKind};

use super::{Lowered, immediate, is_register};
use crate::cpu::Cpu;
use crate::cpu::control::{CR0_EM, CR0_TS, CR4_OSFXSR};
use crate::exec::flags::{Flags, OF};
use crate::exec::op::{Handler, Op, slot, straight};
use crate::exec::{Exception, Result};
use crate::float::state::{FXSAVE_BYTES, MXCSR_MASK};
use crate::float::x87::{Layout, Place, X87Operand, X87Routine};
use crate::mmu::is_canonical;

pub(super) fn lower(instruction: &Instruction) -> Option<Lowered> {
    let handler = control(instruction)
        .or_else(|| environment(instruction))
        .or_else(|| save(instruction));
    if let Some(handler) = handler {
        return Some(Lowered {
            handler,
            dst: 0,
            src: 0,
            imm: immediate(instruction),
        });
    }
    arithmetic(instruction)
}

/// Instructions on control and status words.
fn control(instruction: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    Some(match instruction.mnemonic() {
        Wait => straight(|cpu, _| cpu.check_wait()),
        Fnop => straight(|cpu, op| {
            cpu.check_x87()?;
            cpu.float.instruction_pointer = address(cpu, op);
            cpu.float.opcode = 0x1d0;
            Ok(())
        }),
        // What remains of the 8087 and 80287 does nothing.
        Fneni | Fndisi | Fnsetpm => straight(|cpu, _| cpu.check_x87_nowait()),
        Fninit => straight(|cpu, _| {
            cpu.check_x87_nowait()?;
            cpu.float.init_x87();
            Ok(())
        }),
        Fnclex => straight(|cpu, _| {
            cpu.check_x87_nowait()?;
            cpu.float.clear_exceptions();
            Ok(())
        }),
        Fldcw => straight(|cpu, op| {
            cpu.check_x87()?;
            let value: u16 = cpu.read(op)?;
            cpu.float.set_control(value);
            Ok(())
        }),
        Fnstcw => straight(|cpu, op| {
            cpu.check_x87_nowait()?;
            let value = cpu.float.control;
            cpu.write(op, value)
        }),
        Fnstsw if is_register(instruction, 0) => straight(|cpu, _| {
            cpu.check_x87_nowait()?;
            let value = cpu.float.status;
            cpu.set_reg(slot::RAX, value);
            Ok(())
        }),
        Fnstsw => straight(|cpu, op| {
            cpu.check_x87_nowait()?;
            let value = cpu.float.status;
            cpu.write(op, value)
        }),
        _ => return None,
    })
}

fn address(cpu: &Cpu, op: &Op) -> u64 {
    cpu.slot(slot::RIP).wrapping_add(op.offset.into())
}

fn layout<const WIDE: bool>(cpu: &Cpu) -> Layout {
    Layout {
        wide: WIDE,
        protected: cpu.is_protected(),
    }
}

/// FLDENV, FNSTENV, FRSTOR and FNSAVE.
fn environment(instruction: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match instruction.code() {
        Fldenv_m14byte => load::<false, false>(),
        Fldenv_m28byte => load::<true, false>(),
        Frstor_m94byte => load::<false, true>(),
        Frstor_m108byte => load::<true, true>(),
        Fnstenv_m14byte => store::<false, false>(),
        Fnstenv_m28byte => store::<true, false>(),
        Fnsave_m94byte => store::<false, true>(),
        Fnsave_m108byte => store::<true, true>(),
        _ => return None,
    })
}

fn load<const WIDE: bool, const ALL: bool>() -> Handler {
    straight(|cpu, op| {
        cpu.check_x87()?;
        let layout = layout::<WIDE>(cpu);
        let mut image = [0; 108];
        let at = cpu.ea(op);
        if ALL {
            cpu.read_bytes(at, op.seg, &mut image[..layout.save_bytes()])?;
            cpu.float.load_all(&image, layout);
        } else {
            cpu.read_bytes(at, op.seg, &mut image[..layout.environment_bytes()])?;
            cpu.float.load_environment(&image, layout);
        }
        Ok(())
    })
}

fn store<const WIDE: bool, const ALL: bool>() -> Handler {
    straight(|cpu, op| {
        cpu.check_x87_nowait()?;
        let layout = layout::<WIDE>(cpu);
        let mut after = cpu.float.clone();
        let (image, bytes) = if ALL {
            (after.store_all(layout), layout.save_bytes())
        } else {
            (after.store_environment(layout), layout.environment_bytes())
        };
        cpu.write_bytes(cpu.ea(op), op.seg, &image[..bytes])?;
        cpu.float = after;
        Ok(())
    })
}

/// FXSAVE and FXRSTOR.
fn save(instruction: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match instruction.code() {
        Fxsave_m512byte => straight(fxsave::<false>),
        Fxsave64_m512byte => straight(fxsave::<true>),
        Fxrstor_m512byte => straight(fxrstor::<false>),
        Fxrstor64_m512byte => straight(fxrstor::<true>),
        _ => return None,
    })
}

fn check_fxsave(cpu: &mut Cpu, op: &Op) -> Result {
    if cpu.cr0 & (CR0_EM | CR0_TS) != 0 {
        return Err(cpu.device_not_available());
    }
    // Here, unlike elsewhere, the stack segment's fault comes before that of alignment.
    if op.seg == slot::SS && !is_canonical(cpu.ea(op)) {
        return Err(cpu.raise(Exception::StackFault(0)));
    }
    cpu.check_aligned(op, 16)
}

/// Bytes of an image that hold XMM registers: all in 64-bit mode, half elsewhere, none before
/// the system sets CR4.OSFXSR.
fn image_bytes(cpu: &Cpu) -> usize {
    if cpu.cr4 & CR4_OSFXSR == 0 {
        160
    } else if cpu.is_64_bit() {
        416
    } else {
        288
    }
}

fn fxsave<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result {
    check_fxsave(cpu, op)?;
    let mut image = cpu.float.to_fxsave();
    if !WIDE {
        // The selectors that follow 32-bit pointers are no longer kept and read as zero.
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    let (at, bytes) = (cpu.ea(op), image_bytes(cpu));
    cpu.check_writable(at, FXSAVE_BYTES as u64, op.seg)?;
    cpu.write_bytes(at, op.seg, &image[..bytes])
}

fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result {
    check_fxsave(cpu, op)?;
    let mut image = [0; FXSAVE_BYTES];
    cpu.read_bytes(cpu.ea(op), op.seg, &mut image)?;
    let sse = image_bytes(cpu);
    if !WIDE {
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
    if sse > 160 {
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(cpu.general_protection(0));
        }
        cpu.float.mxcsr = mxcsr;
        cpu.float.load_xmm(&image, (sse - 160) / 16);
    }
    cpu.float.load_x87(&image);
    Ok(())
}

/// What an arithmetic instruction carries in `Op::imm`: opcode, routine, and whether its flags
/// are results.
fn pack(opcode: u16, routine: X87Routine) -> u64 {
    u64::from(opcode & 0x7ff) | u64::from(routine.0) << 16
}

fn routine(op: &Op) -> X87Routine {
    X87Routine((op.imm >> 16) as u16)
}

/// Everything that the host computes.
fn arithmetic(instruction: &Instruction) -> Option<Lowered> {
    let code = instruction.code();
    let info = code.op_code();
    // The forms with a preceding WAIT are two instructions to the processor.
    if info.fwait() || info.op_code_len() == 0 {
        return None;
    }
    let first = if info.op_code_len() == 2 {
        (info.op_code() >> 8) as u8
    } else {
        info.op_code() as u8
    };
    if first & 0xf8 != 0xd8 || info.table() != OpCodeTableKind::Normal {
        return None;
    }
    if info.op_code_len() == 2 {
        return Some(register_form(instruction, first, info.op_code() as u8));
    }
    let group = info.group_index() as u8;
    let bytes = instruction.memory_size().size() as u8;
    let opcode = u16::from(first & 7) << 8 | u16::from(modrm(instruction, group));
    let handler = memory_form(first, group)?;
    Some(Lowered {
        handler,
        dst: bytes,
        src: 0,
        imm: pack(opcode, X87Routine::memory(first, group)),
    })
}

fn register_form(instruction: &Instruction, first: u8, second: u8) -> Lowered {
    use Mnemonic::*;
    // Of two registers one is ST(0), so that the sum of their numbers is the other's.
    let index: usize = (0..instruction.op_count())
        .filter(|operand| instruction.op_kind(*operand) == OpKind::Register)
        .map(|operand| instruction.op_register(operand).number())
        .sum();
    let form = second | index as u8 & 7;
    let handler = match instruction.mnemonic() {
        Fcomi | Fcomip | Fucomi | Fucomip => straight(|cpu, op| {
            let flags = run_register(cpu, op)?;
            cpu.flags = Flags::from_rflags(flags & !OF);
            Ok(())
        }),
        _ => straight(|cpu, op| run_register(cpu, op).map(|_| ())),
    };
    let opcode = u16::from(first & 7) << 8 | u16::from(form);
    Lowered {
        handler,
        dst: 0,
        src: 0,
        imm: pack(opcode, X87Routine::register(first, form)),
    }
}

fn place(cpu: &Cpu, op: &Op, data_pointer: Option<u64>) -> Place {
    Place {
        instruction_pointer: address(cpu, op),
        data_pointer,
        opcode: op.imm as u16 & 0x7ff,
    }
}

fn run_register(cpu: &mut Cpu, op: &Op) -> Result<u64> {
    cpu.check_x87()?;
    let place = place(cpu, op, None);
    let flags = cpu.flags.to_rflags();
    let mut operand = X87Operand::default();
    let outcome = cpu
        .float
        .execute_x87(routine(op), place, &mut operand, flags);
    Ok(outcome.flags)
}

/// The handler of a memory form; `None` for those that load or store control state.
fn memory_form(first: u8, group: u8) -> Option<Handler> {
    let loads = match (first, group) {
        (0xd8 | 0xda | 0xdc | 0xde, _) | (0xd9 | 0xdb | 0xdd | 0xdf, 0) => true,
        (0xdb, 5) | (0xdf, 4 | 5) => true,
        (0xd9, 2 | 3) | (0xdb, 1..=3 | 7) | (0xdd, 1..=3) | (0xdf, 1..=3 | 6 | 7) => false,
        _ => return None,
    };
    Some(if loads {
        straight(|cpu, op| {
            cpu.check_x87()?;
            let at = cpu.ea(op);
            let mut operand = X87Operand::default();
            let bytes = usize::from(op.dst).min(operand.0.len());
            cpu.read_bytes(at, op.seg, &mut operand.0[..bytes])?;
            let place = place(cpu, op, Some(cpu.offset(op)));
            let flags = cpu.flags.to_rflags();
            cpu.float
                .execute_x87(routine(op), place, &mut operand, flags);
            Ok(())
        })
    } else {
        straight(|cpu, op| {
            cpu.check_x87()?;
            let place = place(cpu, op, Some(cpu.offset(op)));
            let flags = cpu.flags.to_rflags();
            let mut operand = X87Operand::default();
            let bytes = usize::from(op.dst).min(operand.0.len());
            let mut after = cpu.float.clone();
            let outcome = after.execute_x87(routine(op), place, &mut operand, flags);
            let at = cpu.ea(op);
            if outcome.stores {
                cpu.write_bytes(at, op.seg, &operand.0[..bytes])?;
            } else {
                cpu.check_writable(at, bytes as u64, op.seg)?;
            }
            cpu.float = after;
            Ok(())
        })
    })
}

/// The ModRM byte of an instruction with a memory operand, put together again.
fn modrm(instruction: &Instruction, group: u8) -> u8 {
    use iced_x86::Register;
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let displacement = instruction.memory_displ_size();
    let absolute = base == Register::None && index == Register::None;
    let sixteen = base.size() == 2 || index.size() == 2 || absolute && displacement == 2;
    let (mode, rm) = if sixteen {
        let rm = match (base, index) {
            (Register::BX, Register::SI) => 0,
            (Register::BX, Register::DI) => 1,
            (Register::BP, Register::SI) => 2,
            (Register::BP, Register::DI) => 3,
            (Register::SI, _) => 4,
            (Register::DI, _) => 5,
            (Register::BX, _) => 7,
            _ => 6,
        };
        (displacement.min(2), rm)
    } else if base == Register::RIP || base == Register::EIP {
        (0, 5)
    } else {
        let low = base.number() as u8 & 7;
        let sib = index != Register::None || absolute || low == 4;
        let mode = match displacement {
            1 => 1,
            0 => 0,
            _ if base == Register::None => 0,
            _ => 2,
        };
        (mode, if sib { 4 } else { low })
    };
    let mode = if sixteen && absolute { 0 } else { mode };
    (mode as u8) << 6 | group << 3 | rm
}
