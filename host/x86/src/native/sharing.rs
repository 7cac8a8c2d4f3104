//! Memory operands that share a look into the software TLB: those of one trace by the same
//! registers, near each other, while none of these registers changes.
//!
//! The first of them, its *leader*, looks for all bytes that the others will touch, and notes where
//! they are in the host's memory; the others, which *follow*, need nothing but that. A trace with such
//! operands is made twice. Whatever goes wrong in the first copy (a miss, bytes in two pages, an
//! instruction that the interpreter has to do) goes on in the second, where each operand looks by
//! itself: so what a leader noted never outlives a stay in translated code.

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic as M,
    OpKind, Register,
};

use super::plain::is_plain;
use super::stack::row;
use super::translate::writes;

/// Bytes from the first to the last that share a look, at most. With more it crosses pages too often.
const REACH: i64 = 512;
/// Looks that can be remembered at a time.
pub(super) const SLOTS: usize = 4;

/// What an operand's address consists of, but for the displacement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) base: Register,
    pub(super) index: Register,
    /// Two to which power the index is multiplied with.
    pub(super) scale: u8,
}

impl Key {
    fn of(base: Register) -> Self {
        Self {
            base,
            index: Register::None,
            scale: 0,
        }
    }

    fn uses(&self, register: Register) -> bool {
        self.base == register || self.index == register
    }
}

/// What a leader looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lead {
    pub(super) key: Key,
    /// From what the key says to the first byte.
    pub(super) displacement: i32,
    pub(super) bytes: u32,
    /// Some of the bytes will be written.
    pub(super) write: bool,
}

/// An instruction whose memory operand shares a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member {
    /// Where it is remembered.
    pub(super) slot: usize,
    /// From the first byte that was looked for to the operand.
    pub(super) delta: i32,
    /// It looks for itself and the others.
    pub(super) lead: Option<Lead>,
}

#[derive(Debug, Clone, Copy)]
struct Access {
    key: Key,
    displacement: i64,
    bytes: i64,
    write: bool,
}

#[derive(Debug)]
struct Group {
    key: Key,
    low: i64,
    high: i64,
    write: bool,
    /// What RSP was less, or more, where it leads, than at the block's beginning.
    moved: i64,
    /// The instructions, and their displacements.
    members: Vec<(usize, i64)>,
}

/// Which instructions of a block share looks, by their number; empty when none do.
pub(super) fn find(
    instructions: &[Instruction],
    information: &mut InstructionInfoFactory,
) -> Vec<Option<Member>> {
    let mut open: Vec<Group> = Vec::new();
    let mut done: Vec<Group> = Vec::new();
    // From RSP at the block's beginning to RSP.
    let mut moved = 0;
    let mut number = 0;
    while let Some(i) = instructions.get(number) {
        let row = row(&instructions[number..]);
        if let Some(mut access) = access_of(row, information) {
            if access.key.base == Register::RSP {
                access.displacement += moved;
            }
            join(&mut open, &mut done, &access, (number, moved));
        }
        let adjusted = adjusts(row);
        for i in row {
            let options = InstructionInfoOptions::NO_MEMORY_USAGE;
            let info = information.info_options(i, options);
            for used in info.used_registers() {
                let register = used.register().full_register();
                let tracked = register == Register::RSP && adjusted.is_some();
                if !writes(used.access()) || tracked {
                    continue;
                }
                let (ended, rest) = open.drain(..).partition(|group| group.key.uses(register));
                open = rest;
                done.extend::<Vec<_>>(ended);
            }
        }
        moved += adjusted.unwrap_or(0);
        let last = &row[row.len() - 1];
        if matches!(
            last.flow_control(),
            FlowControl::Call | FlowControl::IndirectCall
        ) {
            // Whatever was called has looked for things of its own, and changed any register.
            done.append(&mut open);
        }
        if i.is_invalid() {
            break;
        }
        number += row.len();
    }
    done.append(&mut open);
    done.retain(|group| group.members.len() > 1);
    place(&mut done, instructions.len())
}

