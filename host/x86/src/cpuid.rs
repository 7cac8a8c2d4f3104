//! CPU baselines: what CPUID tells a guest (AMD APM vol. 3, appendix E; Intel SDM vol. 2, CPUID).
//!
//! A guest never sees "the host" but a [`Baseline`] with a name, the same on every host and engine,
//! so that it can move between them. The baselines present themselves as an AMD processor of
//! family 0x12 with round features: kernels know it as 64-bit and as free of Meltdown, L1TF, MDS
//! and Retbleed (which a host must be that offers it by KVM: the probe lists what it is not), and
//! touch only a handful of AMD's configuration registers on it, which read 0 and ignore writes.

use crate::float::{XCR0_LEGACY, XSAVE_AVX, XSAVE_AVX_BYTES, XSAVE_BYTES};

/// Guest physical address bits: covers the address map, and any host has as many.
pub const PHYSICAL_BITS: u32 = 40;
/// Linear address bits: four levels of page tables.
pub const LINEAR_BITS: u32 = 48;

/// First leaf for hypervisors.
const HYPERVISOR: u32 = 0x4000_0000;
/// Last hypervisor leaf: TSC and bus frequency.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
const EXTENDED: u32 = 0x8000_0000;
const MAX_BASIC: u32 = 0xb;
/// The same with XSAVE: the leaf of its state components.
const MAX_BASIC_XSAVE: u32 = 0xd;
const MAX_EXTENDED: u32 = 0x8000_0008;

/// Leaf 1 EDX: the local APIC is enabled.
const APIC: u32 = 1 << 9;
/// Leaf 1 EDX: EBX counts logical processors.
const HTT: u32 = 1 << 28;
/// Leaf 1 ECX: CR4.OSXSAVE is set.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 0x80000001 ECX: the logical processors counted by HTT are cores.
const CMP_LEGACY: u32 = 1 << 1;

/// KVM_FEATURE_CLOCKSOURCE2 and KVM_FEATURE_CLOCKSOURCE_STABLE_BIT.
const KVM_FEATURES: u32 = 1 << 3 | 1 << 24;

/// A register that CPUID fills; also its place in the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as the registers are")]
pub enum Register {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}

/// One feature bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// Its name, as `/proc/cpuinfo` writes it.
    pub name: &'static str,
    /// The leaf (subleaf 0).
    pub leaf: u32,
    /// The register.
    pub register: Register,
    /// The bit.
    pub bit: u32,
}

const fn feature(name: &'static str, leaf: u32, register: Register, bit: u32) -> Feature {
    Feature {
        name,
        leaf,
        register,
        bit,
    }
}

use Register::{Ebx, Ecx, Edx};

/// What every baseline has: the psABI's x86-64, and what the machine's own parts need.
const V1: &[Feature] = &[
    feature("fpu", 1, Edx, 0),
    feature("pse", 1, Edx, 3),
    feature("tsc", 1, Edx, 4),
    feature("msr", 1, Edx, 5),
    feature("pae", 1, Edx, 6),
    feature("cx8", 1, Edx, 8),
    feature("apic", 1, Edx, 9),
    feature("sep", 1, Edx, 11),
    feature("pge", 1, Edx, 13),
    feature("cmov", 1, Edx, 15),
    feature("pat", 1, Edx, 16),
    feature("clflush", 1, Edx, 19),
    feature("mmx", 1, Edx, 23),
    feature("fxsr", 1, Edx, 24),
    feature("sse", 1, Edx, 25),
    feature("sse2", 1, Edx, 26),
    feature("x2apic", 1, Ecx, 21),
    feature("tsc_deadline_timer", 1, Ecx, 24),
    feature("hypervisor", 1, Ecx, 31),
    feature("syscall", 0x8000_0001, Edx, 11),
    feature("nx", 0x8000_0001, Edx, 20),
    feature("lm", 0x8000_0001, Edx, 29),
];

