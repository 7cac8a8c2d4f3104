//! Programs from numbers: one for the state that a program starts with, and one for each of its steps.
//!
//! A step is an instruction or opens something: what a branch skips, a loop, a routine. What is open
//! closes after so many steps, the innermost first, so that every program ends.

use crate::catalog::Catalog;
use crate::layout::*;
use crate::operands::{free, plain};
use crate::program::*;
use crate::random::Random;
use crate::steps;

/// Steps of a program at most.
pub(crate) const MOST_STEPS: usize = 64;
/// Bytes that the largest step may take, with all that it closes.
const STEP_ROOM: usize = 512;

/// A program with the state and memory that it starts with.
pub(crate) struct Sequence {
    pub(crate) input: Machine,
    pub(crate) memory: [Vec<u8>; 2],
    /// From `input.rip` on.
    pub(crate) code: Vec<u8>,
    /// Where it ends unless by an exception.
    pub(crate) end: u64,
    pub(crate) stores_to_code: bool,
    borders: Vec<(u64, u64)>,
}

impl Sequence {
    /// Flags that are undefined where an instruction begins.
    pub(crate) fn undefined(&self, address: u64) -> u64 {
        let found = self
            .borders
            .binary_search_by_key(&address, |border| border.0);
        found.map_or(0, |index| self.borders[index].1)
    }
}

/// Something that closes later.
struct Open {
    kind: Kind,
    /// Steps that are left of it.
    steps: u64,
    /// What was known where it began.
    known: Known,
    /// Jumps behind it, and the flags that are undefined at some of them.
    exits: Vec<Hole>,
    undefined: u64,
    /// Calls a routine that was closed.
    calls: bool,
}

enum Kind {
    /// Skipped or not.
    Skipped {
        otherwise: bool,
    },
    Otherwise,
    Loop(Loop),
    Routine {
        address: u64,
        popped: u16,
    },
}

struct Loop {
    head: u64,
    counter: usize,
    /// A register that moves through memory, and by how much.
    pointer: Option<(usize, u32)>,
    way: u64,
}

/// A routine that was closed and may be called once more.
struct Routine {
    address: u64,
    /// Loops that were open.
    loops: usize,
    entered: Known,
    left: Known,
}

struct Generator {
    program: Program,
    open: Vec<Open>,
    routines: Vec<Routine>,
    /// RSP in the beginning.
    stack: u64,
    /// Loops so far.
    loops: usize,
    patches_code: bool,
}

/// Makes the program.
pub(crate) fn sequence(seed: u64, steps: &[u32]) -> Sequence {
    let mut random = Random::new(seed);
    let page = random.pick(&[0, 0, PAGE as u64]);
    let offset = random.pick(&[0, 0, 0, 0xf80, 0xe00, 0x7c0]);
    let start = CODE + page + offset + random.below(16);
    let stack = STACK + 0x800 - random.pick(&[0, 0, 0, 0, 8, 1, 0x30]);
    let mut input = state(&mut random, stack);
    input.rip = start;
    let memory = memory(&mut random);
    let mut generator = Generator {
        program: Program::new(start, stack),
        open: Vec::new(),
        routines: Vec::new(),
        stack,
        loops: 0,
        patches_code: random.chance(12),
    };
    for step in steps.iter().take(MOST_STEPS) {
        if generator.program.bytes.len() + STEP_ROOM * (1 + generator.open.len()) > ROOM - PAGE {
            break;
        }
        let mut random = Random::new(u64::from(*step) << 16);
        generator.step(&mut random);
    }
    while !generator.open.is_empty() {
        generator.close(&mut Random::new(1));
    }
    let Generator { mut program, .. } = generator;
    let stores_to_code = !program.patches.is_empty();
    program.finish();
    let end = program.here();
    // The end takes less than 16 bytes.
    let tables = (end + 31) & !15;
    let table = program.place_tables(tables);
    let mut code = program.bytes;
    code.resize((tables - start) as usize, 0xcc);
    code.extend_from_slice(&table);
    assert!(code.len() <= ROOM, "a program of {} bytes", code.len());
    Sequence {
        input,
        memory,
        code,
        end,
        stores_to_code,
        borders: program.borders,
    }
}

