//! What this host offers, and which engine to choose.

mod baselines;
mod host;

pub use baselines::{BaselineOffer, baselines};
pub use host::{HostProbe, SriovDevice, UserfaultfdAccess};

pub use crate::kvm::measure_ring0;

use dunlin_x86::cpuid::Baseline;

use crate::kvm::{check, open};
use crate::{Engine, EngineError, soft};

/// How fast ring 0 is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ring0Speed {
    /// The guest's time for a round of the loop over the host's.
    pub slowdown: f64,
    /// Ring-0 code runs on the processor itself.
    pub native: bool,
}

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineRequest {
    /// KVM if it is there and really runs the guest, else the software CPU.
    #[default]
    Auto,
    /// The software CPU.
    Soft,
    /// KVM, however slow.
    Kvm,
}

/// Chooses the engine for a guest of `baseline`, with one line that says why.
///
/// # Errors
/// [`EngineError::Unavailable`] when the one that was asked for cannot be had,
/// [`EngineError::Baseline`] when it lacks something of the baseline.
pub fn choose(
    request: EngineRequest,
    baseline: &Baseline,
) -> Result<(Engine, String), EngineError> {
    match request {
        EngineRequest::Soft => {
            soft::check(baseline)?;
            Ok((Engine::Soft, "the software CPU, as asked for".to_owned()))
        }
        EngineRequest::Kvm => {
            check(&open()?, baseline)?;
            Ok((Engine::Kvm, "KVM, as asked for".to_owned()))
        }
        EngineRequest::Auto => match usable_kvm(baseline) {
            Ok(reason) => Ok((Engine::Kvm, reason)),
            Err(reason) => {
                soft::check(baseline)?;
                Ok((Engine::Soft, format!("the software CPU, since {reason}")))
            }
        },
    }
}

/// Why an engine cannot be had, without its name where that is said already.
fn reason(error: EngineError) -> String {
    match error {
        EngineError::Unavailable { reason, .. } => reason,
        other => other.to_string(),
    }
}

/// Why KVM is the better engine, or why not.
fn usable_kvm(baseline: &Baseline) -> Result<String, String> {
    let kvm = open().map_err(reason)?;
    let speed = measure_ring0().map_err(reason)?;
    if !speed.native {
        return Err(format!(
            "/dev/kvm is there but emulates kernel code (a loop in ring 0 takes {:.0} times as long)",
            speed.slowdown
        ));
    }
    check(&kvm, baseline).map_err(reason)?;
    Ok(format!(
        "KVM: ring 0 runs natively ({:.1} times the host's time for a loop)",
        speed.slowdown
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_x86::cpuid::X86_64_V2;

    #[test]
    fn the_software_cpu_can_always_be_had() {
        let (engine, _) = choose(EngineRequest::Soft, &X86_64_V2).unwrap();
        assert_eq!(engine, Engine::Soft);
    }

    #[test]
    fn auto_chooses_kvm_only_where_it_is_native_and_complete() {
        let (engine, reason) = choose(EngineRequest::Auto, &X86_64_V2).unwrap();
        eprintln!("{reason}");
        let native = measure_ring0().is_ok_and(|speed| speed.native);
        let complete = open().is_ok_and(|kvm| check(&kvm, &X86_64_V2).is_ok());
        assert_eq!(engine == Engine::Kvm, native && complete, "{reason}");
        assert!(!reason.contains('\n'));
    }
}
