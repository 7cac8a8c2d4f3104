//! MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS, alone and repeated.
//!
//! A repeated instruction commits its registers round by round, so that a fault or an answer of a
//! device finds it restartable. Copies and fills run over as much of a page as they can at once.
//! After [`ROUNDS`] rounds the instruction lets interrupts in.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::Result;
use super::alu::{Alu, Cmp};
use super::flags::DF;
use super::op::{Op, slot};
use super::segment::index_of;
use super::value::Value;
use crate::cpu::Cpu;
use crate::host;
use crate::mmu::PAGE_OFFSET;
use crate::state::segment;

/// Rounds after which the instruction is interrupted.
const ROUNDS: u64 = 4096;

/// A string instruction's surroundings.
#[derive(Debug, Clone, Copy)]
struct Context {
    /// Segment of the source.
    source: usize,
    address_size: u64,
    mask: u64,
    backward: bool,
}

impl Context {
    fn of(cpu: &Cpu, instruction: &Instruction) -> Self {
        let size = |kind: OpKind| match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(8),
            _ => None,
        };
        let address_size = size(instruction.op0_kind())
            .or_else(|| size(instruction.op1_kind()))
            .unwrap_or(8);
        Self {
            source: index_of(instruction.memory_segment()),
            address_size,
            mask: if address_size == 8 {
                u64::MAX
            } else {
                (1 << (8 * address_size)) - 1
            },
            backward: cpu.system_flags & DF != 0,
        }
    }

    fn step(self, cpu: &mut Cpu, register: u8, bytes: u64) {
        let by = if self.backward {
            bytes.wrapping_neg()
        } else {
            bytes
        };
        let value = cpu.slot(register).wrapping_add(by);
        cpu.set_reg_sized(register, self.address_size, value);
    }

    /// The linear address at `register` in a segment.
    fn address(
        self,
        cpu: &mut Cpu,
        index: usize,
        register: u8,
        access: (u64, bool),
    ) -> Result<u64> {
        let offset = cpu.slot(register) & self.mask;
        let base = cpu.slot(slot::SEGMENT + index as u8);
        if cpu.is_64_bit() {
            return Ok(offset.wrapping_add(base));
        }
        cpu.check_segment(index, offset, access.0, access.1)?;
        Ok(offset.wrapping_add(base) & 0xffff_ffff)
    }

    /// How many elements lie from `register` on in ascending order within the page and without
    /// wrapping round.
    fn room<T: Value>(self, cpu: &Cpu, register: u8, address: u64) -> u64 {
        let in_page = PAGE_OFFSET + 1 - (address & PAGE_OFFSET);
        let to_wrap = (self.mask - (cpu.slot(register) & self.mask)).saturating_add(1);
        in_page.min(to_wrap) / T::BYTES
    }
}

/// Any string instruction. Ends its block.
pub(crate) fn string(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    match instruction.mnemonic() {
        Mnemonic::Movsb
        | Mnemonic::Stosb
        | Mnemonic::Lodsb
        | Mnemonic::Cmpsb
        | Mnemonic::Scasb
        | Mnemonic::Insb
        | Mnemonic::Outsb => run::<u8>(cpu, instruction),
        Mnemonic::Movsw
        | Mnemonic::Stosw
        | Mnemonic::Lodsw
        | Mnemonic::Cmpsw
        | Mnemonic::Scasw
        | Mnemonic::Insw
        | Mnemonic::Outsw => run::<u16>(cpu, instruction),
        Mnemonic::Movsd
        | Mnemonic::Stosd
        | Mnemonic::Lodsd
        | Mnemonic::Cmpsd
        | Mnemonic::Scasd
        | Mnemonic::Insd
        | Mnemonic::Outsd => run::<u32>(cpu, instruction),
        _ => run::<u64>(cpu, instruction),
    }
}

fn run<T: Value>(cpu: &mut Cpu, instruction: &Instruction) -> Result {
    let context = Context::of(cpu, instruction);
    let next = cpu.rip;
    let repeats = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let mut left = if repeats {
        cpu.slot(slot::RCX) & context.mask
    } else {
        1
    };
    let mut rounds = if cpu.steps() { 1 } else { ROUNDS };
    while left > 0 {
        if rounds == 0 {
            // More to do: the same instruction once more.
            let again = next.wrapping_sub(instruction.len() as u64);
            cpu.rip = if cpu.is_64_bit() {
                again
            } else {
                again & 0xffff_ffff
            };
            return Ok(());
        }
        let (done, go_on) = round::<T>(cpu, instruction, context, left.min(rounds))?;
        if cpu.is_replaying() {
            cpu.commit_round();
        }
        left -= done;
        rounds = rounds.saturating_sub(done);
        if repeats {
            cpu.set_reg_sized(slot::RCX, context.address_size, left);
        }
        if !go_on {
            break;
        }
    }
    Ok(())
}

