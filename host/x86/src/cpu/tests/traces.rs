//! Blocks that are translated as one.

use super::*;
use crate::state::gpr;
use iced_x86::code_asm::*;

/// Runs a program to its HLT, interpreted and in ways of translation, which all have to come to the same
/// end; that state, or `None` where these tests are not run.
#[cfg(target_arch = "x86_64")]
fn alike(build: impl Fn(&mut CodeAssembler)) -> Option<CpuState> {
    if !module_path!().ends_with("translated_in_traces::traces") {
        // Once is enough: it chooses how to run by itself.
        return None;
    }
    let code = assemble(64, CODE, |a| build(a));
    let run = |translation| {
        let (ram, map) = (Arc::new(Ram::new()), Arc::new(CodeMap::new()));
        let baseline: &'static Baseline = &cpuid::X86_64_V2;
        let mut machine = Machine::made((baseline, translation), 0, ram, map);
        machine.lay_tables();
        machine.enter_long(&code);
        let state = machine.halt();
        assert_eq!(machine.cpu.difference(), None);
        (state, machine)
    };
    let (expected, interpreted) = run(Translation::Never);
    for runs in [1, 2, 3, 10] {
        let runs = NonZeroU32::new(runs).unwrap();
        for translation in [Translation::After(runs), Translation::Verified(runs)] {
            let (state, machine) = run(translation);
            if matches!(translation, Translation::Verified(_)) {
                assert!(machine.cpu.verified() > 0, "{translation:?}");
            }
            let [now, then] = [&state, &expected].map(|s| (s.gpr, s.rip, s.rflags, s.cr2));
            assert_eq!(now, then, "{translation:?}");
            for at in (0..RAM).step_by(8) {
                let [now, then] = [&machine, &interpreted].map(|m| m.ram.get(at));
                assert_eq!(now, then, "RAM at {at:#x}, {translation:?}");
            }
        }
    }
    Some(expected)
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_trace_is_left_on_every_way() {
    let Some(state) = alike(|a| {
        let (mut again, mut odd, mut far) = (a.create_label(), a.create_label(), a.create_label());
        let (mut join, mut done) = (a.create_label(), a.create_label());
        a.mov(rbx, DATA).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(ecx).unwrap();
        a.mov(ptr(rbx + 8), rcx).unwrap();
        a.cmp(ecx, 100).unwrap();
        a.je(done).unwrap();
        a.mov(rdx, ptr(rbx + 8)).unwrap();
        a.add(ptr(rbx + 16), rdx).unwrap();
        a.test(ecx, 1).unwrap();
        a.jne(odd).unwrap();
        a.add(rsi, ptr(rbx + 16)).unwrap();
        a.test(ecx, 7).unwrap();
        a.je(far).unwrap();
        a.jmp(join).unwrap();
        a.set_label(&mut odd).unwrap();
        a.sub(rsi, ptr(rbx + 8)).unwrap();
        a.set_label(&mut join).unwrap();
        a.xor(ptr(rbx + 24), rsi).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut far).unwrap();
        a.rol(rsi, 3).unwrap();
        a.jmp(join).unwrap();
        a.set_label(&mut done).unwrap();
        a.mov(rdi, ptr(rbx + 24)).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    assert_eq!(state.gpr[gpr::RCX], 100);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_block_changes_one_that_follows_in_its_trace() {
    let Some(state) = alike(|a| {
        let (mut again, mut done, mut change) =
            (a.create_label(), a.create_label(), a.create_label());
        a.mov(ecx, 60).unwrap();
        a.lea(rbx, ptr(change)).unwrap();
        a.set_label(&mut again).unwrap();
        // From time to time, and every time at the end.
        a.test(ecx, 0x17).unwrap();
        let mut keep = a.create_label();
        a.jne(keep).unwrap();
        a.mov(byte_ptr(rbx + 2), cl).unwrap();
        a.set_label(&mut keep).unwrap();
        a.dec(ecx).unwrap();
        a.js(done).unwrap();
        a.set_label(&mut change).unwrap();
        // The immediate is the third byte.
        a.add(edx, 1).unwrap();
        a.add(esi, edx).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut done).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    assert_ne!(state.gpr[gpr::RDX], 60);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn what_is_called_in_a_trace_returns_as_it_likes() {
    let Some(state) = alike(|a| {
        let (mut again, mut work, mut turn) =
            (a.create_label(), a.create_label(), a.create_label());
        let (mut other, mut done) = (a.create_label(), a.create_label());
        a.mov(rbx, DATA).unwrap();
        a.mov(ecx, 80).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(rax, ptr(rbx + 8)).unwrap();
        a.call(work).unwrap();
        // What was looked for before is not what was looked for behind it.
        a.add(rax, ptr(rbx + 16)).unwrap();
        a.mov(ptr(rbx + 8), rax).unwrap();
        a.dec(ecx).unwrap();
        a.je(done).unwrap();
        a.call(turn).unwrap();
        a.add(edi, 3).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut other).unwrap();
        a.add(edi, 1000).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut work).unwrap();
        a.add(rbx, 0x28).unwrap();
        a.inc(qword_ptr(rbx + 16)).unwrap();
        a.add(rax, ptr(rbx + 16)).unwrap();
        a.ret().unwrap();
        a.set_label(&mut turn).unwrap();
        // To elsewhere, one time of four.
        a.test(ecx, 3).unwrap();
        let mut plain = a.create_label();
        a.jne(plain).unwrap();
        a.lea(rdx, ptr(other)).unwrap();
        a.mov(ptr(rsp), rdx).unwrap();
        a.set_label(&mut plain).unwrap();
        a.ret().unwrap();
        a.set_label(&mut done).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    assert_eq!(state.gpr[gpr::RDI], 60 * 3 + 19 * 1000);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_fault_in_a_later_block_of_a_trace_is_told_with_its_place() {
    let Some(state) = alike(|a| {
        let (mut again, mut done) = (a.create_label(), a.create_label());
        a.mov(rbx, DATA).unwrap();
        a.mov(ecx, 50).unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(edx).unwrap();
        a.dec(ecx).unwrap();
        a.js(done).unwrap();
        a.mov(ptr(rbx), rdx).unwrap();
        a.cmp(edx, 200).unwrap();
        a.je(done).unwrap();
        // Behind all of RAM, at last.
        a.add(rsi, ptr(rbx + 8)).unwrap();
        a.add(rbx, 0x1000).unwrap();
        a.cmp(ecx, 3).unwrap();
        a.jne(again).unwrap();
        a.mov(rbx, 1u64 << 40).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut done).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    assert_eq!(state.cr2, 1 << 40);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_branch_that_the_interpreter_does_with_its_comparison_ends_a_trace() {
    let Some(state) = alike(|a| {
        let (mut again, mut past, mut done) =
            (a.create_label(), a.create_label(), a.create_label());
        a.mov(rbx, DATA).unwrap();
        a.mov(ecx, 0x1fff).unwrap();
        a.set_label(&mut again).unwrap();
        a.sub(ecx, 0x80).unwrap();
        a.js(done).unwrap();
        // Not translated: CH is no register of the host that holds the guest's.
        a.test(ch, 4).unwrap();
        a.je(past).unwrap();
        a.add(ptr(rbx), rcx).unwrap();
        a.set_label(&mut past).unwrap();
        a.and(ecx, 0xfff_f7ff).unwrap();
        a.inc(edx).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut done).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    assert!(state.gpr[gpr::RDX] > 10);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn blocks_that_follow_each_other_become_one() {
    if !module_path!().ends_with("translated_in_traces::traces") {
        return;
    }
    let mut machine = Machine::assembled(|a| {
        let (mut again, mut done) = (a.create_label(), a.create_label());
        a.xor(edx, edx).unwrap();
        a.mov(ecx, 40).unwrap();
        a.set_label(&mut again).unwrap();
        a.dec(ecx).unwrap();
        a.je(done).unwrap();
        a.inc(edx).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut done).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(machine.halt().gpr[gpr::RDX], 39);
    assert!(machine.cpu.blocks.woven() > 0);
}

/// What a loop of 1,000 rounds, most of which are translated, counts as interpreted.
#[cfg(target_arch = "x86_64")]
fn interpreted_of_loop(body: impl Fn(&mut CodeAssembler)) -> u64 {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(ebx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        body(a);
        a.dec(ebx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    machine.halt();
    machine.cpu.instructions()
}

#[cfg(target_arch = "x86_64")]
#[test]
fn of_a_translated_block_what_the_interpreter_did_is_counted() {
    if !module_path!().contains("translated") {
        return;
    }
    // PAUSE ends the budget, RDTSC goes on.
    let ends = interpreted_of_loop(|a| {
        for _ in 0..30 {
            a.inc(rdi).unwrap();
        }
        a.xor(esi, esi).unwrap();
        a.pause().unwrap();
    });
    assert!((1000..1500).contains(&ends), "{ends}");
    let goes_on = interpreted_of_loop(|a| a.rdtsc().unwrap());
    assert!((1000..1500).contains(&goes_on), "{goes_on}");
    let translated = interpreted_of_loop(|a| a.inc(rdi).unwrap());
    assert!(translated < 500, "{translated}");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn an_operand_that_looks_by_itself_comes_between_those_that_share() {
    let Some(state) = alike(|a| {
        let mut again = a.create_label();
        a.mov(rbx, DATA).unwrap();
        a.mov(rsi, DATA + 0x2000).unwrap();
        a.mov(r12d, 40).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(ptr(rbx + 8), rdx).unwrap();
        a.add(rdx, ptr(rsi + 0x10)).unwrap();
        a.add(ptr(rbx + 16), r12).unwrap();
        a.add(rdx, ptr(rbx + 16)).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    }) else {
        return;
    };
    assert_eq!(state.gpr[12], 0);
    assert_ne!(state.gpr[gpr::RDX], 0);
}

#[test]
fn a_loop_of_blocks_that_are_translated_as_one_hears_a_kick() {
    let mut machine = Machine::assembled(|a| {
        let (mut first, mut second) = (a.create_label(), a.create_label());
        a.xor(edx, edx).unwrap();
        a.jmp(second).unwrap();
        a.set_label(&mut first).unwrap();
        a.inc(rdx).unwrap();
        a.jmp(second).unwrap();
        a.set_label(&mut second).unwrap();
        a.inc(rax).unwrap();
        a.jmp(first).unwrap();
    });
    machine.run_until_kicked();
    let state = machine.cpu.state();
    let (inner, outer) = (state.gpr[gpr::RDX], state.gpr[gpr::RAX]);
    assert!(inner > 1000 && outer - inner <= 1, "{inner}, {outer}");
}
