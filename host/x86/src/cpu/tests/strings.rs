//! Repeated string instructions.

use super::*;
use crate::state::gpr;
use iced_x86::code_asm::*;

fn entry(address: u64) -> u64 {
    PT + (address >> 12) * 8
}

#[test]
fn a_copy_stops_where_its_target_is_missing_and_can_go_on() {
    let mut machine = Machine::assembled(|a| {
        a.cld().unwrap();
        a.rep().movsb().unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        state.gpr[gpr::RSI] = DATA;
        state.gpr[gpr::RDI] = DATA + 0x4f00;
        state.gpr[gpr::RCX] = 0x180;
    });
    for at in 0..0x30 {
        machine
            .ram
            .set(DATA + at * 8, 0x0101_0101_0101_0101 * (at + 1));
    }
    machine.ram.set(entry(DATA + 0x5000), 0);
    // The handler maps the page and returns.
    let handler = assemble(64, 0x30000, |a| {
        a.mov(r8, rcx).unwrap();
        a.mov(r9, rdi).unwrap();
        a.mov(rax, (DATA + 0x5000) | 7).unwrap();
        a.mov(qword_ptr(entry(DATA + 0x5000)), rax).unwrap();
        a.add(rsp, 8).unwrap();
        a.iretq().unwrap();
    });
    machine.ram.write(0x30000, &handler);
    machine.set_gate(14, 0x30000, 0);
    let state = machine.halt();
    assert_eq!((state.gpr[8], state.gpr[9]), (0x80, DATA + 0x5000));
    assert_eq!(state.gpr[gpr::RCX], 0);
    for at in 0..0x30 {
        assert_eq!(
            machine.ram.get(DATA + 0x4f00 + at * 8),
            machine.ram.get(DATA + at * 8)
        );
    }
}

#[test]
fn overlapping_copies_go_byte_by_byte() {
    for backward in [false, true] {
        let mut machine = Machine::assembled(|a| {
            if backward {
                a.std().unwrap();
            }
            a.rep().movsb().unwrap();
            a.hlt().unwrap();
        })
        .with(|state| {
            let last = if backward { 15 } else { 0 };
            state.gpr[gpr::RSI] = DATA + last;
            state.gpr[gpr::RDI] = DATA + last + 1;
            state.gpr[gpr::RCX] = 16;
        });
        machine.ram.set(DATA, 0x0706_0504_0302_0100);
        machine.ram.set(DATA + 8, 0x0f0e_0d0c_0b0a_0908);
        machine.halt();
        let expected = if backward { 0x0605_0403_0201_0000 } else { 0 };
        assert_eq!(machine.ram.get(DATA), expected);
    }
}

#[test]
fn a_fill_crosses_pages_and_takes_its_element_size() {
    let mut machine = Machine::assembled(|a| {
        a.rep().stosd().unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        state.gpr[gpr::RAX] = 0x1122_3344;
        state.gpr[gpr::RDI] = DATA + 2;
        state.gpr[gpr::RCX] = 5000;
    });
    let state = machine.halt();
    assert_eq!(state.gpr[gpr::RDI], DATA + 2 + 20_000);
    assert_eq!(machine.ram.get(DATA), 0x3344_1122_3344_0000);
    assert_eq!(machine.ram.get(DATA + 0xffc), 0x3344_1122_3344_1122);
    assert_eq!(machine.ram.get(DATA + 20_000), 0x1122);
}

#[test]
fn scans_and_compares_stop_at_their_condition() {
    let mut machine = Machine::assembled(|a| {
        a.xor(eax, eax).unwrap();
        a.repne().scasb().unwrap();
        a.mov(rbx, rdi).unwrap();
        a.mov(rsi, DATA).unwrap();
        a.mov(rdi, DATA + 0x100).unwrap();
        a.mov(ecx, 100).unwrap();
        a.repe().cmpsb().unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        state.gpr[gpr::RDI] = DATA;
        state.gpr[gpr::RCX] = u64::MAX;
    });
    machine.ram.write(DATA, b"hello world\0");
    machine.ram.write(DATA + 0x100, b"hello_world\0");
    let state = machine.halt();
    assert_eq!(state.gpr[gpr::RBX], DATA + 12);
    assert_eq!((state.gpr[gpr::RCX], state.gpr[gpr::RSI]), (94, DATA + 6));
}

#[test]
fn a_copy_from_a_device_asks_for_each_element_once() {
    let mut machine = Machine::assembled(|a| {
        a.rep().movsd().unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        state.gpr[gpr::RSI] = MMIO;
        state.gpr[gpr::RDI] = DATA;
        state.gpr[gpr::RCX] = 3;
    });
    for index in 0..3 {
        assert_eq!(
            machine.cpu.run(),
            Stop::MmioRead {
                address: MMIO + index * 4,
                size: 4
            }
        );
        machine.cpu.complete_read(index + 7);
    }
    machine.halt();
    assert_eq!(machine.ram.get(DATA), 8 << 32 | 7);
}

#[test]
fn port_strings_stop_for_each_element() {
    let mut machine = Machine::assembled(|a| {
        a.mov(edx, 0x1f0).unwrap();
        a.rep().insw().unwrap();
        a.mov(ecx, 2).unwrap();
        a.mov(rsi, DATA).unwrap();
        a.rep().outsb().unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        state.gpr[gpr::RDI] = DATA;
        state.gpr[gpr::RCX] = 2;
    });
    for value in [0x1122, 0x3344] {
        assert_eq!(
            machine.cpu.run(),
            Stop::PortRead {
                port: 0x1f0,
                size: 2
            }
        );
        machine.cpu.complete_read(value);
    }
    for value in [0x22, 0x11] {
        assert_eq!(
            machine.cpu.run(),
            Stop::PortWrite {
                port: 0x1f0,
                size: 1,
                value
            }
        );
        machine.cpu.complete_write();
    }
    machine.halt();
}

#[test]
fn a_long_fill_lets_interrupts_in() {
    let mut machine = Machine::assembled(|a| {
        a.rep().stosb().unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        state.gpr[gpr::RDI] = DATA;
        state.gpr[gpr::RCX] = 0x20_0000;
    });
    machine.mailbox.kick();
    assert_eq!(machine.cpu.run(), Stop::Kicked);
    // It goes on where it was: to the end of RAM, where the first MMIO store waits.
    let stop = machine.cpu.run();
    assert!(
        matches!(stop, Stop::Halted | Stop::MmioWrite { .. }),
        "{stop:?}"
    );
}