/// Adds an access to the group that it may share a look with, or begins one.
fn join(
    open: &mut Vec<Group>,
    done: &mut Vec<Group>,
    access: &Access,
    (number, moved): (usize, i64),
) {
    let (low, high) = (access.displacement, access.displacement + access.bytes);
    if let Some(at) = open.iter().position(|group| group.key == access.key) {
        let group = &mut open[at];
        let (lowest, highest) = (group.low.min(low), group.high.max(high));
        if highest - lowest <= REACH {
            (group.low, group.high) = (lowest, highest);
            group.write |= access.write;
            group.members.push((number, low));
            return;
        }
        done.push(open.swap_remove(at));
    }
    open.push(Group {
        key: access.key,
        low,
        high,
        write: access.write,
        moved,
        members: vec![(number, low)],
    });
}

/// Gives each group a slot for as long as it lives; those that get none are left out.
fn place(groups: &mut [Group], instructions: usize) -> Vec<Option<Member>> {
    groups.sort_by_key(|group| group.members[0].0);
    let mut members = Vec::new();
    // The last instruction that uses what a slot remembers.
    let mut used = [None; SLOTS];
    for group in groups {
        let (first, last) = (group.members[0].0, group.members[group.members.len() - 1].0);
        let Some(slot) = used.iter().position(|&until| until < Some(first)) else {
            continue;
        };
        let base = if group.key.base == Register::RSP {
            group.low - group.moved
        } else {
            group.low
        };
        let Ok(displacement) = i32::try_from(base) else {
            continue;
        };
        used[slot] = Some(last);
        members.resize(instructions, None);
        for &(number, at) in &group.members {
            members[number] = Some(Member {
                slot,
                delta: (at - group.low) as i32,
                lead: (number == first).then_some(Lead {
                    key: group.key,
                    displacement,
                    bytes: (group.high - group.low) as u32,
                    write: group.write,
                }),
            });
        }
    }
    members
}

/// What an instruction, or pushes or pops in a row, do to memory by registers; `None` when that is
/// nothing, or not to be shared.
fn access_of(row: &[Instruction], information: &mut InstructionInfoFactory) -> Option<Access> {
    let i = row.first()?;
    let bytes = 8 * row.len() as i64;
    let stack = |displacement, write| Access {
        key: Key::of(Register::RSP),
        displacement,
        bytes,
        write,
    };
    match i.code() {
        Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 | Code::Call_rel32_64 => {
            return Some(stack(-bytes, true));
        }
        Code::Call_rm64 if i.op0_kind() == OpKind::Register => return Some(stack(-bytes, true)),
        Code::Pop_r64 | Code::Retnq => return Some(stack(0, false)),
        Code::Leaveq => {
            return Some(Access {
                key: Key::of(Register::RBP),
                ..stack(0, false)
            });
        }
        _ => {}
    }
    let operand = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory)?;
    let strings = matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && i.op1_kind() == OpKind::Register;
    let known = is_plain(i.mnemonic()) && !strings || super::sse::is_known(i);
    let (base, index) = (i.memory_base(), i.memory_index());
    let bytes = i.memory_size().size() as i64;
    let by_registers = (base.is_gpr64() || base == Register::RIP)
        && (index == Register::None || index.is_gpr64())
        && i.segment_prefix() != Register::FS
        && i.segment_prefix() != Register::GS;
    if !known || !by_registers || !(1..=16).contains(&bytes) {
        return None;
    }
    let options =
        InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
    let write = writes(information.info_options(i, options).op_access(operand));
    Some(Access {
        key: Key {
            base,
            index,
            scale: i.memory_index_scale().trailing_zeros() as u8,
        },
        displacement: i.memory_displacement64() as i64,
        bytes,
        write,
    })
}

