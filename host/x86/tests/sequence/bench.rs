//! The processors that a program runs on, and what is compared.

use std::fmt::Write;
use std::num::NonZeroU32;

use dunlin_x86::Translation;
use iced_x86::{Decoder, DecoderOptions, FastFormatter, Instruction};

use crate::compare;
use crate::generator::Sequence;
use crate::layout::*;
use crate::native::Native;
use crate::software::Software;
use crate::vendors;

/// Runs of a program where code is translated. The first fills the TLB.
const RUNS: usize = 4;

/// The host's processor, the interpreter, and translators that differ in when they begin.
pub(crate) struct Bench {
    native: Native,
    intel: bool,
    software: [(&'static str, Software); 4],
    /// Where code was last.
    written: std::ops::Range<usize>,
}

fn after(runs: u32) -> NonZeroU32 {
    NonZeroU32::new(runs).expect("not zero")
}

fn processors() -> [(&'static str, Software); 4] {
    let processor = |translation| Software::new(translation, CodePages::Write);
    [
        ("interpreted", processor(Translation::Never)),
        (
            "translated at once",
            processor(Translation::After(after(1))),
        ),
        (
            "translated in traces",
            processor(Translation::After(after(2))),
        ),
        ("in lockstep", processor(Translation::Verified(after(2)))),
    ]
}

/// Both memories as they are to be.
fn load(scratch: [&mut [u8]; 2], memory: &[Vec<u8>; 2]) {
    for (part, memory) in scratch.into_iter().zip(memory) {
        part.copy_from_slice(memory);
    }
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self {
            native: Native::new(CodePages::Write),
            intel: vendors::is_intel(),
            software: processors(),
            written: 0..0,
        }
    }

    /// The first difference, in words.
    pub(crate) fn compare(&mut self, sequence: &Sequence, choice: u64) -> Option<String> {
        let offset = (sequence.input.rip - CODE) as usize;
        let range = offset..offset + sequence.code.len();
        let code = self.native.code();
        code[self.written.clone()].fill(0xcc);
        code[range.clone()].copy_from_slice(&sequence.code);
        let end = (sequence.end - CODE) as usize;
        let jump = Native::exit_jump();
        code[end..end + jump.len()].copy_from_slice(&jump);
        load(self.native.scratch(), &sequence.memory);
        let native = self.native.run(&sequence.input, sequence.end);

        // Translation at once, in traces mostly, and what takes longest the least.
        let translator = match choice % 8 {
            0..=2 => 1,
            3..=6 => 2,
            _ => 3,
        };
        let mut found = None;
        for (index, runs) in [(0, 1), (translator, RUNS)] {
            let found_here = self.runs_differ(index, sequence, runs, &native);
            found = found.or(found_here);
        }
        for (_, software) in &mut self.software {
            software.code()[range.clone()].fill(0xcc);
        }
        self.written = range;
        found
    }

    /// Runs a program on one of the software's processors; how that is not as expected.
    fn runs_differ(
        &mut self,
        index: usize,
        sequence: &Sequence,
        runs: usize,
        expected: &(Machine, End),
    ) -> Option<String> {
        let (how, software) = &mut self.software[index];
        let offset = (sequence.input.rip - CODE) as usize;
        let range = offset..offset + sequence.code.len();
        software.code()[range.clone()].copy_from_slice(&sequence.code);
        let ended_well = matches!(expected.1, End::At(_));
        for run in 0..runs {
            load(software.scratch(), &sequence.memory);
            let cold = run == 0 || sequence.stores_to_code && !ended_well;
            let after = if cold {
                software.code()[range.clone()].copy_from_slice(&sequence.code);
                software.run(&sequence.input)
            } else {
                software.run_again(&sequence.input)
            };
            if after.1 == End::Differs {
                return software.difference().map(|text| format!("{how}: {text}"));
            }
            let difference = machines_differ(self.intel, sequence, *expected, &after)
                .or_else(|| compare::memory_difference(self.native.scratch(), software.scratch()));
            if let Some(difference) = difference {
                return Some(format!("{how}, run {}: {difference}", run + 1));
            }
        }
        None
    }

    /// Forgets what earlier programs left behind.
    pub(crate) fn renew(&mut self) {
        self.software = processors();
    }
}

fn machines_differ(
    intel: bool,
    sequence: &Sequence,
    mut native: (Machine, End),
    software: &(Machine, End),
) -> Option<String> {
    let at = native.0.rip;
    let instruction = match native.1 {
        End::Fault { .. } => decode(sequence, at).unwrap_or_default(),
        End::At(_) | End::Differs => Instruction::new(),
    };
    if intel {
        vendors::as_amd(&instruction, &sequence.input, &mut native, software);
    }
    let (native, end) = native;
    let (mut software, software_end) = *software;
    if !compare::same_end(&instruction, &end, &software_end)
        || matches!(end, End::Fault { .. }) && native.rip != software.rip
    {
        return Some(format!(
            "end: native {end:x?} at {:#x}, software {software_end:x?} at {:#x}",
            native.rip, software.rip
        ));
    }
    let undefined = match end {
        End::Fault { .. } | End::Differs => sequence.undefined(native.rip),
        End::At(end) => sequence.undefined(end),
    };
    if intel {
        // Intel's processors keep opcode and data pointer of what raised an exception last, and of
        // nothing else.
        software.float[6..8].copy_from_slice(&native.float[6..8]);
        software.float[16..24].copy_from_slice(&native.float[16..24]);
    }
    compare::general_difference(&native, &software, None)
        .or_else(|| compare::flags_difference(&native, &software, undefined))
        .or_else(|| compare::state_difference(&native, &software, &end))
}

fn decode(sequence: &Sequence, at: u64) -> Option<Instruction> {
    let offset = at.checked_sub(sequence.input.rip)? as usize;
    let bytes = sequence.code.get(offset..)?;
    Some(Decoder::with_ip(64, bytes, at, DecoderOptions::NONE).decode())
}

/// The program as text.
pub(crate) fn listing(sequence: &Sequence) -> String {
    let mut text = String::new();
    for (index, value) in sequence.input.gpr.iter().enumerate() {
        let name = iced_x86::Register::RAX + index as u32;
        let _ = write!(text, " {name:?}={value:#x}");
    }
    let _ = writeln!(text, " flags={:#x}", sequence.input.rflags);
    let mut formatter = FastFormatter::new();
    let mut decoder =
        Decoder::with_ip(64, &sequence.code, sequence.input.rip, DecoderOptions::NONE);
    while decoder.ip() < sequence.end {
        let instruction = decoder.decode();
        let mut line = String::new();
        formatter.format(&instruction, &mut line);
        let _ = writeln!(text, "  {:#x}  {line}", instruction.ip());
    }
    text
}
