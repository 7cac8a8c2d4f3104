//! What touches memory element by element: gathers, and loads and stores under a mask.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::{lowered, set_vector, vector};
use crate::cpu::Cpu;
use crate::exec::Result;
use crate::exec::op::{Op, straight};
use crate::exec::value::Value;
use crate::float::lower::{Lowered, moves, register_number};

pub(super) fn lower(instruction: &Instruction) -> Option<Lowered> {
    gather(instruction).or_else(|| masked(instruction))
}

/// The lanes of a register: 4 or 8 bytes each.
#[derive(Clone, Copy)]
struct Lanes {
    halves: [u128; 2],
    bits: u32,
}

impl Lanes {
    fn new(halves: [u128; 2], bytes: usize) -> Self {
        Self {
            halves,
            bits: bytes as u32 * 8,
        }
    }

    /// Half and distance of a lane.
    fn place(self, lane: usize) -> (usize, u32) {
        let at = lane as u32 * self.bits;
        ((at / 128) as usize & 1, at % 128)
    }

    fn mask(self) -> u128 {
        (1 << self.bits) - 1
    }

    fn get(self, lane: usize) -> u64 {
        let (half, at) = self.place(lane);
        (self.halves[half] >> at & self.mask()) as u64
    }

    fn set(&mut self, lane: usize, value: u64) {
        let (half, at) = self.place(lane);
        self.halves[half] = self.halves[half] & !(self.mask() << at) | u128::from(value) << at;
    }

    /// The sign of a lane, which is what masks go by.
    fn is_set(self, lane: usize) -> bool {
        self.get(lane) >> (self.bits - 1) != 0
    }
}

/// What [`Op::imm`] holds for a gather.
#[derive(Clone, Copy)]
struct Gather {
    mask: u8,
    index: u8,
    /// How many elements there are.
    count: u8,
    scale: u8,
    /// The address has 32 bits.
    narrow: bool,
}

impl Gather {
    fn pack(self) -> u64 {
        let bytes = [
            self.mask,
            self.index,
            self.count,
            self.scale,
            self.narrow.into(),
            0,
            0,
            0,
        ];
        u64::from_le_bytes(bytes)
    }

    fn unpack(imm: u64) -> Self {
        let [mask, index, count, scale, narrow, ..] = imm.to_le_bytes();
        Self {
            mask,
            index,
            count,
            scale,
            narrow: narrow != 0,
        }
    }
}

fn gather(instruction: &Instruction) -> Option<Lowered> {
    let (index_bytes, element_bytes) = match instruction.mnemonic() {
        M::Vpgatherdd | M::Vgatherdps => (4, 4),
        M::Vpgatherdq | M::Vgatherdpd => (4, 8),
        M::Vpgatherqd | M::Vgatherqps => (8, 4),
        M::Vpgatherqq | M::Vgatherqpd => (8, 8),
        _ => return None,
    };
    let (data, index) = (instruction.op0_register(), instruction.memory_index());
    let count = (data.size() / element_bytes).min(index.size() / index_bytes);
    let narrow = match instruction.memory_base() {
        Register::None => instruction.memory_displ_size() == 4,
        base => base.size() == 4,
    };
    let gather = Gather {
        mask: register_number(instruction.op2_register()),
        index: index.number() as u8,
        count: count as u8,
        scale: instruction.memory_index_scale().trailing_zeros() as u8,
        narrow,
    };
    let handler = match (index_bytes, element_bytes) {
        (4, 4) => straight(gather_elements::<4, u32>),
        (4, _) => straight(gather_elements::<4, u64>),
        (_, 4) => straight(gather_elements::<8, u32>),
        _ => straight(gather_elements::<8, u64>),
    };
    Some(lowered(instruction, handler, gather.pack()))
}