/// One round, or many at once: how many, and whether the condition lets it go on.
fn round<T: Value>(
    cpu: &mut Cpu,
    instruction: &Instruction,
    context: Context,
    left: u64,
) -> Result<(u64, bool)> {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => {
            return Ok((movs::<T>(cpu, context, left)?, true));
        }
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
            return Ok((stos::<T>(cpu, context, left)?, true));
        }
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => {
            let at = context.address(cpu, context.source, slot::RSI, (T::BYTES, false))?;
            let value = cpu.load::<T>(at, slot::ZERO)?;
            cpu.set_reg(slot::RAX, value);
            context.step(cpu, slot::RSI, T::BYTES);
        }
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => {
            let from = context.address(cpu, context.source, slot::RSI, (T::BYTES, false))?;
            let to = context.address(cpu, segment::ES, slot::RDI, (T::BYTES, false))?;
            let a = cpu.load::<T>(from, slot::ZERO)?;
            let b = cpu.load::<T>(to, slot::ZERO)?;
            cpu.flags = Cmp::apply(a, b, cpu.flags).1;
            context.step(cpu, slot::RSI, T::BYTES);
            context.step(cpu, slot::RDI, T::BYTES);
            return Ok((1, goes_on(cpu, instruction)));
        }
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
            let to = context.address(cpu, segment::ES, slot::RDI, (T::BYTES, false))?;
            let b = cpu.load::<T>(to, slot::ZERO)?;
            cpu.flags = Cmp::apply(cpu.reg::<T>(slot::RAX), b, cpu.flags).1;
            context.step(cpu, slot::RDI, T::BYTES);
            return Ok((1, goes_on(cpu, instruction)));
        }
        M::Insb | M::Insw | M::Insd => {
            let port = cpu.reg::<u16>(slot::RDX);
            cpu.check_port(port, T::BYTES as u8)?;
            let to = context.address(cpu, segment::ES, slot::RDI, (T::BYTES, true))?;
            cpu.check_writable(to, T::BYTES, slot::ZERO)?;
            let value = cpu.port_read(port, T::BYTES as u8)?;
            cpu.store(to, slot::ZERO, T::from_u64(value))?;
            context.step(cpu, slot::RDI, T::BYTES);
        }
        _ => {
            let port = cpu.reg::<u16>(slot::RDX);
            cpu.check_port(port, T::BYTES as u8)?;
            let from = context.address(cpu, context.source, slot::RSI, (T::BYTES, false))?;
            let value = cpu.load::<T>(from, slot::ZERO)?;
            cpu.port_write(port, T::BYTES as u8, value.zero_extend() as u32)?;
            context.step(cpu, slot::RSI, T::BYTES);
        }
    }
    Ok((1, true))
}

fn goes_on(cpu: &Cpu, instruction: &Instruction) -> bool {
    if instruction.has_repne_prefix() {
        !cpu.flags.zero()
    } else {
        cpu.flags.zero()
    }
}

fn movs<T: Value>(cpu: &mut Cpu, context: Context, left: u64) -> Result<u64> {
    let access = T::BYTES;
    let from = context.address(cpu, context.source, slot::RSI, (access, false))?;
    let to = context.address(cpu, segment::ES, slot::RDI, (access, true))?;
    let count = left
        .min(context.room::<T>(cpu, slot::RSI, from))
        .min(context.room::<T>(cpu, slot::RDI, to));
    if !context.backward && count > 1 {
        let bytes = count * T::BYTES;
        let in_segment = cpu.is_64_bit()
            || context
                .address(cpu, context.source, slot::RSI, (bytes, false))
                .is_ok()
                && context
                    .address(cpu, segment::ES, slot::RDI, (bytes, true))
                    .is_ok();
        let (source, target) = (cpu.tlb.entry(from), cpu.tlb.entry(to));
        if in_segment && source.reads(from, bytes) && target.writes(to, bytes) {
            let (host_from, host_to) = (source.host(from), target.host(to));
            let ahead = (host_to as usize).wrapping_sub(host_from as usize);
            if ahead == 0 || ahead >= bytes as usize {
                // SAFETY: both entries serve all bytes, each in one page of RAM; the target does
                // not begin within the source.
                #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
                unsafe {
                    host::copy(host_to, host_from, bytes as usize);
                }
                target.mark(cpu.mark);
                context.step(cpu, slot::RSI, bytes);
                context.step(cpu, slot::RDI, bytes);
                return Ok(count);
            }
        }
    }
    let value = cpu.load::<T>(from, slot::ZERO)?;
    cpu.store(to, slot::ZERO, value)?;
    context.step(cpu, slot::RSI, T::BYTES);
    context.step(cpu, slot::RDI, T::BYTES);
    Ok(1)
}

fn stos<T: Value>(cpu: &mut Cpu, context: Context, left: u64) -> Result<u64> {
    let to = context.address(cpu, segment::ES, slot::RDI, (T::BYTES, true))?;
    let value: T = cpu.reg(slot::RAX);
    let count = left.min(context.room::<T>(cpu, slot::RDI, to));
    if !context.backward && count > 1 {
        let bytes = count * T::BYTES;
        let in_segment = cpu.is_64_bit()
            || context
                .address(cpu, segment::ES, slot::RDI, (bytes, true))
                .is_ok();
        let target = cpu.tlb.entry(to);
        if in_segment && target.writes(to, bytes) {
            // SAFETY: the entry serves all bytes, in one page of RAM.
            #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
            unsafe {
                host::fill(target.host(to), value, count as usize);
            }
            target.mark(cpu.mark);
            context.step(cpu, slot::RDI, bytes);
            return Ok(count);
        }
    }
    cpu.store(to, slot::ZERO, value)?;
    context.step(cpu, slot::RDI, T::BYTES);
    Ok(1)
}