/// What the psABI's x86-64-v2 adds, and RDTSCP, which all such processors have.
const V2: &[Feature] = &[
    feature("sse3", 1, Ecx, 0),
    feature("ssse3", 1, Ecx, 9),
    feature("cx16", 1, Ecx, 13),
    feature("sse4_1", 1, Ecx, 19),
    feature("sse4_2", 1, Ecx, 20),
    feature("popcnt", 1, Ecx, 23),
    feature("lahf_lm", 0x8000_0001, Ecx, 0),
    feature("rdtscp", 0x8000_0001, Edx, 27),
];

/// What the psABI's x86-64-v3 adds.
const V3: &[Feature] = &[
    feature("fma", 1, Ecx, 12),
    feature("movbe", 1, Ecx, 22),
    feature("xsave", 1, Ecx, 26),
    feature("avx", 1, Ecx, 28),
    feature("f16c", 1, Ecx, 29),
    feature("bmi1", 7, Ebx, 3),
    feature("avx2", 7, Ebx, 5),
    feature("bmi2", 7, Ebx, 8),
    // LZCNT.
    feature("abm", 0x8000_0001, Ecx, 5),
];

/// Bits of leaf 1 EDX that AMD processors repeat in leaf 0x80000001 EDX.
const REPEATED_EDX: u32 = 0x0183_f3ff;

/// A named CPU model.
#[derive(Debug)]
pub struct Baseline {
    name: &'static str,
    brand: &'static str,
    features: &'static [&'static [Feature]],
}

/// The psABI's x86-64.
pub static X86_64_V1: Baseline = Baseline {
    name: "x86-64-v1",
    brand: "Dunlin x86-64-v1 processor",
    features: &[V1],
};

/// The psABI's x86-64-v2: SSE4.2, POPCNT and CMPXCHG16B.
pub static X86_64_V2: Baseline = Baseline {
    name: "x86-64-v2",
    brand: "Dunlin x86-64-v2 processor",
    features: &[V1, V2],
};

/// The psABI's x86-64-v3: AVX2, FMA, F16C, BMI1, BMI2, LZCNT, MOVBE, and XSAVE for their state.
pub static X86_64_V3: Baseline = Baseline {
    name: "x86-64-v3",
    brand: "Dunlin x86-64-v3 processor",
    features: &[V1, V2, V3],
};

/// What a leaf depends on besides the baseline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidContext {
    /// The processor's local APIC ID.
    pub apic_id: u32,
    /// Processors of the VM.
    pub cpus: u32,
    /// The local APIC is enabled in IA32_APIC_BASE.
    pub apic_enabled: bool,
    /// CR4.OSXSAVE is set.
    pub osxsave: bool,
    /// XCR0, which says how much XSAVE writes.
    pub xcr0: u64,
    /// Frequency of the guest's TSC.
    pub tsc_khz: u64,
}

/// One line of a CPUID table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question, for leaves that look at it.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX of the answer.
    pub registers: [u32; 4],
}

impl Baseline {
    /// All baselines, weakest first.
    pub fn all() -> [&'static Baseline; 3] {
        [&X86_64_V1, &X86_64_V2, &X86_64_V3]
    }

