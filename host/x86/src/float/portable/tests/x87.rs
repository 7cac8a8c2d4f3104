//! x87: every instruction that is not control, on stacks of every kind.
//!
//! Manufacturers differ in corners: what a comparison leaves when its exception is not masked,
//! whether FCMOV and FCOMI clear C1, how far FPREM goes at a time, what is inexact. The portable
//! instructions have AMD's ways, so these tests run on AMD's processors.

use super::host;
use super::operands::{self, Random};
use crate::float::portable;
use crate::float::state::FloatState;
use crate::float::x87::{X87Operand, X87Routine};

/// All routines that the interpreter makes use of.
fn routines() -> Vec<X87Routine> {
    let mut routines = Vec::new();
    for opcode in 0xd8..=0xdf_u8 {
        for form in 0xc0..=0xff_u8 {
            let undefined = match opcode {
                0xd9 => matches!(form, 0xd0..=0xd7 | 0xe2 | 0xe3 | 0xe6 | 0xe7 | 0xef),
                0xda => form >= 0xe0 && form != 0xe9,
                0xdb => matches!(form, 0xe0..=0xe7 | 0xf8..),
                0xdd => form >= 0xf0,
                0xde => matches!(form, 0xd8 | 0xda..=0xdf),
                0xdf => matches!(form, 0xe0..=0xe7 | 0xf8..),
                _ => false,
            };
            if !undefined {
                routines.push(X87Routine::register(opcode, form));
            }
        }
        for group in 0..8 {
            let control = match opcode {
                0xd9 => matches!(group, 1 | 4..),
                0xdb => matches!(group, 4 | 6),
                0xdd => matches!(group, 4..),
                _ => false,
            };
            if !control {
                routines.push(X87Routine::memory(opcode, group));
            }
        }
    }
    routines
}

/// F2XM1 to FPATAN, FYL2XP1, FSINCOS, FSIN and FCOS: results may differ in their last place.
fn is_transcendental(routine: X87Routine) -> bool {
    [0xf0, 0xf1, 0xf2, 0xf3, 0xf9, 0xfb, 0xfe, 0xff]
        .iter()
        .any(|form| routine == X87Routine::register(0xd9, *form))
}

/// Is this one of AMD's processors? If not, says so.
fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    let amd = (vendor.ebx, vendor.edx, vendor.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163);
    if !amd {
        eprintln!("SKIP: the x87's corners are compared with AMD's processors only");
    }
    amd
}

struct States {
    random: Random,
    specials: Vec<u128>,
    singles: Vec<u32>,
    doubles: Vec<u64>,
}

impl States {
    fn new() -> Self {
        Self {
            random: Random::new(),
            specials: operands::extendeds(),
            singles: operands::singles(),
            doubles: operands::doubles(),
        }
    }

    /// Registers, tags, TOP and the control word by chance; most often nothing is empty that
    /// counts.
    fn state(&mut self) -> FloatState {
        let random = &mut self.random;
        let mut state = FloatState::default();
        for register in &mut state.st {
            *register = operands::extended(random, &self.specials);
        }
        let top = random.below(8);
        state.set_status((top as u16) << 11 | random.next() as u16 & 0x4740);
        state.tags = match random.below(8) {
            0 => random.next() as u8,
            1 => 0xff,
            _ => 0b0111_1111_u8.rotate_left(top as u32),
        };
        let masks = if random.below(4) == 0 {
            random.next() as u16 & 0x3f
        } else {
            0x3f
        };
        let modes = [0, 2, 3][random.below(3)] << 8 | (random.below(4) as u16) << 10;
        state.set_control(masks | modes);
        state
    }

    fn memory(&mut self, routine: X87Routine) -> X87Operand {
        let random = &mut self.random;
        let opcode = routine.0.wrapping_sub(X87Routine::MEMORY) >> 3;
        let value = match opcode {
            0 | 1 => operands::single(random, &self.singles).into(),
            4 | 5 => operands::double(random, &self.doubles).into(),
            3 if random.below(2) == 0 => operands::extended(random, &self.specials),
            7 if random.below(2) == 0 => (0..19).fold(0, |value, digit| {
                value | (random.below(10) as u128) << (digit * 4)
            }),
            _ => {
                let shift = random.below(64);
                random.wide() >> shift
            }
        };
        X87Operand(value.to_le_bytes())
    }
}

/// What an instruction finds or leaves.
#[derive(PartialEq, Eq)]
struct Outcome {
    state: FloatState,
    operand: X87Operand,
    flags: u64,
}

impl std::fmt::Debug for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = &self.state;
        write!(
            f,
            "control {:03x} status {:04x} tags {:08b} flags {:x} memory {:x} st",
            state.control,
            state.status,
            state.tags,
            self.flags,
            u128::from_le_bytes(self.operand.0)
        )?;
        state.st.iter().try_for_each(|st| write!(f, " {st:x}"))
    }
}

