//! A baseline as KVM takes it, after checking that the host can give it.

use dunlin_x86::cpuid::{Baseline, CpuidContext, Feature};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use super::{ENGINE, host_error};
use crate::EngineError;

/// Features of `baseline` that the host's KVM does not offer, by name.
pub(crate) fn missing_features(
    kvm: &Kvm,
    baseline: &Baseline,
) -> Result<Vec<&'static str>, EngineError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(host_error("read which CPU features it supports"))?;
    let offered = |feature: &Feature| match feature.name {
        // These are KVM's own doing; the table does not list them.
        "hypervisor" => true,
        "tsc_deadline_timer" => kvm.check_extension(Cap::TscDeadlineTimer),
        "apic" => kvm.check_extension(Cap::Irqchip),
        "x2apic" => kvm.check_extension(Cap::X2ApicApi),
        _ => supported
            .as_slice()
            .iter()
            .filter(|entry| entry.function == feature.leaf && entry.index == 0)
            .map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
            .any(|registers| registers[feature.register as usize] >> feature.bit & 1 != 0),
    };
    Ok(baseline
        .features()
        .filter(|feature| !offered(feature))
        .map(|feature| feature.name)
        .collect())
}

/// Fails with the names of the features that the host lacks.
pub(crate) fn check(kvm: &Kvm, baseline: &Baseline) -> Result<(), EngineError> {
    refuse(&missing_features(kvm, baseline)?, baseline)
}

fn refuse(missing: &[&str], baseline: &Baseline) -> Result<(), EngineError> {
    if missing.is_empty() {
        return Ok(());
    }
    Err(EngineError::Unavailable {
        engine: ENGINE,
        reason: format!(
            "the host lacks {} of baseline \"{}\"; choose a weaker baseline",
            missing.join(", "),
            baseline.name()
        ),
    })
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
    use dunlin_x86::cpuid::X86_64_V2;

    #[test]
    fn what_is_missing_is_named() {
        let error = refuse(&["sse3", "popcnt"], &X86_64_V2).unwrap_err();
        assert!(error.to_string().contains("sse3, popcnt"));
        refuse(&[], &X86_64_V2).unwrap();
    }
}