    /// The one of a VM for which none was named. It never changes: a guest that is saved or moves
    /// without the name of its baseline has this one.
    pub fn unnamed() -> &'static Baseline {
        &X86_64_V2
    }

    /// The baseline called `name`.
    pub fn named(name: &str) -> Option<&'static Baseline> {
        Self::all().into_iter().find(|b| b.name == name)
    }

    /// Its name, e.g. `"x86-64-v2"`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The features that it promises.
    pub fn features(&self) -> impl Iterator<Item = Feature> + '_ {
        self.features.iter().copied().flatten().copied()
    }

    /// Does it promise the feature called `name`?
    pub fn has(&self, name: &str) -> bool {
        self.features().any(|feature| feature.name == name)
    }

    /// Names of the features that it promises and that are not `offered`.
    pub fn missing(&self, offered: impl Fn(&Feature) -> bool) -> Vec<&'static str> {
        self.features()
            .filter(|feature| !offered(feature))
            .map(|feature| feature.name)
            .collect()
    }

    /// The state components that XCR0 may enable: x87 and SSE without XSAVE, AVX too where there is AVX.
    pub fn xcr0(&self) -> u64 {
        if self.has("avx") {
            XCR0_LEGACY | XSAVE_AVX
        } else {
            XCR0_LEGACY
        }
    }

    fn bits(&self, leaf: u32, register: Register) -> u32 {
        self.features()
            .filter(|f| f.leaf == leaf && f.register == register)
            .fold(0, |bits, f| bits | 1 << f.bit)
    }

    /// What CPUID answers: EAX, EBX, ECX, EDX. Unknown leaves are zero.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, context: CpuidContext) -> [u32; 4] {
        let cpus = context.cpus.max(1);
        match leaf {
            0 if self.has("xsave") => vendor(MAX_BASIC_XSAVE),
            0 => vendor(MAX_BASIC),
            1 => self.leaf_1(cpus, context),
            4 => cache(subleaf, cpus),
            7 if subleaf == 0 => [0, self.bits(7, Ebx), self.bits(7, Ecx), self.bits(7, Edx)],
            0xb => topology(subleaf, cpus, context.apic_id),
            0xd if self.has("xsave") => xsave_components(subleaf, self.xcr0(), context.xcr0),
            HYPERVISOR => [
                HYPERVISOR_TIMING,
                word(b"KVMK"),
                word(b"VMKV"),
                word(b"M\0\0\0"),
            ],
            0x4000_0001 => [KVM_FEATURES, 0, 0, 0],
            HYPERVISOR_TIMING => {
                let khz = |khz: u64| u32::try_from(khz).unwrap_or(u32::MAX);
                [khz(context.tsc_khz), khz(crate::lapic::BUS_KHZ), 0, 0]
            }
            EXTENDED => vendor(MAX_EXTENDED),
            0x8000_0001 => {
                let repeated = self.leaf_1(cpus, context)[3] & REPEATED_EDX;
                let cores = if cpus > 1 { CMP_LEGACY } else { 0 };
                [
                    SIGNATURE,
                    0,
                    self.bits(leaf, Ecx) | cores,
                    self.bits(leaf, Edx) | repeated,
                ]
            }
            0x8000_0002..=0x8000_0004 => {
                let mut brand = [0; 48];
                brand[..self.brand.len()].copy_from_slice(self.brand.as_bytes());
                let part = (leaf - 0x8000_0002) as usize * 16;
                std::array::from_fn(|i| {
                    let at = part + i * 4;
                    word(&[brand[at], brand[at + 1], brand[at + 2], brand[at + 3]])
                })
            }
            // Caches: 32 KiB, 8 ways, for data and instructions each; 512 KiB, 8 ways.
            0x8000_0005 => [
                0,
                0,
                32 << 24 | 8 << 16 | 1 << 8 | 64,
                32 << 24 | 8 << 16 | 1 << 8 | 64,
            ],
            0x8000_0006 => [0, 0, 512 << 16 | 6 << 12 | 1 << 8 | 64, 0],
            MAX_EXTENDED => {
                let cores = (cpus - 1).min(0xff) | id_bits(cpus) << 12;
                [LINEAR_BITS << 8 | PHYSICAL_BITS, 0, cores, 0]
            }
            _ => [0; 4],
        }
    }

    fn leaf_1(&self, cpus: u32, context: CpuidContext) -> [u32; 4] {
        let (mut ecx, mut edx) = (self.bits(1, Ecx), self.bits(1, Edx));
        if context.osxsave {
            ecx |= OSXSAVE;
        }
        if !context.apic_enabled {
            edx &= !APIC;
        }
        let mut ebx = context.apic_id << 24 | 8 << 8;
        if cpus > 1 {
            edx |= HTT;
            ebx |= cpus.min(0xff) << 16;
        }
        [SIGNATURE, ebx, ecx, edx]
    }

    /// All leaves that are not zero, for an engine that wants the table beforehand.
    pub fn table(&self, context: CpuidContext) -> Vec<Leaf> {
        let plain = (0..=1)
            .chain([HYPERVISOR, 0x4000_0001, HYPERVISOR_TIMING])
            .chain(EXTENDED..=MAX_EXTENDED)
            .map(|leaf| (leaf, None));
        let components = if self.has("xsave") { 3 } else { 0 };
        let indexed = [(4, 4), (7, 1), (0xb, 3), (0xd, components)]
            .into_iter()
            .flat_map(|(leaf, count)| (0..count).map(move |subleaf| (leaf, Some(subleaf))));
        plain
            .chain(indexed)
            .map(|(leaf, subleaf)| Leaf {
                leaf,
                subleaf,
                registers: self.cpuid(leaf, subleaf.unwrap_or(0), context),
            })
            .collect()
    }
}

