//! Runs an instruction on the host's processor.
//!
//! [`Native::run`] loads every register from a page at a fixed address and jumps to the
//! instruction. What follows it there jumps back through a pointer in that page; a fault or a
//! breakpoint arrives as a signal, whose handler takes the registers from the signal frame.

#![expect(
    unsafe_code,
    reason = "executes arbitrary instructions with arbitrary registers"
)]

use std::arch::asm;
use std::ptr::{self, NonNull};

use crate::layout::*;

/// The page at [`CONTROL`].
#[repr(C)]
struct Control {
    input: Machine,
    output: Machine,
    host_stack: u64,
    /// Where an instruction that ended well goes on.
    exit: u64,
    /// Where one that did not goes on.
    abandon: u64,
    target: u64,
    mxcsr: u32,
    running: u32,
    /// The processor has YMM registers.
    avx: u32,
    /// Vector, error code and address of a signal; the vector is `u64::MAX` without one.
    vector: u64,
    code: u64,
    address: u64,
    /// What was done about [`SIGNALS`] before.
    actions: [libc::sigaction; SIGNALS.len()],
}

/// What instructions may raise.
const SIGNALS: [i32; 5] = [
    libc::SIGSEGV,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGBUS,
    libc::SIGTRAP,
];

const INPUT: u64 = CONTROL;
const OUTPUT: u64 = CONTROL + size_of::<Machine>() as u64;
const FIELDS: u64 = OUTPUT + size_of::<Machine>() as u64;
const GPR: u64 = 512;
const RFLAGS: u64 = GPR + 16 * 8;
const UPPER: u64 = std::mem::offset_of!(Machine, upper) as u64;

const _: () = assert!(std::mem::offset_of!(Control, host_stack) as u64 == FIELDS - CONTROL);
const _: () = assert!(std::mem::offset_of!(Control, avx) as u64 == FIELDS + 40 - CONTROL);
const _: () = assert!(std::mem::offset_of!(Control, mxcsr) as u64 == FIELDS + 32 - CONTROL);

/// The fixed mappings, of which a process has one set.
pub(crate) struct Native {
    code: NonNull<u8>,
}

fn control() -> *mut Control {
    ptr::with_exposed_provenance_mut(CONTROL as usize)
}

/// Maps `bytes` at `address`.
fn map(address: u64, bytes: usize, protection: i32, file: Option<i32>) -> *mut u8 {
    let place = ptr::without_provenance_mut(address as usize);
    let fixed = if address == 0 {
        0
    } else {
        libc::MAP_FIXED_NOREPLACE
    };
    let kind = if file.is_some() {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
    };
    // SAFETY: a new mapping, at a place where there is none.
    let mapped = unsafe {
        libc::mmap(
            place,
            bytes,
            protection,
            kind | fixed,
            file.unwrap_or(-1),
            0,
        )
    };
    assert!(
        mapped != libc::MAP_FAILED && (address == 0 || mapped as u64 == address),
        "cannot map {address:#x}: {}",
        std::io::Error::last_os_error()
    );
    mapped.cast()
}

extern "C" fn on_signal(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes valid pointers; the control page exists before the handler does.
    unsafe {
        let control = control();
        let context = context.cast::<libc::ucontext_t>();
        let registers = &mut (*context).uc_mcontext.gregs;
        if (*control).running == 0 {
            // Not ours: what was done before, at the next try.
            for (signal, action) in SIGNALS.into_iter().zip(&(*control).actions) {
                libc::sigaction(signal, action, ptr::null_mut());
            }
            return;
        }
        let register = |index: i32| registers[index as usize] as u64;
        (*control).vector = register(libc::REG_TRAPNO);
        (*control).code = register(libc::REG_ERR);
        (*control).address = (*info).si_addr() as u64;
        let order = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        let output = &raw mut (*control).output;
        for (slot, index) in (*output).gpr.iter_mut().zip(order) {
            *slot = register(index);
        }
        (*output).rflags = register(libc::REG_EFL);
        (*output).rip = register(libc::REG_RIP);
        let float = (*context).uc_mcontext.fpregs.cast::<[u8; 512]>();
        (*output).float = *float;
        (*output).upper = upper_halves(float.cast());
        registers[libc::REG_RIP as usize] = (*control).abandon as i64;
        registers[libc::REG_RSP as usize] = (*control).host_stack as i64;
        registers[libc::REG_EFL as usize] = 0x202;
    }
}

/// The upper halves of the YMM registers in a signal frame.
///
/// # Safety
/// `frame` is the floating-point state of one, which says itself how far it reaches.
unsafe fn upper_halves(frame: *const u8) -> [u8; 256] {
    const MAGIC: u32 = 0x4650_5853;
    const AVX: u64 = 1 << 2;
    // SAFETY: the legacy region is always there; the mark in it says that the header and all enabled
    // components, of which AVX is the first in the standard format, follow.
    unsafe {
        let extended = frame.add(464).cast::<u32>().read_unaligned() == MAGIC;
        if extended && frame.add(512).cast::<u64>().read_unaligned() & AVX != 0 {
            return frame.add(576).cast::<[u8; 256]>().read_unaligned();
        }
    }
    [0; 256]
}

