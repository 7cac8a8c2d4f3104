//! The proof of the software CPU: single instructions with random operands, on it and on the
//! host's processor, give the same registers, memory, defined flags and faults.
//!
//! Every form that the newest CPU baseline offers in 64-bit user mode is compared, or is on the
//! list of exclusions in `forms.rs` with its reason. FS and GS as bases of memory operands are left
//! out: the host's threads need their own. Environment variables:
//!
//! * `DUNLIN_DIFF_CASES`: cases of each form, 1,000 unless set;
//! * `DUNLIN_DIFF_SEED`: seed, fixed unless set;
//! * `DUNLIN_DIFF_ONLY`: compare only forms whose name contains this.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod compare;
mod forms;
mod generate;
#[expect(dead_code, reason = "the test of sequences uses the rest")]
mod layout;
mod native;
mod random;
#[expect(dead_code, reason = "the test of sequences uses the rest")]
mod software;
mod vendors;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::num::NonZeroU32;

use dunlin_x86::Translation;

use iced_x86::{Code, FastFormatter, Mnemonic};

use forms::Verdict;
use generate::{Case, Generator};
use layout::*;
use native::Native;
use random::Random;
use software::Software;

const SEED: u64 = 0x00d0_1113;

/// Cases of a form of which differences are told in full.
const REPORTED: usize = 2;

fn variable(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(value) => value.parse().expect("a decimal number"),
        Err(_) => default,
    }
}

/// Both processors, and the scratch memory's contents that a case begins with.
struct Bench {
    native: Native,
    intel: bool,
    software: Software,
    /// What is compared is the second run, which finds the operands' pages in the TLB.
    warm: bool,
    template: [Vec<u8>; 2],
}

/// The differences of one form.
#[derive(Default)]
struct Tally {
    cases: u64,
    differences: u64,
    reports: Vec<String>,
}

impl Bench {
    fn new(translation: Translation) -> Self {
        Self {
            native: Native::new(CodePages::Read),
            intel: vendors::is_intel(),
            software: Software::new(translation, CodePages::Read),
            warm: false,
            template: [vec![0; DATA_BYTES], vec![0; STACK_BYTES]],
        }
    }

    fn renew_template(&mut self, random: &mut Random) {
        for part in &mut self.template {
            for word in part.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
        }
        self.restore();
    }

    fn restore(&mut self) {
        let targets = self
            .native
            .scratch()
            .into_iter()
            .zip(self.software.scratch());
        for ((native, software), template) in targets.zip(&self.template) {
            native.copy_from_slice(template);
            software.copy_from_slice(template);
        }
    }

    fn restore_software(&mut self, case: &Case) {
        for (software, template) in self.software.scratch().into_iter().zip(&self.template) {
            software.copy_from_slice(template);
        }
        patch(self.software.scratch(), case);
    }

    fn patch(&mut self, case: &Case) {
        patch(self.native.scratch(), case);
        patch(self.software.scratch(), case);
    }

    /// Places the cases' instructions in both memories.
    fn load(&mut self, cases: &[Case]) {
        let code = self.native.code();
        code.fill(0xcc);
        for (slot, case) in cases.iter().enumerate() {
            let at = slot * SLOT_BYTES + SLOT_LEAD;
            code[at..at + case.bytes.len()].copy_from_slice(&case.bytes);
        }
        self.software.set_code(code);
        let jump = Native::exit_jump();
        for (slot, case) in cases.iter().enumerate() {
            let at = slot * SLOT_BYTES + SLOT_LEAD + case.bytes.len();
            code[at..at + jump.len()].copy_from_slice(&jump);
        }
    }

    fn compare(&mut self, case: &Case) -> Option<String> {
        self.patch(case);
        let end = case.input.rip + case.bytes.len() as u64;
        let mut native = self.native.run(&case.input, end);
        let mut software = self.software.run(&case.input);
        if self.warm {
            self.restore_software(case);
            software = self.software.run_again(&case.input);
        }
        let stored =
            !self.intel || vendors::as_amd(&case.instruction, &case.input, &mut native, &software);
        self.equal_mxcsr_masks(case);
        let found = compare::difference(&case.instruction, &case.input, &native, &software)
            .or_else(|| {
                stored
                    .then(|| {
                        compare::memory_difference(self.native.scratch(), self.software.scratch())
                    })
                    .flatten()
            });
        self.restore();
        found
    }

    /// FXSAVE's image says which bits MXCSR has; the host's may have more.
    fn equal_mxcsr_masks(&mut self, case: &Case) {
        if case.instruction.mnemonic() != Mnemonic::Fxsave
            && case.instruction.mnemonic() != Mnemonic::Fxsave64
        {
            return;
        }
        let parts = self
            .native
            .scratch()
            .into_iter()
            .zip(self.software.scratch());
        for ((native, software), base) in parts.zip([DATA, STACK]) {
            let at = (case.patches[0].address.wrapping_sub(base) as usize).wrapping_add(28);
            let end = at.wrapping_add(4);
            if let (Some(native), Some(software)) = (native.get_mut(at..end), software.get(at..end))
            {
                native.copy_from_slice(software);
            }
        }
    }