/// Family 0x12, model 1, stepping 0.
const SIGNATURE: u32 = 0x0030_0f10;

const fn word(text: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*text)
}

fn vendor(max: u32) -> [u32; 4] {
    [max, word(b"Auth"), word(b"cAMD"), word(b"enti")]
}

/// Bits of the APIC ID that tell apart `cpus` processors.
fn id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().ilog2()
}

/// Leaf 4: deterministic cache parameters.
fn cache(subleaf: u32, cpus: u32) -> [u32; 4] {
    let (kind, level, sets) = match subleaf {
        0 => (1, 1, 64),
        1 => (2, 1, 64),
        2 => (3, 2, 1024),
        _ => return [0; 4],
    };
    let cores = ((1u32 << id_bits(cpus).min(6)) - 1) << 26;
    let ways = 8;
    [
        kind | level << 5 | 1 << 8 | cores,
        (ways - 1) << 22 | (64 - 1),
        sets - 1,
        0,
    ]
}

/// Leaf 0xb: one thread a core, all cores in one package.
fn topology(subleaf: u32, cpus: u32, apic_id: u32) -> [u32; 4] {
    match subleaf {
        0 => [0, 1, 1 << 8, apic_id],
        1 => [id_bits(cpus), cpus.min(0xffff), 2 << 8 | 1, apic_id],
        _ => [0, 0, subleaf & 0xff, apic_id],
    }
}