impl Native {
    /// Makes the mappings and takes the signals.
    pub(crate) fn new(pages: CodePages) -> Self {
        map(CONTROL, PAGE, libc::PROT_READ | libc::PROT_WRITE, None);
        map(DATA, DATA_BYTES, libc::PROT_READ | libc::PROT_WRITE, None);
        map(STACK, STACK_BYTES, libc::PROT_READ | libc::PROT_WRITE, None);
        // SAFETY: plain calls; the signal stack is never freed.
        let code = unsafe {
            let file = libc::memfd_create(c"differential".as_ptr(), 0);
            assert_eq!(libc::ftruncate(file, CODE_BYTES as i64), 0);
            let writable = match pages {
                CodePages::Read => 0,
                CodePages::Write => libc::PROT_WRITE,
            };
            map(
                CODE,
                CODE_BYTES,
                libc::PROT_READ | libc::PROT_EXEC | writable,
                Some(file),
            );
            let code = map(
                0,
                CODE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                Some(file),
            );
            libc::close(file);
            let stack = libc::stack_t {
                ss_sp: map(0, 0x1_0000, libc::PROT_READ | libc::PROT_WRITE, None).cast(),
                ss_flags: 0,
                ss_size: 0x1_0000,
            };
            assert_eq!(libc::sigaltstack(&stack, ptr::null_mut()), 0);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            for (index, signal) in SIGNALS.into_iter().enumerate() {
                let before = &raw mut (*control()).actions[index];
                assert_eq!(libc::sigaction(signal, &action, before), 0);
            }
            code
        };
        Self {
            code: NonNull::new(code).expect("mmap succeeded"),
        }
    }

    /// The instructions, to be written. They are executed through another mapping.
    pub(crate) fn code(&mut self) -> &mut [u8] {
        // SAFETY: the whole of the writable mapping, borrowed as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.code.as_ptr(), CODE_BYTES) }
    }

    /// The jump that ends an instruction well.
    pub(crate) fn exit_jump() -> [u8; 7] {
        let pointer = (FIELDS + 8) as u32;
        let mut jump = [0xff, 0x24, 0x25, 0, 0, 0, 0];
        jump[3..].copy_from_slice(&pointer.to_le_bytes());
        jump
    }

    /// Data and stack as instructions see them.
    pub(crate) fn scratch(&mut self) -> [&mut [u8]; 2] {
        // SAFETY: mapped by `new`, private to this process, and not executed on right now.
        unsafe {
            [
                std::slice::from_raw_parts_mut(
                    ptr::with_exposed_provenance_mut(DATA as usize),
                    DATA_BYTES,
                ),
                std::slice::from_raw_parts_mut(
                    ptr::with_exposed_provenance_mut(STACK as usize),
                    STACK_BYTES,
                ),
            ]
        }
    }

    /// Runs the instructions from `input.rip` on; what they leave well by is at `end`.
    pub(crate) fn run(&mut self, input: &Machine, end: u64) -> (Machine, End) {
        let control = control();
        // SAFETY: the control page is this struct's alone; the instructions were made by the
        // generator, which points them at the scratch memory or at pages that do not exist.
        unsafe {
            (*control).input = *input;
            (*control).vector = u64::MAX;
            (*control).target = input.rip;
            (*control).mxcsr = 0x1f80;
            (*control).avx = is_x86_feature_detected!("avx").into();
            (*control).running = 1;
            enter();
            (*control).running = 0;
            let output = (*control).output;
            let end = match (*control).vector {
                u64::MAX => End::At(end),
                3 => End::At(output.rip - 1),
                vector => End::Fault {
                    vector: vector as u8,
                    code: (*control).code,
                    address: if vector == 14 { (*control).address } else { 0 },
                },
            };
            (output, end)
        }
    }
}