/// A gather. An element that has come is no longer asked for by the mask, so that only those from the one
/// that faults on are asked for again when the instruction is restarted (SDM vol. 2, VPGATHERDD).
fn gather_elements<const INDEX: usize, T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.check_avx()?;
    let gather = Gather::unpack(op.imm);
    let index = Lanes::new(vector(cpu, gather.index), INDEX);
    let mut data = Lanes::new(vector(cpu, op.dst), T::BYTES as usize);
    let mut mask = Lanes::new(vector(cpu, gather.mask), T::BYTES as usize);
    for lane in 0..usize::from(gather.count) {
        if !mask.is_set(lane) {
            mask.set(lane, 0);
            set_vector(cpu, gather.mask, mask.halves);
            continue;
        }
        let distance = match INDEX {
            4 => index.get(lane) as i32 as u64,
            _ => index.get(lane),
        };
        let at = element_address(cpu, op, gather, distance);
        let value: T = cpu.load(at, op.seg)?;
        data.set(lane, value.zero_extend());
        mask.set(lane, 0);
        set_vector(cpu, op.dst, data.halves);
        set_vector(cpu, gather.mask, mask.halves);
    }
    // Only what the elements fill stays.
    let used = u32::from(gather.count) * T::BITS;
    let kept = |half: u32| match used.saturating_sub(half * 128) {
        0 => 0,
        128.. => u128::MAX,
        bits => (1 << bits) - 1,
    };
    let [low, high] = data.halves;
    set_vector(cpu, op.dst, [low & kept(0), high & kept(1)]);
    set_vector(cpu, gather.mask, [0; 2]);
    Ok(())
}

/// The linear address of an element.
fn element_address(cpu: &Cpu, op: &Op, gather: Gather, distance: u64) -> u64 {
    let distance = distance.wrapping_shl(gather.scale.into());
    let linear = cpu.ea(op).wrapping_add(distance);
    if !cpu.is_64_bit() {
        return linear & 0xffff_ffff;
    }
    if gather.narrow {
        // What wraps is the offset in the segment.
        let base = cpu.slot(op.seg);
        return (linear.wrapping_sub(base) & 0xffff_ffff).wrapping_add(base);
    }
    linear
}

/// VMASKMOVPS, VPMASKMOVD and their kin: what the mask leaves out is not touched, and does not fault.
fn masked(instruction: &Instruction) -> Option<Lowered> {
    let double = match instruction.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => false,
        M::Vmaskmovpd | M::Vpmaskmovq => true,
        M::Vmaskmovdqu => {
            // The implied memory operand comes before the registers.
            let handler = straight(|cpu, op| {
                cpu.check_avx()?;
                let (value, mask) = (vector(cpu, op.dst)[0], vector(cpu, op.src)[0]);
                moves::store_masked(cpu, op, &value.to_le_bytes(), &mask.to_le_bytes())
            });
            return Some(Lowered {
                handler,
                dst: register_number(instruction.op1_register()),
                src: register_number(instruction.op2_register()),
                imm: 0,
            });
        }
        _ => return None,
    };
    let stores = instruction.op0_kind() == OpKind::Memory;
    let handler = match (stores, double) {
        (false, false) => straight(load_masked::<u32>),
        (false, true) => straight(load_masked::<u64>),
        (true, false) => straight(store_masked::<u32>),
        (true, true) => straight(store_masked::<u64>),
    };
    let bytes = instruction.op1_register().size() as u64;
    let third = register_number(instruction.op2_register());
    Some(lowered(instruction, handler, bytes | u64::from(third) << 8))
}

fn load_masked<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.check_avx()?;
    let size = T::BYTES as usize;
    let mask = Lanes::new(vector(cpu, op.src), size);
    let mut data = Lanes::new([0; 2], size);
    let at = cpu.ea(op);
    for lane in 0..(op.imm & 0xff) as usize / size {
        if mask.is_set(lane) {
            let value: T = cpu.load(at.wrapping_add((lane * size) as u64), op.seg)?;
            data.set(lane, value.zero_extend());
        }
    }
    set_vector(cpu, op.dst, data.halves);
    Ok(())
}

fn store_masked<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.check_avx()?;
    let size = T::BYTES as usize;
    let mask = Lanes::new(vector(cpu, op.src), size);
    let data = Lanes::new(vector(cpu, (op.imm >> 8) as u8), size);
    let base = cpu.ea(op);
    let at = |lane: usize| base.wrapping_add((lane * size) as u64);
    let lanes = (op.imm & 0xff) as usize / size;
    let asked = (0..lanes).filter(|lane| mask.is_set(*lane));
    for lane in asked.clone() {
        cpu.check_writable(at(lane), T::BYTES, op.seg)?;
    }
    for lane in asked {
        cpu.store(at(lane), op.seg, T::from_u64(data.get(lane)))?;
    }
    Ok(())
}