/// By how much an instruction, or a row, moves RSP, where that is known.
fn adjusts(row: &[Instruction]) -> Option<i64> {
    let i = row.first()?;
    let bytes = 8 * row.len() as i64;
    let by_immediate = || {
        let rsp = i.op0_kind() == OpKind::Register && i.op0_register() == Register::RSP;
        let immediate = matches!(
            i.op1_kind(),
            OpKind::Immediate8to64 | OpKind::Immediate32to64
        );
        (rsp && immediate).then(|| i.immediate(1) as i64)
    };
    match i.code() {
        Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 => Some(-bytes),
        Code::Pop_r64 if i.op0_register() != Register::RSP => Some(bytes),
        _ => match i.mnemonic() {
            M::Add => by_immediate(),
            M::Sub => by_immediate().map(|by| -by),
            M::Lea
                if i.op0_register() == Register::RSP
                    && i.memory_base() == Register::RSP
                    && i.memory_index() == Register::None =>
            {
                Some(i.memory_displacement64() as i64)
            }
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::code_asm::*;

    use super::*;

    fn found(
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> Vec<Option<Member>> {
        let mut assembler = CodeAssembler::new(64).unwrap();
        write(&mut assembler).unwrap();
        let bytes = assembler.assemble(0).unwrap();
        let decoder = iced_x86::Decoder::new(64, &bytes, 0);
        let instructions: Vec<_> = decoder.into_iter().collect();
        find(&instructions, &mut InstructionInfoFactory::new())
    }

    fn lead(member: Option<Member>) -> (i32, u32, bool) {
        let lead = member.unwrap().lead.unwrap();
        (lead.displacement, lead.bytes, lead.write)
    }

    fn follows(member: Option<Member>) -> (usize, i32) {
        let member = member.unwrap();
        assert_eq!(member.lead, None);
        (member.slot, member.delta)
    }

    #[test]
    fn fields_of_one_object_share_a_look() {
        let members = found(|a| {
            a.mov(rax, qword_ptr(rbx + 24))?;
            a.add(rax, qword_ptr(rsi))?;
            a.mov(dword_ptr(rbx - 4), ecx)?;
            a.mov(dl, byte_ptr(rbx + 100))
        });
        assert_eq!(lead(members[0]), (-4, 105, true));
        assert_eq!(members[0].unwrap().delta, 28);
        assert_eq!(members[1], None);
        assert_eq!(follows(members[2]), (0, 0));
        assert_eq!(follows(members[3]), (0, 104));
    }

    #[test]
    fn a_register_that_changes_ends_it() {
        let members = found(|a| {
            a.mov(rbx, qword_ptr(rbx + 8))?;
            a.mov(rax, qword_ptr(rbx + 8))?;
            a.mov(ecx, dword_ptr(rbx + rax * 4))?;
            a.mov(al, 1)?;
            a.mov(edx, dword_ptr(rbx + rax * 4))
        });
        assert_eq!(members, []);
    }

    #[test]
    fn the_stack_is_followed_while_its_pointer_moves_by_what_is_known() {
        let members = found(|a| {
            a.push(rbp)?;
            a.push(rbx)?;
            a.sub(rsp, 0x18)?;
            a.mov(qword_ptr(rsp + 8), rdi)?;
            a.mov(rax, qword_ptr(rsp + 0x28))?;
            a.add(rsp, 0x18)?;
            a.pop(rbx)?;
            a.ret()
        });
        // From RSP - 32 (the local variable) to 8 bytes above where RSP was.
        assert_eq!(lead(members[0]), (-32, 40, true));
        assert_eq!(members[0].unwrap().delta, 16);
        assert_eq!(members[1], None, "the second of a row");
        assert_eq!(follows(members[3]), (0, 0));
        assert_eq!(follows(members[4]), (0, 32));
        assert_eq!(follows(members[6]), (0, 16));
        assert_eq!(follows(members[7]), (0, 24));
        let members = found(|a| {
            a.push(rbp)?;
            a.mov(rsp, rbx)?;
            a.pop(rbp)
        });
        assert_eq!(members, []);
    }

    #[test]
    fn what_is_too_far_or_too_many_shares_nothing() {
        let members = found(|a| {
            a.mov(rax, qword_ptr(rbx))?;
            a.mov(rcx, qword_ptr(rbx + 600))?;
            a.mov(rcx, qword_ptr(rbx + 608))
        });
        assert_eq!(members[0], None);
        assert_eq!(lead(members[1]), (600, 16, false));
        let all = [rbx, rcx, rdx, rsi, rdi];
        let members = found(|a| {
            for base in all.into_iter().chain(all) {
                a.mov(rax, qword_ptr(base))?;
            }
            Ok(())
        });
        let slots: Vec<_> = members.iter().map(|m| m.map(|m| m.slot)).collect();
        let each = [Some(0), Some(1), Some(2), Some(3), None];
        assert_eq!(slots, [each, each].concat());
    }
}