fn run(
    function: fn(X87Routine, &mut FloatState, &mut X87Operand, u64) -> u64,
    routine: X87Routine,
    before: &Outcome,
) -> Outcome {
    let mut state = before.state.clone();
    let mut operand = before.operand;
    let flags = function(routine, &mut state, &mut operand, before.flags);
    // FXSAVE also writes the host's pointers and its mask of MXCSR.
    let mut left = FloatState::default();
    left.control = state.control;
    left.status = state.status;
    left.tags = state.tags;
    left.st = state.st;
    Outcome {
        state: left,
        operand,
        flags,
    }
}

fn name(routine: X87Routine) -> String {
    match routine.0.checked_sub(X87Routine::MEMORY) {
        Some(memory) => format!("{:02x} /{}", 0xd8 + (memory >> 3), memory & 7),
        None => format!(
            "{:02x} {:02x}",
            0xd8 + (routine.0 >> 6),
            0xc0 | routine.0 & 0x3f
        ),
    }
}

/// How often the results of an instruction differ, and the first of them.
type Differences = std::collections::BTreeMap<String, (u32, String)>;

fn report(differences: &Differences) {
    let report: String = differences
        .iter()
        .map(|(name, (count, text))| format!("{name}: {count} {text}\n"))
        .collect();
    assert!(differences.is_empty(), "{report}");
}

#[test]
fn instructions_do_what_those_of_the_host_do() {
    if !is_amd() {
        return;
    }
    let mut states = States::new();
    let mut differences = Differences::new();
    for routine in routines() {
        if is_transcendental(routine) {
            continue;
        }
        for _ in 0..3_000 {
            let before = Outcome {
                state: states.state(),
                operand: states.memory(routine),
                flags: 2 | states.random.next() & 0xd5,
            };
            let expected = run(host::x87, routine, &before);
            let found = run(portable::x87, routine, &before);
            if expected != found {
                let text = || format!("\n  {before:?}\nh {expected:?}\np {found:?}");
                differences
                    .entry(name(routine))
                    .or_insert_with(|| (0, text()))
                    .0 += 1;
            }
        }
    }
    report(&differences);
}

/// How far two registers lie apart, in units of the last place; `None` if they are no neighbours.
fn distance(a: u128, b: u128) -> Option<u128> {
    const SIGN: u128 = 1 << 79;
    let linear = |register: u128| {
        let magnitude = register & (SIGN - 1);
        // Normal numbers have their leading bit, which does not count.
        let exponent = magnitude >> 64;
        (exponent << 63) + (magnitude & (u128::from(u64::MAX) >> 1))
    };
    (a & SIGN == b & SIGN).then(|| linear(a).abs_diff(linear(b)))
}

/// Operands for which the manual says what comes out: |ST(0)| below one for F2XM1, and within
/// 1 − √½ for FYL2XP1.
fn is_defined(form: u8, state: &FloatState) -> bool {
    let exponent = state.st[0] >> 64 & 0x7fff;
    match form {
        0xf0 => exponent < 0x3fff,
        0xf9 => exponent < 0x3ffd,
        _ => true,
    }
}

#[test]
fn transcendental_instructions_are_near_those_of_the_host() {
    const C1: u16 = 1 << 9;
    if !is_amd() {
        return;
    }
    let mut states = States::new();
    let mut differences = Differences::new();
    for form in [0xf0, 0xf1, 0xf2, 0xf3, 0xf9, 0xfb, 0xfe, 0xff] {
        let routine = X87Routine::register(0xd9, form);
        for _ in 0..20_000 {
            let before = Outcome {
                state: states.state(),
                operand: X87Operand::default(),
                flags: 2,
            };
            if !is_defined(form, &before.state) {
                continue;
            }
            let mut expected = run(host::x87, routine, &before);
            let found = run(portable::x87, routine, &before);
            // Whether a result was rounded up says little if it may differ in its last place.
            let differs = expected.state.status ^ found.state.status;
            expected.state.status ^= differs & C1;
            for (expected, found) in expected.state.st.iter_mut().zip(found.state.st) {
                if distance(*expected, found).is_some_and(|distance| distance <= 1) {
                    *expected = found;
                }
            }
            if expected != found {
                let text = || format!("\n  {before:?}\nh {expected:?}\np {found:?}");
                let entry = differences
                    .entry(name(routine))
                    .or_insert_with(|| (0, String::new()));
                entry.0 += 1;
                if entry.0 <= 4 {
                    entry.1 += &text();
                }
            }
        }
    }
    report(&differences);
}
