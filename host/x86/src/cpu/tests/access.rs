//! Accesses to devices and across pages.

use super::*;
use crate::state::gpr;
use iced_x86::code_asm::*;

#[test]
fn a_read_modify_write_of_a_device_asks_it_twice_and_commits_once() {
    let mut machine = Machine::assembled(|a| {
        a.mov(ebx, 5).unwrap();
        a.add(dword_ptr(MMIO + 4), ebx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(
        machine.cpu.run(),
        Stop::MmioRead {
            address: MMIO + 4,
            size: 4
        }
    );
    machine.cpu.complete_read(10);
    let write = Stop::MmioWrite {
        address: MMIO + 4,
        size: 4,
        value: 15,
    };
    assert_eq!(machine.cpu.run(), write);
    assert_eq!(machine.cpu.run(), write, "asked again until it is answered");
    machine.cpu.complete_write();
    machine.halt();
}

#[test]
fn finish_access_completes_one_instruction_and_no_more() {
    let mut machine = Machine::assembled(|a| {
        a.mov(eax, dword_ptr(MMIO)).unwrap();
        a.inc(eax).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(
        machine.cpu.run(),
        Stop::MmioRead {
            address: MMIO,
            size: 4
        }
    );
    machine.cpu.finish_access();
    assert_eq!(machine.cpu.state().rip, CODE, "nothing was answered yet");
    machine.cpu.complete_read(0x1_0000_0041);
    machine.cpu.finish_access();
    let state = machine.cpu.state();
    assert_eq!(state.gpr[gpr::RAX], 0x41);
    assert!(state.rip > CODE && state.rip < CODE + 10);
    assert_eq!(machine.halt().gpr[gpr::RAX], 0x42);
}

#[test]
fn ports_stop_and_take_their_answers() {
    let mut machine = Machine::assembled(|a| {
        a.mov(edx, 0x3f8).unwrap();
        a.mov(eax, 0x1234_5678).unwrap();
        a.out(dx, al).unwrap();
        a.in_(eax, dx).unwrap();
        a.in_(al, 0x40).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(
        machine.cpu.run(),
        Stop::PortWrite {
            port: 0x3f8,
            size: 1,
            value: 0x78
        }
    );
    machine.cpu.complete_write();
    assert_eq!(
        machine.cpu.run(),
        Stop::PortRead {
            port: 0x3f8,
            size: 4
        }
    );
    machine.cpu.complete_read(0xffff_ff00);
    assert_eq!(
        machine.cpu.run(),
        Stop::PortRead {
            port: 0x40,
            size: 1
        }
    );
    machine.cpu.complete_read(0x1ab);
    assert_eq!(machine.halt().gpr[gpr::RAX], 0xffff_ffab);
}

#[test]
fn user_mode_reaches_a_port_only_by_the_permission_map() {
    let build = |a: &mut CodeAssembler| {
        a.in_(al, 0x60).unwrap();
    };
    let mut machine = Machine::assembled(build).user();
    machine.ram.set(TSS + 0x66, 0x68);
    assert_eq!(machine.fault(13)[0], 0);
    let mut machine = Machine::assembled(build)
        .user()
        .with(|state| state.tr.limit = 0x100);
    machine.ram.set(TSS + 0x66, 0x68);
    assert_eq!(
        machine.cpu.run(),
        Stop::PortRead {
            port: 0x60,
            size: 1
        }
    );
}

#[test]
fn a_store_across_pages_writes_nothing_when_the_second_is_missing() {
    let mut machine = Machine::assembled(|a| {
        a.mov(rax, -1i64 as u64).unwrap();
        a.mov(qword_ptr(DATA + 0xffc), rax).unwrap();
    });
    machine.ram.set(PT + ((DATA + 0x1000) >> 12) * 8, 0);
    let frame = machine.fault(14);
    assert_eq!(frame[0], 2);
    assert_eq!(machine.cpu.state().cr2, DATA + 0x1000);
    assert_eq!(machine.ram.get(DATA + 0xff8), 0);
}

#[test]
fn accesses_across_pages_join_their_halves() {
    let mut machine = Machine::assembled(|a| {
        a.mov(rax, 0x1122_3344_5566_7788u64).unwrap();
        a.mov(qword_ptr(DATA + 0xffd), rax).unwrap();
        a.mov(rbx, qword_ptr(DATA + 0xffd)).unwrap();
        a.lock().add(dword_ptr(DATA + 0xffe), 1).unwrap();
        a.hlt().unwrap();
    });
    // The two pages are not neighbours in physical memory.
    machine
        .ram
        .set(PT + ((DATA + 0x1000) >> 12) * 8, (DATA + 0x8000) | 7);
    let state = machine.halt();
    assert_eq!(state.gpr[gpr::RBX], 0x1122_3344_5566_7788);
    assert_eq!(
        machine.ram.get(DATA + 0xff8),
        0x6677_8800_0000_0000 + (1 << 48)
    );
    assert_eq!(machine.ram.get(DATA + 0x8000), 0x11_2233_4455);
}

#[test]
fn compare_and_exchange_of_16_bytes_replaces_or_reports() {
    let mut machine = Machine::assembled(|a| {
        a.cmpxchg16b(xmmword_ptr(DATA)).unwrap();
        a.sete(sil).unwrap();
        a.cmpxchg16b(xmmword_ptr(DATA)).unwrap();
        a.setne(dil).unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        (state.gpr[gpr::RAX], state.gpr[gpr::RDX]) = (1, 2);
        (state.gpr[gpr::RBX], state.gpr[gpr::RCX]) = (3, 4);
    });
    machine.ram.set(DATA, 1);
    machine.ram.set(DATA + 8, 2);
    let state = machine.halt();
    assert_eq!((machine.ram.get(DATA), machine.ram.get(DATA + 8)), (3, 4));
    assert_eq!((state.gpr[gpr::RAX], state.gpr[gpr::RDX]), (3, 4));
    assert_eq!((state.gpr[gpr::RSI] & 1, state.gpr[gpr::RDI] & 1), (1, 1));
}

#[test]
fn a_misaligned_compare_and_exchange_of_16_bytes_faults() {
    let mut machine = Machine::assembled(|a| {
        a.cmpxchg16b(xmmword_ptr(DATA + 8)).unwrap();
    });
    machine.fault(13);
}

#[test]
fn the_local_apic_answers_at_its_page() {
    let mut machine = Machine::assembled(|a| {
        a.mov(ebx, 0xfee0_0000u32).unwrap();
        a.mov(dword_ptr(rbx + 0x310), 3 << 24).unwrap();
        a.mov(dword_ptr(rbx + 0x300), 0x4041).unwrap();
        a.mov(eax, dword_ptr(rbx + 0x30)).unwrap();
        a.hlt().unwrap();
    });
    // The fourth gigabyte has a directory of its own, with one large page.
    machine.ram.set(PDPT + 3 * 8, (PT + 0x1000) | 7);
    machine.ram.set(PT + 0x1000 + 0x1f7 * 8, 0xfee0_0000 | 0x87);
    let state = machine.halt();
    assert_ne!(state.gpr[gpr::RAX], 0);
    assert_eq!(*machine.sent.0.lock().unwrap(), [3 << 32 | 0x4041]);
}

#[test]
fn execution_outside_of_ram_is_a_fault() {
    let mut machine = Machine::assembled(|a| {
        a.mov(rax, MMIO).unwrap();
        a.jmp(rax).unwrap();
    });
    assert_eq!(machine.fault(13)[1], MMIO);
}

#[test]
fn what_is_converted_from_memory_goes_into_any_register() {
    use iced_x86::{Code, Instruction, MemoryOperand, Register};
    let codes = [
        Code::Cvttsd2si_r64_xmmm64,
        Code::Cvtsd2si_r32_xmmm64,
        Code::Cvttss2si_r32_xmmm32,
        Code::Cvtss2si_r64_xmmm32,
    ];
    for (index, code) in codes.into_iter().enumerate() {
        for number in (0..16).filter(|number| ![gpr::RBX, gpr::RSP].contains(number)) {
            let first = [Register::RAX, Register::EAX][usize::from(matches!(index, 1 | 2))];
            let operand = MemoryOperand::with_base(Register::RBX);
            let convert =
                Instruction::with2(code, first + number as u32, operand).expect("a conversion");
            let sum = Register::RAX + number as u32;
            let sums = MemoryOperand::with_base_displ(Register::RBX, 8);
            let add = Instruction::with2(Code::Add_rm64_r64, sums, sum).expect("an addition");
            let mut machine = Machine::assembled(|a| {
                let mut again = a.create_label();
                a.mov(rbx, DATA).unwrap();
                a.mov(dword_ptr(rbx + 16), 30).unwrap();
                a.set_label(&mut again).unwrap();
                a.add_instruction(convert).unwrap();
                a.add_instruction(add).unwrap();
                a.dec(dword_ptr(rbx + 16)).unwrap();
                a.jnz(again).unwrap();
                a.hlt().unwrap();
            });
            let value = if index < 2 {
                77f64.to_bits()
            } else {
                77f32.to_bits().into()
            };
            machine.ram.set(DATA, value);
            machine.halt();
            assert_eq!(machine.ram.get(DATA + 8), 30 * 77, "{code:?}, {number}");
        }
    }
}
