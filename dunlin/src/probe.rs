//! What this host offers, in words.

use dunlin_api::probe::{ProbeBaseline, ProbeItem, ProbeReport};
use dunlin_hypervisor::Engine;
use dunlin_hypervisor::probe::{
    BaselineOffer, EngineRequest, HostProbe, UserfaultfdAccess, choose,
};
use dunlin_x86::cpuid::Baseline;

/// Looks at this host.
pub(crate) fn probe() -> ProbeReport {
    let (engine, engine_reason) = match choose(EngineRequest::Auto, Baseline::unnamed()) {
        Ok((Engine::Kvm, reason)) => ("kvm", reason),
        Ok((Engine::Soft, reason)) => ("soft", reason),
        Err(error) => ("soft", dunlin_api::error::chain(&error)),
    };
    let host = HostProbe::run();
    ProbeReport {
        engine: engine.into(),
        engine_reason,
        baselines: host.baselines.iter().map(baseline).collect(),
        items: items(host),
    }
}

fn baseline(offer: &BaselineOffer) -> ProbeBaseline {
    let missing = offer.missing.as_deref().unwrap_or_default();
    ProbeBaseline {
        name: offer.baseline.into(),
        engine: match offer.engine {
            Engine::Soft => "soft".into(),
            Engine::Kvm => "kvm".into(),
        },
        usable: offer.is_complete(),
        missing: missing.iter().map(|name| (*name).to_owned()).collect(),
        reason: offer.missing.as_ref().err().cloned(),
    }
}

fn items(host: HostProbe) -> Vec<ProbeItem> {
    let HostProbe {
        cpu_vendor,
        cpu_model,
        cpus,
        cpu_features,
        baselines: _,
        vulnerabilities,
        kernel,
        kvm,
        ring0,
        userfaultfd,
        tap,
        huge_pages,
        rdma_devices,
        sriov_devices,
    } = host;
    let kvm_detail = match &kvm {
        Ok(()) => "/dev/kvm opens".into(),
        Err(reason) => reason.clone(),
    };
    let ring0_detail = match ring0 {
        Some(speed) if speed.native => {
            format!("native ({:.1} times the host's time)", speed.slowdown)
        }
        Some(speed) => format!("emulated ({:.0} times the host's time)", speed.slowdown),
        None => "not measured".into(),
    };
    let pages = huge_pages
        .iter()
        .map(|(size, count)| format!("{count} of {size} kB"));
    let functions = sriov_devices
        .iter()
        .map(|device| format!("{} ({})", device.interface, device.functions));
    vec![
        item(
            "processor",
            true,
            format!("{cpu_model} ({cpu_vendor}), {cpus} usable"),
        ),
        item("features", !cpu_features.is_empty(), listed(&cpu_features)),
        item(
            "vulnerabilities",
            vulnerabilities.is_empty(),
            listed(&vulnerabilities),
        ),
        item("kernel", true, kernel),
        item("kvm", kvm.is_ok(), kvm_detail),
        item(
            "ring 0 under kvm",
            ring0.is_some_and(|speed| speed.native),
            ring0_detail,
        ),
        item(
            "page faults",
            userfaultfd != UserfaultfdAccess::None,
            match userfaultfd {
                UserfaultfdAccess::Full => "userfaultfd: of processes and of the kernel".into(),
                UserfaultfdAccess::UserOnly => "userfaultfd: of processes only".into(),
                UserfaultfdAccess::None => "userfaultfd cannot be opened".into(),
            },
        ),
        item(
            "tap",
            tap,
            if tap {
                "/dev/net/tun opens".into()
            } else {
                "/dev/net/tun does not open; the built-in gateway needs none".into()
            },
        ),
        item(
            "huge pages",
            huge_pages.iter().any(|(_, count)| *count > 0),
            listed(pages),
        ),
        item("rdma", !rdma_devices.is_empty(), listed(&rdma_devices)),
        item("sr-iov", !sriov_devices.is_empty(), listed(functions)),
    ]
}

fn item(name: &str, usable: bool, detail: String) -> ProbeItem {
    ProbeItem {
        name: name.into(),
        usable,
        detail,
    }
}

fn listed<T: AsRef<str>>(words: impl IntoIterator<Item = T>) -> String {
    let words: Vec<String> = words
        .into_iter()
        .map(|word| word.as_ref().to_owned())
        .collect();
    if words.is_empty() {
        "none".into()
    } else {
        words.join(", ")
    }
}
