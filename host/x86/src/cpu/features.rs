//! What of the architecture's optional parts the software CPU has.

use super::Cpu;
use crate::cpuid::{Baseline, Feature};

/// Features that are implemented, by the names of [`Feature`]. A feature is added here together
/// with its instructions: a baseline alone does not make the processor able to run them.
const IMPLEMENTED: [&str; 35] = [
    "fpu",
    "pse",
    "tsc",
    "msr",
    "pae",
    "cx8",
    "apic",
    "sep",
    "pge",
    "cmov",
    "pat",
    "clflush",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "sse3",
    "ssse3",
    "cx16",
    "sse4_1",
    "sse4_2",
    "x2apic",
    "popcnt",
    "tsc_deadline_timer",
    "hypervisor",
    "syscall",
    "nx",
    "rdtscp",
    "lm",
    "lahf_lm",
    "movbe",
    "bmi1",
    "bmi2",
    "abm",
    "xsave",
];

/// Features whose instructions the host's processor executes for the guest: they are there where it
/// has them, and the memory to put code into.
const BY_THE_HOST: [&str; 4] = ["avx", "avx2", "fma", "f16c"];

impl Cpu {
    /// Does the software CPU have the feature?
    pub fn implements(feature: &Feature) -> bool {
        IMPLEMENTED.contains(&feature.name)
            || BY_THE_HOST.contains(&feature.name) && crate::float::host_executes(feature.name)
    }

    /// Features of `baseline` that the software CPU lacks, by name.
    pub fn missing_features(baseline: &Baseline) -> Vec<&'static str> {
        baseline.missing(Self::implements)
    }
}
