//! A baseline as KVM takes it, after checking that the host can give it.

use dunlin_x86::cpuid::{Baseline, CpuidContext, Feature};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use super::{ENGINE, host_error};
use crate::EngineError;

/// What a host's KVM offers guests.
#[derive(Debug)]
struct Offer {
    /// Leaf, and EAX, EBX, ECX, EDX of its subleaf 0.
    leaves: Vec<(u32, [u32; 4])>,
    /// Features that KVM brings itself; its table does not list them.
    own: Vec<&'static str>,
}

impl Offer {
    fn of(kvm: &Kvm) -> Result<Self, EngineError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(host_error("read which CPU features it supports"))?;
        let leaves = supported.as_slice().iter();
        let leaves = leaves.filter(|entry| entry.index == 0).map(|entry| {
            let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            (entry.function, registers)
        });
        let own = [
            ("tsc_deadline_timer", Cap::TscDeadlineTimer),
            ("apic", Cap::Irqchip),
            ("x2apic", Cap::X2ApicApi),
        ];
        let own = own.into_iter().filter(|(_, cap)| kvm.check_extension(*cap));
        Ok(Self {
            leaves: leaves.collect(),
            own: own.map(|(name, _)| name).chain(["hypervisor"]).collect(),
        })
    }

    fn has(&self, feature: &Feature) -> bool {
        let bit = |registers: [u32; 4]| registers[feature.register as usize] >> feature.bit & 1;
        let mut leaves = self.leaves.iter();
        self.own.contains(&feature.name)
            || !OWN.contains(&feature.name)
                && leaves.any(|(leaf, registers)| *leaf == feature.leaf && bit(*registers) != 0)
    }
}

/// Features that count as offered only when KVM says so elsewhere than in its table.
const OWN: [&str; 3] = ["tsc_deadline_timer", "apic", "x2apic"];

/// Features of `baseline` that the host's KVM does not offer, by name.
pub(crate) fn missing_features(
    kvm: &Kvm,
    baseline: &Baseline,
) -> Result<Vec<&'static str>, EngineError> {
    let offer = Offer::of(kvm)?;
    Ok(baseline.missing(|feature| offer.has(feature)))
}

/// Fails with the names of the features that the host lacks.
pub(crate) fn check(kvm: &Kvm, baseline: &Baseline) -> Result<(), EngineError> {
    EngineError::unless_complete(ENGINE, baseline, missing_features(kvm, baseline)?)
}

/// The table for one processor.
pub(super) fn table(baseline: &Baseline, context: CpuidContext) -> Result<CpuId, EngineError> {
    let entries: Vec<_> = baseline
        .table(context)
        .into_iter()
        .map(|leaf| {
            let [eax, ebx, ecx, edx] = leaf.registers;
            kvm_cpuid_entry2 {
                function: leaf.leaf,
                index: leaf.subleaf.unwrap_or(0),
                flags: match leaf.subleaf {
                    Some(_) => KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    None => 0,
                },
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            }
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|error| {
        host_error("make a CPUID table")(std::io::Error::other(format!("{error:?}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_x86::cpuid::{Register, X86_64_V1, X86_64_V2};

    /// A host that offers all of a baseline but what `lacks` names.
    fn host(baseline: &Baseline, lacks: &[&str]) -> Offer {
        let mut leaves: Vec<(u32, [u32; 4])> = Vec::new();
        for feature in baseline.features().filter(|f| !lacks.contains(&f.name)) {
            let mut registers = [0; 4];
            registers[feature.register as usize] = 1 << feature.bit;
            leaves.push((feature.leaf, registers));
        }
        Offer {
            leaves,
            own: vec!["tsc_deadline_timer", "apic", "x2apic", "hypervisor"],
        }
    }

    fn missing(host: &Offer, baseline: &Baseline) -> Vec<&'static str> {
        baseline.missing(|feature| host.has(feature))
    }

    #[test]
    fn a_host_with_every_bit_gives_the_baseline() {
        let newest = host(&X86_64_V2, &[]);
        assert!(missing(&newest, &X86_64_V2).is_empty());
        assert!(missing(&newest, &X86_64_V1).is_empty());
    }

    #[test]
    fn what_a_host_lacks_is_named_in_the_refusal() {
        let older = host(&X86_64_V2, &["sse4_2", "popcnt"]);
        assert!(missing(&older, &X86_64_V1).is_empty());
        let missing = missing(&older, &X86_64_V2);
        let error = EngineError::unless_complete(ENGINE, &X86_64_V2, missing).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot give baseline x86-64-v2 under kvm: it lacks sse4_2, popcnt"
        );
    }

    #[test]
    fn each_feature_counts_by_its_own_bit() {
        for feature in X86_64_V2.features() {
            let all_but = host(&X86_64_V2, &[feature.name]);
            let own = all_but.own.contains(&feature.name);
            let expected: &[&str] = if own { &[] } else { &[feature.name] };
            assert_eq!(missing(&all_but, &X86_64_V2), expected);
        }
    }

    #[test]
    fn a_bit_in_the_table_does_not_stand_for_what_kvm_must_bring_itself() {
        let mut plain = host(&X86_64_V1, &[]);
        plain.own.clear();
        plain.leaves.push((1, [u32::MAX; 4]));
        let lacks = missing(&plain, &X86_64_V1);
        assert_eq!(lacks, ["apic", "x2apic", "tsc_deadline_timer"]);
        let x2apic = X86_64_V1.features().find(|f| f.name == "x2apic").unwrap();
        assert_eq!((x2apic.leaf, x2apic.register), (1, Register::Ecx));
    }
}
