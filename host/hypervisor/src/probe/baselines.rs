//! Which baselines each engine can give here.

use dunlin_x86::Cpu;
use dunlin_x86::cpuid::Baseline;

use super::reason;
use crate::Engine;
use crate::kvm::{missing_features, open};

/// Whether an engine can give a baseline on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaselineOffer {
    /// Name of the baseline.
    pub baseline: &'static str,
    /// The engine.
    pub engine: Engine,
    /// Names of the features that it lacks; or why the engine cannot be had at all.
    pub missing: Result<Vec<&'static str>, String>,
}

impl BaselineOffer {
    /// Can the engine give the baseline?
    pub fn is_complete(&self) -> bool {
        self.missing.as_ref().is_ok_and(Vec::is_empty)
    }
}

/// All baselines under all engines.
pub fn baselines() -> Vec<BaselineOffer> {
    let kvm = open();
    Baseline::all()
        .into_iter()
        .flat_map(|baseline| {
            let under_kvm = match &kvm {
                Ok(kvm) => missing_features(kvm, baseline).map_err(reason),
                Err(error) => Err(error.to_string()),
            };
            let offer = |engine, missing| BaselineOffer {
                baseline: baseline.name(),
                engine,
                missing,
            };
            [
                offer(Engine::Soft, Ok(Cpu::missing_features(baseline))),
                offer(Engine::Kvm, under_kvm),
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::{EngineRequest, choose};
    use super::*;

    #[test]
    fn an_engine_is_given_exactly_where_nothing_is_missing() {
        for offer in baselines() {
            let baseline = Baseline::named(offer.baseline).unwrap();
            let request = match offer.engine {
                Engine::Soft => EngineRequest::Soft,
                Engine::Kvm => EngineRequest::Kvm,
            };
            let chosen = choose(request, baseline);
            assert_eq!(chosen.is_ok(), offer.is_complete(), "{offer:?}");
            if let (Err(error), Ok(missing)) = (chosen, &offer.missing) {
                assert!(error.to_string().contains(&missing.join(", ")), "{error}");
            }
        }
    }

    #[test]
    fn the_software_cpu_has_what_every_baseline_promises_but_what_hosts_execute() {
        let by_the_host = ["fma", "avx", "f16c", "avx2"];
        for offer in baselines() {
            let missing = match offer.engine {
                Engine::Soft => offer.missing.unwrap(),
                Engine::Kvm => continue,
            };
            let named = missing.iter().all(|name| by_the_host.contains(name));
            assert!(
                named && (missing.is_empty() || offer.baseline == "x86-64-v3"),
                "{missing:?}"
            );
        }
    }
}