fn state(random: &mut Random, stack: u64) -> Machine {
    let mut input = Machine::ZERO;
    for register in &mut input.gpr {
        *register = random.integer();
    }
    input.gpr[RSP] = stack;
    input.rflags = random.next() & 0x8d5 | 0x202;
    if random.chance(5) {
        input.rflags |= 1 << 10;
    }
    input.float = random.float_image(true);
    let mut put = |at: usize, bytes: &[u8]| {
        input.float[at..at + bytes.len()].copy_from_slice(bytes);
    };
    if random.chance(85) {
        put(0, &0x037f_u16.to_le_bytes());
        put(2, &(random.next() as u16 & 0x3800).to_le_bytes());
    }
    if random.chance(70) {
        put(4, &[0]);
    }
    let mxcsr = match random.below(20) {
        0..=15 => 0x1f80,
        16 => 0x1f80 | random.next() as u32 & 0xffff,
        17 => 0x1f80 | random.next() as u32 & 0x3f,
        18 => 0x1f80 | random.next() as u32 & 0x6000,
        _ => random.next() as u32 & 0xffff,
    };
    put(24, &mxcsr.to_le_bytes());
    if is_x86_feature_detected!("avx") {
        for half in input.upper.chunks_exact_mut(16) {
            half.copy_from_slice(&random.vector().to_le_bytes());
        }
    }
    input
}

/// Numbers of all kinds, which repeat every so often.
fn memory(random: &mut Random) -> [Vec<u8>; 2] {
    let mut pattern = Vec::with_capacity(64 * 16);
    for _ in 0..64 {
        pattern.extend_from_slice(&random.vector().to_le_bytes());
    }
    let mut fill = |bytes: usize| {
        let mut part = Vec::with_capacity(bytes);
        while part.len() < bytes {
            let piece = 16 * (1 + random.below(63) as usize);
            part.extend_from_slice(&pattern[..piece.min(bytes - part.len())]);
            let turn = random.below(1024) as usize;
            pattern.rotate_left(turn);
        }
        part
    };
    [fill(DATA_BYTES), fill(STACK_BYTES)]
}

impl Generator {
    fn step(&mut self, random: &mut Random) {
        let catalog = Catalog::get();
        match random.below(100) {
            0..=23 => self.plain(random, &catalog.frequent),
            24..=33 => self.plain(random, &catalog.integer),
            34..=44 => self.plain(random, &catalog.sse),
            45..=51 => self.plain(random, &catalog.avx),
            52..=55 => self.plain(random, &catalog.conversions),
            56..=60 => self.plain(random, &catalog.x87),
            61 | 62 => self.plain(random, &catalog.mmx),
            63..=65 => steps::string(&mut self.program, random),
            66 | 67 => steps::division(&mut self.program, random),
            68..=71 => steps::push(&mut self.program, random),
            72..=75 => self.pop(random),
            76..=81 => self.skip(random),
            82 | 83 => steps::short_skip(&mut self.program, random),
            84..=88 => self.begin_loop(random),
            89 => self.leave_loop(random),
            90 | 91 => self.begin_routine(random),
            92 => self.call_again(random),
            93 | 94 => steps::choice(&mut self.program, random),
            95 => steps::floating_control(&mut self.program, random),
            96 => steps::flags(&mut self.program, random),
            97 => steps::frame(&mut self.program, random),
            98 if self.patches_code => steps::patch(&mut self.program, random),
            _ => steps::translate_byte(&mut self.program, random),
        }
        for open in &mut self.open {
            open.steps = open.steps.saturating_sub(1);
        }
        while self.open.last().is_some_and(|open| open.steps == 0) {
            self.close(random);
        }
    }

    fn plain(&mut self, random: &mut Random, codes: &[iced_x86::Code]) {
        plain(&mut self.program, random, codes);
    }

    /// Pops no further than to where the innermost began.
    fn pop(&mut self, random: &mut Random) {
        let floor = self.open.last().map_or(self.stack, |open| open.known.stack);
        let room = floor.saturating_sub(self.program.known.stack);
        steps::pop(&mut self.program, random, room);
    }