/// # Safety
/// The control page is filled in.
unsafe fn enter() {
    // SAFETY: every register is saved by the compiler, by the pushes or by the host's stack
    // pointer in the control page; flags, MXCSR and the x87 state are reset at the end.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "mov qword ptr [{fields}], rsp",
            "lea rax, [rip + 2f]",
            "mov qword ptr [{fields} + 8], rax",
            "lea rax, [rip + 3f]",
            "mov qword ptr [{fields} + 16], rax",
            "fxrstor64 [{input}]",
            "cmp dword ptr [{fields} + 40], 0",
            "je 4f",
            "vinsertf128 ymm0, ymm0, [{input} + {upper} + 0], 1",
            "vinsertf128 ymm1, ymm1, [{input} + {upper} + 16], 1",
            "vinsertf128 ymm2, ymm2, [{input} + {upper} + 32], 1",
            "vinsertf128 ymm3, ymm3, [{input} + {upper} + 48], 1",
            "vinsertf128 ymm4, ymm4, [{input} + {upper} + 64], 1",
            "vinsertf128 ymm5, ymm5, [{input} + {upper} + 80], 1",
            "vinsertf128 ymm6, ymm6, [{input} + {upper} + 96], 1",
            "vinsertf128 ymm7, ymm7, [{input} + {upper} + 112], 1",
            "vinsertf128 ymm8, ymm8, [{input} + {upper} + 128], 1",
            "vinsertf128 ymm9, ymm9, [{input} + {upper} + 144], 1",
            "vinsertf128 ymm10, ymm10, [{input} + {upper} + 160], 1",
            "vinsertf128 ymm11, ymm11, [{input} + {upper} + 176], 1",
            "vinsertf128 ymm12, ymm12, [{input} + {upper} + 192], 1",
            "vinsertf128 ymm13, ymm13, [{input} + {upper} + 208], 1",
            "vinsertf128 ymm14, ymm14, [{input} + {upper} + 224], 1",
            "vinsertf128 ymm15, ymm15, [{input} + {upper} + 240], 1",
            "4:",
            "push qword ptr [{input} + {rflags}]",
            "popfq",
            "mov rax, qword ptr [{input} + {gpr}]",
            "mov rcx, qword ptr [{input} + {gpr} + 8]",
            "mov rdx, qword ptr [{input} + {gpr} + 16]",
            "mov rbx, qword ptr [{input} + {gpr} + 24]",
            "mov rsp, qword ptr [{input} + {gpr} + 32]",
            "mov rbp, qword ptr [{input} + {gpr} + 40]",
            "mov rsi, qword ptr [{input} + {gpr} + 48]",
            "mov rdi, qword ptr [{input} + {gpr} + 56]",
            "mov r8, qword ptr [{input} + {gpr} + 64]",
            "mov r9, qword ptr [{input} + {gpr} + 72]",
            "mov r10, qword ptr [{input} + {gpr} + 80]",
            "mov r11, qword ptr [{input} + {gpr} + 88]",
            "mov r12, qword ptr [{input} + {gpr} + 96]",
            "mov r13, qword ptr [{input} + {gpr} + 104]",
            "mov r14, qword ptr [{input} + {gpr} + 112]",
            "mov r15, qword ptr [{input} + {gpr} + 120]",
            "jmp qword ptr [{fields} + 24]",
            "2:",
            "mov qword ptr [{output} + {gpr}], rax",
            "mov qword ptr [{output} + {gpr} + 8], rcx",
            "mov qword ptr [{output} + {gpr} + 16], rdx",
            "mov qword ptr [{output} + {gpr} + 24], rbx",
            "mov qword ptr [{output} + {gpr} + 32], rsp",
            "mov qword ptr [{output} + {gpr} + 40], rbp",
            "mov qword ptr [{output} + {gpr} + 48], rsi",
            "mov qword ptr [{output} + {gpr} + 56], rdi",
            "mov qword ptr [{output} + {gpr} + 64], r8",
            "mov qword ptr [{output} + {gpr} + 72], r9",
            "mov qword ptr [{output} + {gpr} + 80], r10",
            "mov qword ptr [{output} + {gpr} + 88], r11",
            "mov qword ptr [{output} + {gpr} + 96], r12",
            "mov qword ptr [{output} + {gpr} + 104], r13",
            "mov qword ptr [{output} + {gpr} + 112], r14",
            "mov qword ptr [{output} + {gpr} + 120], r15",
            "mov rsp, qword ptr [{fields}]",
            "pushfq",
            "pop qword ptr [{output} + {rflags}]",
            "fxsave64 [{output}]",
            "cmp dword ptr [{fields} + 40], 0",
            "je 3f",
            "vextractf128 [{output} + {upper} + 0], ymm0, 1",
            "vextractf128 [{output} + {upper} + 16], ymm1, 1",
            "vextractf128 [{output} + {upper} + 32], ymm2, 1",
            "vextractf128 [{output} + {upper} + 48], ymm3, 1",
            "vextractf128 [{output} + {upper} + 64], ymm4, 1",
            "vextractf128 [{output} + {upper} + 80], ymm5, 1",
            "vextractf128 [{output} + {upper} + 96], ymm6, 1",
            "vextractf128 [{output} + {upper} + 112], ymm7, 1",
            "vextractf128 [{output} + {upper} + 128], ymm8, 1",
            "vextractf128 [{output} + {upper} + 144], ymm9, 1",
            "vextractf128 [{output} + {upper} + 160], ymm10, 1",
            "vextractf128 [{output} + {upper} + 176], ymm11, 1",
            "vextractf128 [{output} + {upper} + 192], ymm12, 1",
            "vextractf128 [{output} + {upper} + 208], ymm13, 1",
            "vextractf128 [{output} + {upper} + 224], ymm14, 1",
            "vextractf128 [{output} + {upper} + 240], ymm15, 1",
            "3:",
            "cmp dword ptr [{fields} + 40], 0",
            "je 5f",
            "vzeroupper",
            "5:",
            "push 0x202",
            "popfq",
            "fninit",
            "ldmxcsr dword ptr [{fields} + 32]",
            "pop rbp",
            "pop rbx",
            input = const INPUT,
            output = const OUTPUT,
            fields = const FIELDS,
            gpr = const GPR,
            rflags = const RFLAGS,
            upper = const UPPER,
            out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
}