    fn form(&mut self, code: Code, wanted: u64, random: &mut Random) -> Tally {
        let mut tally = Tally::default();
        self.renew_template(random);
        while tally.cases < wanted {
            let count = (wanted - tally.cases).min(SLOTS as u64) as usize;
            let mut generator = Generator::new(code, random);
            let mut cases = Vec::with_capacity(count);
            let mut draws = 0;
            while cases.len() < count && draws < 20 * count {
                draws += 1;
                cases.extend(generator.case(cases.len()));
            }
            if cases.is_empty() {
                break;
            }
            self.load(&cases);
            for case in &cases {
                tally.cases += 1;
                if let Some(difference) = self.compare(case) {
                    tally.differences += 1;
                    if tally.reports.len() < REPORTED {
                        tally.reports.push(report(case, &difference));
                    }
                }
            }
        }
        tally
    }
}

/// Puts a case's operands into memory.
fn patch(scratch: [&mut [u8]; 2], case: &Case) {
    for (part, base) in scratch.into_iter().zip([DATA, STACK]) {
        for patch in &case.patches {
            for (index, byte) in patch.bytes.iter().enumerate() {
                let address = patch.address.wrapping_add(index as u64);
                let at = address.wrapping_sub(base) as usize;
                if let Some(place) = part.get_mut(at) {
                    *place = *byte;
                }
            }
        }
    }
}

fn report(case: &Case, difference: &str) -> String {
    let mut text = String::new();
    FastFormatter::new().format(&case.instruction, &mut text);
    let _ = write!(
        text,
        "  {:02x?} at {:#x}\n    {difference}\n    in:",
        case.bytes, case.input.rip
    );
    for (index, value) in case.input.gpr.iter().enumerate() {
        let _ = write!(
            text,
            " {:?}={value:#x}",
            iced_x86::Register::RAX + index as u32
        );
    }
    let _ = write!(text, " flags={:#x}", case.input.rflags);
    let float = &case.input.float;
    let _ = write!(
        text,
        "\n    x87 control={} status={} tags={} mxcsr={}",
        compare::number(&float[0..2]),
        compare::number(&float[2..4]),
        compare::number(&float[4..5]),
        compare::number(&float[24..28])
    );
    let operands =
        (0..case.instruction.op_count()).map(|operand| case.instruction.op_register(operand));
    for register in operands {
        let at = if register.is_xmm() || register.is_ymm() {
            160 + register.number() * 16
        } else if register.is_st() || register.is_mm() {
            32 + register.number() * 16
        } else {
            continue;
        };
        let _ = write!(
            text,
            " {register:?}={}",
            compare::number(&float[at..at + 16])
        );
    }
    for patch in &case.patches {
        let shown = &patch.bytes[..patch.bytes.len().min(32)];
        let _ = write!(
            text,
            "\n    [{:#x}]={}",
            patch.address,
            compare::number(shown)
        );
    }
    text
}

#[test]
fn every_offered_form_does_what_the_host_does() {
    let mut bench = Bench::new(Translation::Never);
    compare_all(&mut bench, "interpreted");
    bench.software = Software::new(Translation::After(NonZeroU32::MIN), CodePages::Read);
    bench.warm = true;
    compare_all(&mut bench, "translated");
}

fn compare_all(bench: &mut Bench, how: &str) {
    let wanted = variable("DUNLIN_DIFF_CASES", 1000);
    let seed = variable("DUNLIN_DIFF_SEED", SEED);
    let only = std::env::var("DUNLIN_DIFF_ONLY").unwrap_or_default();
    eprintln!("seed: {seed} (DUNLIN_DIFF_SEED)");
    let unknown = forms::unknown_features();
    assert!(
        unknown.is_empty(),
        "baseline features that the test does not know: {unknown:?}"
    );

    let mut skipped: BTreeMap<String, u64> = BTreeMap::new();
    let (mut forms, mut cases, mut failed) = (0, 0, Vec::new());
    for code in Code::values() {
        let name = format!("{code:?}");
        match forms::verdict(code) {
            Verdict::Outside => continue,
            Verdict::Excluded(reason) => {
                *skipped.entry(reason.to_owned()).or_default() += 1;
                continue;
            }
            Verdict::HostLacks(feature) => {
                eprintln!("SKIP: {name}: the host's processor lacks {feature}");
                *skipped
                    .entry(format!("the host lacks {feature}"))
                    .or_default() += 1;
                continue;
            }
            Verdict::Compare => {}
        }
        if !name.contains(&only) {
            continue;
        }
        let mut random = Random::new(seed ^ (code as u64) << 32);
        let tally = bench.form(code, wanted, &mut random);
        forms += 1;
        cases += tally.cases;
        if tally.cases < wanted {
            failed.push(format!("{name}: only {} of {wanted} cases", tally.cases));
        }
        if tally.differences > 0 {
            eprintln!(
                "{name}: {} of {} cases differ",
                tally.differences, tally.cases
            );
            for report in &tally.reports {
                eprintln!("  {report}");
            }
            failed.push(format!("{name}: {} of {}", tally.differences, tally.cases));
        }
    }
    let reasons: Vec<_> = skipped
        .iter()
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    let count: u64 = skipped.values().sum();
    eprintln!(
        "{how}: forms: {forms}, cases: {cases}, skipped forms: {count} ({})",
        reasons.join("; ")
    );
    assert!(
        failed.is_empty(),
        "{} forms differ when they are {how}:\n{}",
        failed.len(),
        failed.join("\n")
    );
}