    fn begin(&mut self, random: &mut Random, kind: Kind, exits: Vec<Hole>, known: Known) {
        self.open.push(Open {
            kind,
            // This step counts as one.
            steps: 2 + random.below(8),
            known,
            exits,
            undefined: 0,
            calls: false,
        });
    }

    /// A conditional branch over the steps that follow.
    fn skip(&mut self, random: &mut Random) {
        let hole = steps::conditional(&mut self.program, random);
        let otherwise = random.chance(30);
        let known = self.program.known;
        self.begin(random, Kind::Skipped { otherwise }, vec![hole], known);
    }

    fn begin_loop(&mut self, random: &mut Random) {
        let nested = self
            .open
            .iter()
            .filter(|open| matches!(open.kind, Kind::Loop(_)));
        let most = match nested.count() {
            0 => 16,
            1 => 5,
            _ => return,
        };
        let program = &mut self.program;
        let way = random.below(5);
        let counter = if way == 0 { RCX } else { free(program, random) };
        if program.is_reserved(counter) {
            return;
        }
        let count = 1 + random.below(most);
        program.set(counter, count);
        program.reserved |= 1 << counter;
        let pointer = random.chance(50).then(|| {
            let register = free(program, random);
            let stride = random.pick(&[1, 4, 8, 8, 16, 24, 32]);
            let address = DATA + 0x80 + random.below(0x1800);
            program.set(register, address);
            program.reserved |= 1 << register;
            (register, stride, address)
        });
        program.forget_all();
        program.known.registers[counter] = Some(Range {
            low: 1,
            high: count,
        });
        if let Some((register, stride, address)) = pointer {
            let high = address + u64::from(stride) * count;
            program.known.registers[register] = Some(Range { low: address, high });
        }
        self.loops += 1;
        let kind = Loop {
            head: program.here(),
            counter,
            pointer: pointer.map(|(register, stride, _)| (register, stride)),
            way,
        };
        let known = program.known;
        self.begin(random, Kind::Loop(kind), Vec::new(), known);
    }

    /// A branch out of the innermost loop, unless something else is open in which RSP is another.
    fn leave_loop(&mut self, random: &mut Random) {
        let found = self
            .open
            .iter()
            .rposition(|open| !matches!(open.kind, Kind::Skipped { .. } | Kind::Otherwise));
        let Some(open) = found.map(|index| &mut self.open[index]) else {
            return;
        };
        if !matches!(open.kind, Kind::Loop(_)) || open.known.stack != self.program.known.stack {
            return;
        }
        open.exits
            .push(steps::conditional(&mut self.program, random));
        open.undefined |= self.program.known.undefined;
    }

    fn begin_routine(&mut self, random: &mut Random) {
        let program = &mut self.program;
        if program.known.stack < STACK + 0x400 {
            return;
        }
        let popped = if random.chance(20) { 8 } else { 0 };
        if popped != 0 {
            // PUSH of an immediate.
            program.raw(&[0x6a, random.next() as u8]);
            program.known.stack -= 8;
        }
        let behind = steps::call(program, random);
        let over = program.raw_with_hole(&[0xe9], true);
        program.fill(behind, program.here());
        program.known.stack -= 8;
        program.forget_all();
        let address = program.here();
        let known = program.known;
        self.begin(random, Kind::Routine { address, popped }, vec![over], known);
    }

    /// The loop that is innermost, by number.
    fn innermost(&self) -> usize {
        match self
            .open
            .iter()
            .any(|open| matches!(open.kind, Kind::Loop(_)))
        {
            true => self.loops,
            false => 0,
        }
    }

    fn call_again(&mut self, random: &mut Random) {
        if self.routines.is_empty() {
            return;
        }
        let innermost = self.innermost();
        let routine = &self.routines[random.below(self.routines.len() as u64) as usize];
        let program = &mut self.program;
        let stack = program.known.stack - 8;
        let deeper = routine.entered.stack.wrapping_sub(stack);
        if routine.loops != innermost || deeper > 0x80 {
            return;
        }
        if program.known.undefined & !routine.entered.undefined != 0 {
            program.define_flags();
        }
        let hole = program.raw_with_hole(&[0xe8], true);
        program.fill(hole, routine.address);
        program.known.undefined |= routine.left.undefined;
        program.forget_all();
        for open in &mut self.open {
            open.calls = true;
        }
    }

