//! The kernel's structures for a processor's registers, to and from the architectural state.

use dunlin_x86::state::{CpuState, DescriptorTable, LocalApicState, Segment, gpr, segment};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_dtable, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

/// Interrupts are blocked after MOV SS; after STI.
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;
const RFLAGS_IF: u64 = 1 << 9;
/// Legacy region and header of an XSAVE area.
pub(super) const XSAVE_LEGACY: usize = 576;
/// Bytes of the legacy region that are for software, where kernels leave notes.
const SOFTWARE_BYTES: std::ops::Range<usize> = 464..512;
/// The mask of MXCSR: a property of the processor, not of the guest; saved as the common part.
const MXCSR_MASK: std::ops::Range<usize> = 28..32;
/// XCR0 of a guest without XSAVE: x87 and SSE.
pub(super) const XCR0_LEGACY: u64 = 3;
/// What KVM_GET_XSAVE and KVM_SET_XSAVE move.
pub(super) const XSAVE_BYTES: usize = 4096;
/// Offset of XSTATE_BV in the XSAVE area.
const XSTATE_BV: usize = 512;

pub(super) fn to_kvm_sregs(state: &CpuState) -> kvm_sregs {
    let segment = |index: usize| to_kvm_segment(&state.segments[index]);
    kvm_sregs {
        cs: segment(segment::CS),
        ds: segment(segment::DS),
        es: segment(segment::ES),
        fs: segment(segment::FS),
        gs: segment(segment::GS),
        ss: segment(segment::SS),
        tr: to_kvm_segment(&state.tr),
        ldt: to_kvm_segment(&state.ldtr),
        gdt: to_kvm_table(&state.gdtr),
        idt: to_kvm_table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.msrs.efer,
        apic_base: state.apic.base,
        interrupt_bitmap: [0; 4],
    }
}

/// Level-triggered vectors in request or in service.
pub(super) fn level_vectors(apic: &LocalApicState) -> Vec<u8> {
    let bit = |base: usize, vector: u8| {
        let byte = base + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8);
        apic.registers[byte] >> (vector % 8) & 1 != 0
    };
    (16..=255)
        .filter(|vector| bit(0x180, *vector) && (bit(0x100, *vector) || bit(0x200, *vector)))
        .collect()
}

pub(super) fn registers(regs: &kvm_regs) -> [u64; 16] {
    [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]
}

pub(super) fn to_kvm_regs(state: &CpuState) -> kvm_regs {
    let all = &state.gpr;
    kvm_regs {
        rax: all[gpr::RAX],
        rcx: all[gpr::RCX],
        rdx: all[gpr::RDX],
        rbx: all[gpr::RBX],
        rsp: all[gpr::RSP],
        rbp: all[gpr::RBP],
        rsi: all[gpr::RSI],
        rdi: all[gpr::RDI],
        r8: all[8],
        r9: all[9],
        r10: all[10],
        r11: all[11],
        r12: all[12],
        r13: all[13],
        r14: all[14],
        r15: all[15],
        rip: state.rip,
        rflags: state.rflags,
    }
}

pub(super) fn segments(sregs: &kvm_sregs) -> [Segment; 6] {
    [
        &sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs,
    ]
    .map(from_kvm_segment)
}

pub(super) fn from_kvm_segment(from: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u16::from(value & 1) << at;
    Segment {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        access: u16::from(from.type_ & 0xf)
            | bit(from.s, 4)
            | u16::from(from.dpl & 3) << 5
            | bit(from.present, 7)
            | bit(from.avl, 12)
            | bit(from.l, 13)
            | bit(from.db, 14)
            | bit(from.g, 15),
        unusable: from.unusable != 0,
    }
}

pub(super) fn to_kvm_segment(from: &Segment) -> kvm_segment {
    let bit = |at: u32| (from.access >> at & 1) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: (from.access & 0xf) as u8,
        present: bit(7),
        dpl: (from.access >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(from.unusable),
        ..Default::default()
    }
}

pub(super) fn from_kvm_table(from: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: from.base,
        limit: from.limit,
    }
}

pub(super) fn to_kvm_table(from: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: from.base,
        limit: from.limit,
        ..Default::default()
    }
}

pub(super) fn to_kvm_xcrs(xcr0: u64) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = xcr0;
    xcrs
}

/// The area as far as XCR0 lets the guest use it. x87 and SSE are always there, also where the
/// kernel says that they are in their initial state.
pub(super) fn from_kvm_xsave(xsave: &kvm_xsave, xcr0: u64) -> Vec<u8> {
    let mut area: Vec<u8> = xsave.region.iter().flat_map(|w| w.to_le_bytes()).collect();
    area[SOFTWARE_BYTES].fill(0);
    area[MXCSR_MASK].copy_from_slice(&0xffff_u32.to_le_bytes());
    if xcr0 & !XCR0_LEGACY == 0 {
        area.truncate(XSAVE_LEGACY);
        area[XSTATE_BV..XSTATE_BV + 8].fill(0);
    }
    // What the guest cannot use is the host's affair.
    area[XSTATE_BV] &= xcr0 as u8 | 3;
    area[XSTATE_BV + 1..XSTATE_BV + 8].fill(0);
    area[XSTATE_BV] |= 3;
    area
}

pub(super) fn to_kvm_xsave(area: &[u8]) -> kvm_xsave {
    let mut xsave = kvm_xsave::default();
    for (word, bytes) in xsave.region.iter_mut().zip(area.chunks(4)) {
        let mut padded = [0; 4];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_le_bytes(padded);
    }
    xsave
}

pub(super) fn to_kvm_events(state: &CpuState) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some(vector) = state.events.injected_interrupt {
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
    }
    if state.events.interrupt_shadow {
        events.interrupt.shadow = match state.rflags & RFLAGS_IF {
            0 => SHADOW_MOV_SS,
            _ => SHADOW_STI,
        };
    }
    events.nmi.pending = u8::from(state.events.nmi_pending);
    events.nmi.masked = u8::from(state.events.nmi_masked);
    events
}
