//! Guests of a few bytes: ELF files with a PVH note and 32-bit code at 1 MiB.

use std::path::{Path, PathBuf};

/// Prints `hello` and switches itself off by ACPI.
pub(crate) fn hello() -> Vec<u8> {
    let mut code = Vec::new();
    for byte in b"hello\n" {
        code.extend(out_byte(0x3f8, *byte));
    }
    code.extend(out_byte(0x600, 5 << 2 | 1 << 5));
    code.extend(halt());
    code
}

/// Prints the letters from `b` on, round and round, from a counter in memory.
pub(crate) fn letters() -> Vec<u8> {
    vec![
        0xff, 0x05, 0, 0, 0x20, 0, // inc dword [0x200000]
        0xa1, 0, 0, 0x20, 0, // mov eax, [0x200000]
        0x31, 0xd2, // xor edx, edx
        0xb9, 26, 0, 0, 0, // mov ecx, 26
        0xf7, 0xf1, // div ecx
        0x8d, 0x42, b'a', // lea eax, [edx + 'a']
        0xba, 0xf8, 0x03, 0, 0,    // mov edx, 0x3f8
        0xee, // out dx, al
        0xb9, 0x00, 0x40, 0, 0,    // mov ecx, 0x4000
        0x49, // dec ecx
        0x75, 0xfd, // jnz -3
        0xeb, 0xd7, // jmp start
    ]
}

/// Writes the numbers from 0 on to the debug port, round and round.
pub(crate) fn counts_on_the_debug_port() -> Vec<u8> {
    vec![
        0x31, 0xc0, // xor eax, eax
        0xe6, 0xe9, // out 0xe9, al
        0xfe, 0xc0, // inc al
        0xb9, 0x00, 0x10, 0, 0,    // mov ecx, 0x1000
        0x49, // dec ecx
        0x75, 0xfd, // jnz -3
        0xeb, 0xf2, // jmp to out
    ]
}

/// Counts in each page of 4 MiB, one lap after the other, and prints the next letter after each lap;
/// `!` when a page does not hold what the last lap left.
pub(crate) fn laps() -> Vec<u8> {
    vec![
        0xbb, 0, 0, 0, 0, // mov ebx, 0
        0xbf, 0, 0, 0x20, 0, // lap: mov edi, 0x200000
        0x39, 0x1f, // next: cmp [edi], ebx
        0x75, 0x27, // jne bad
        0xff, 0x07, // inc dword [edi]
        0x81, 0xc7, 0, 0x10, 0, 0, // add edi, 0x1000
        0x81, 0xff, 0, 0, 0x60, 0, // cmp edi, 0x600000
        0x75, 0xec, // jne next
        0x43, // inc ebx
        0x89, 0xd8, // mov eax, ebx
        0x31, 0xd2, // xor edx, edx
        0xb9, 26, 0, 0, 0, // mov ecx, 26
        0xf7, 0xf1, // div ecx
        0x88, 0xd0, // mov al, dl
        0x04, b'a', // add al, 'a'
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0xeb, 0xd0, // jmp lap
        0xb0, b'!', 0x66, 0xba, 0xf8, 0x03,
        0xee, // bad: mov al, '!'; mov dx, 0x3f8; out dx, al
        0xfa, 0xf4, 0xeb, 0xfd, // halt
    ]
}

/// Prints `R` and resets itself by ACPI.
pub(crate) fn reboots() -> Vec<u8> {
    let mut code = out_byte(0x3f8, b'R');
    code.extend(out_byte(0x602, 1));
    code.extend(halt());
    code
}

/// Loads an empty interrupt table and divides by zero: a triple fault.
pub(crate) fn crashes() -> Vec<u8> {
    let mut code = vec![0x0f, 0x01, 0x1d, 0, 0, 0x20, 0]; // lidt [0x200000], which holds zeros
    code.extend([0x0f, 0x0b]); // ud2
    code
}

fn out_byte(port: u16, byte: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, byte, 0xee]
}

fn halt() -> Vec<u8> {
    vec![0xfa, 0xf4, 0xeb, 0xfd]
}

/// Writes `code` as a kernel.
pub(crate) fn kernel(folder: &Path, code: &[u8]) -> PathBuf {
    const LOAD: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend(2u16.to_le_bytes()); // executable
    elf.extend(62u16.to_le_bytes()); // x86-64
    elf.extend(1u32.to_le_bytes());
    elf.extend(LOAD.to_le_bytes());
    elf.extend(64u64.to_le_bytes());
    elf.extend(0u64.to_le_bytes());
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, offset: u64, address: u64, size: u64| {
        elf.extend(kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        for word in [offset, address, address, size, size, 4] {
            elf.extend(u64::to_le_bytes(word));
        }
    };
    segment(4, HEADERS, 0, NOTE);
    segment(1, HEADERS + NOTE, LOAD, code.len() as u64);
    for word in [4u32, 4, 18] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(b"Xen\0");
    elf.extend((LOAD as u32).to_le_bytes());
    elf.extend(code);
    let path = folder.join("kernel");
    std::fs::write(&path, elf).unwrap();
    path
}