    /// Ends the innermost that is open.
    fn close(&mut self, random: &mut Random) {
        let Some(open) = self.open.pop() else {
            return;
        };
        let program = &mut self.program;
        if program.known.stack != open.known.stack {
            program.move_stack(open.known.stack);
        }
        match open.kind {
            Kind::Skipped { otherwise: true } if random.chance(80) => {
                let over = program.raw_with_hole(&[0xe9], true);
                for hole in open.exits {
                    program.fill(hole, program.here());
                }
                let left = program.known;
                program.known = open.known;
                self.begin(random, Kind::Otherwise, vec![over], left);
                return;
            }
            Kind::Skipped { .. } | Kind::Otherwise => program.join(&open.known),
            Kind::Loop(ref the) => {
                close_loop(program, random, the, &open.known);
                program.forget_all();
            }
            Kind::Routine { address, popped } => {
                let left = program.known;
                match popped {
                    0 => program.raw(&[0xc3]),
                    _ => program.raw(&[0xc2, popped as u8, 0]),
                }
                program.known.stack += 8 + u64::from(popped);
                if popped == 0 && !open.calls {
                    let loops = self.innermost();
                    self.routines.push(Routine {
                        address,
                        loops,
                        entered: open.known,
                        left,
                    });
                }
            }
        }
        let program = &mut self.program;
        program.known.undefined |= open.undefined;
        for hole in open.exits {
            program.fill(hole, program.here());
        }
    }
}

fn close_loop(program: &mut Program, random: &mut Random, the: &Loop, begun: &Known) {
    let counter = the.counter as u8;
    let (low, high) = (counter & 7, counter >> 3);
    program.reserved &= !(1 << the.counter);
    if let Some((register, stride)) = the.pointer {
        program.reserved &= !(1 << register);
        let (low, high) = (register as u8 & 7, register as u8 >> 3);
        if random.chance(50) {
            // LEA register, [register + stride].
            let mut code = vec![0x48 | (5 * high), 0x8d, 0x80 | low << 3 | low];
            if low == 4 {
                code.push(0x24);
            }
            code.extend_from_slice(&stride.to_le_bytes());
            program.raw(&code);
        } else {
            // ADD register, stride.
            program.raw(&[0x48 | high, 0x83, 0xc0 | low, stride as u8]);
            program.known.undefined = 0;
        }
    }
    let distance = the.head.wrapping_sub(program.here() + 5) as i64;
    // Something may come in between.
    let far = distance < -120;
    if program.known.undefined & !begun.undefined != 0 {
        program.define_flags();
    }
    match the.way {
        // LOOP.
        0 if !far => {
            let distance = the.head.wrapping_sub(program.here() + 2);
            program.raw(&[0xe2, distance as u8]);
            program.known.undefined |= begun.undefined;
            return;
        }
        // SUB, as one and as the other.
        0 | 1 => {
            program.raw(&[0x48 | high, 0x83, 0xe8 | low, 1]);
            program.known.undefined = 0;
        }
        // LEA and TEST.
        2 if low != 4 => {
            program.raw(&[0x48 | (5 * high), 0x8d, 0x40 | low << 3 | low, 0xff]);
            program.raw(&[0x48 | (5 * high), 0x85, 0xc0 | low << 3 | low]);
            program.known.undefined = crate::compare::AF;
            if begun.undefined & crate::compare::AF == 0 {
                program.raw(&[0x48 | (5 * high), 0x39, 0xc0 | low << 3 | low]);
                // Compares with itself: always equal, so the sum is looked at once more.
                program.raw(&[0x48 | high, 0x83, 0xf8 | low, 0]);
                program.known.undefined = 0;
            }
        }
        // DEC.
        3 => program.raw(&[0x48 | high, 0xff, 0xc8 | low]),
        _ => program.raw(&[0x40 | high, 0xff, 0xc8 | low]),
    }
    let hole = program.raw_with_hole(&[0x0f, 0x85], true);
    program.fill(hole, the.head);
    program.known.undefined |= begun.undefined;
    program.forget(1 << the.counter);
}