/// Leaf 0xd: sizes and places of XSAVE's components in the standard format.
fn xsave_components(subleaf: u32, offered: u64, enabled: u64) -> [u32; 4] {
    let size = |components: u64| {
        let avx = if components & XSAVE_AVX != 0 {
            XSAVE_AVX_BYTES
        } else {
            0
        };
        (XSAVE_BYTES + avx) as u32
    };
    match subleaf {
        0 => [offered as u32, size(enabled), size(offered), 0],
        2 if offered & XSAVE_AVX != 0 => [XSAVE_AVX_BYTES as u32, XSAVE_BYTES as u32, 0, 0],
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(cpus: u32) -> CpuidContext {
        CpuidContext {
            apic_id: 1,
            cpus,
            apic_enabled: true,
            osxsave: false,
            xcr0: 1,
            tsc_khz: 2_600_000,
        }
    }

    #[test]
    fn an_application_processor_finds_what_linux_demands_of_it() {
        for baseline in Baseline::all() {
            let edx = baseline.cpuid(1, 0, context(2))[3];
            assert_eq!(edx & 0x0700_8161, 0x0700_8161, "{}", baseline.name());
            assert_ne!(baseline.cpuid(0x8000_0001, 0, context(2))[3] & 1 << 29, 0);
        }
    }

    #[test]
    fn baselines_are_found_by_name_and_grow() {
        assert_eq!(Baseline::named("x86-64-v2").unwrap().name(), "x86-64-v2");
        assert!(Baseline::named("host").is_none());
        let [v1, v2, v3] = Baseline::all();
        assert!(v1.features().all(|feature| v2.has(feature.name)));
        assert!(v2.features().all(|feature| v3.has(feature.name)));
        assert!(v2.has("sse4_2") && !v1.has("sse4_2"));
    }

    #[test]
    fn what_is_not_offered_is_named() {
        let without_sse4 = |feature: &Feature| !feature.name.starts_with("sse4");
        assert_eq!(X86_64_V2.missing(without_sse4), ["sse4_1", "sse4_2"]);
        assert!(X86_64_V1.missing(without_sse4).is_empty());
    }

    #[test]
    fn the_brand_and_the_hypervisor_can_be_read() {
        let text = |leaves: std::ops::RangeInclusive<u32>| {
            let bytes: Vec<u8> = leaves
                .flat_map(|leaf| X86_64_V2.cpuid(leaf, 0, context(1)))
                .flat_map(u32::to_le_bytes)
                .collect();
            String::from_utf8(bytes).unwrap()
        };
        let brand = text(0x8000_0002..=0x8000_0004);
        assert_eq!(brand.trim_end_matches('\0'), "Dunlin x86-64-v2 processor");
        assert_eq!(&text(HYPERVISOR..=HYPERVISOR)[4..], "KVMKVMKVM\0\0\0");
    }

    #[test]
    fn processors_are_counted_as_cores_of_one_package() {
        let cpuid = |leaf, subleaf| X86_64_V2.cpuid(leaf, subleaf, context(3));
        assert_eq!(cpuid(0xb, 1), [2, 3, 0x201, 1]);
        assert_eq!(cpuid(0xb, 2), [0, 0, 2, 1]);
        assert_eq!(cpuid(1, 0)[1] >> 16, 0x103);
        assert_ne!(cpuid(1, 0)[3] & HTT, 0);
        assert_eq!(cpuid(0x8000_0008, 0)[2], 2 << 12 | 2);
        assert_eq!(X86_64_V2.cpuid(1, 0, context(1))[3] & HTT, 0);
    }

    #[test]
    fn a_disabled_apic_is_not_shown() {
        let off = CpuidContext {
            apic_enabled: false,
            ..context(1)
        };
        assert_eq!(X86_64_V2.cpuid(1, 0, off)[3] & APIC, 0);
        assert_eq!(X86_64_V2.cpuid(0x8000_0001, 0, off)[3] & APIC, 0);
    }

    #[test]
    fn the_table_answers_as_the_instruction_does() {
        for leaf in X86_64_V2.table(context(2)) {
            let answer = X86_64_V2.cpuid(leaf.leaf, leaf.subleaf.unwrap_or(0), context(2));
            assert_eq!(leaf.registers, answer);
        }
        assert_eq!(X86_64_V2.cpuid(7, 0, context(2)), [0; 4]);
        assert_eq!(X86_64_V2.cpuid(0x1234_5678, 9, context(2)), [0; 4]);
    }

    #[test]
    fn a_kernel_finds_avx_and_where_xsave_keeps_it() {
        let with = |osxsave, xcr0| CpuidContext {
            osxsave,
            xcr0,
            ..context(1)
        };
        let v3 = |leaf, subleaf, context| X86_64_V3.cpuid(leaf, subleaf, context);
        assert_eq!(v3(0, 0, with(false, 1))[0], 0xd);
        assert_eq!(v3(1, 0, with(false, 1))[2] & OSXSAVE, 0);
        assert_ne!(v3(1, 0, with(true, 7))[2] & OSXSAVE, 0);
        assert_eq!(v3(7, 0, with(true, 7)), [0, 0x128, 0, 0]);
        assert_eq!(v3(7, 1, with(true, 7)), [0; 4]);
        assert_eq!(v3(0xd, 0, with(true, 1)), [7, 576, 832, 0]);
        assert_eq!(v3(0xd, 0, with(true, 7)), [7, 832, 832, 0]);
        assert_eq!(v3(0xd, 1, with(true, 7)), [0; 4]);
        assert_eq!(v3(0xd, 2, with(true, 7)), [256, 576, 0, 0]);
        assert_ne!(v3(0x8000_0001, 0, with(true, 7))[2] & 1 << 5, 0);
        // The older ones stay what they were.
        assert_eq!(X86_64_V2.cpuid(0, 0, context(1))[0], 0xb);
        assert_eq!(X86_64_V2.cpuid(0xd, 0, context(1)), [0; 4]);
    }

    #[test]
    fn extreme_counts_do_not_panic() {
        for cpus in [0, 1, 255, 256, 0xffff, 1 << 31] {
            X86_64_V2.table(context(cpus));
        }
    }
}
