//! x87, MMX, SSE and AVX: the state and what the instructions do to it.
//!
//! [`FloatState`] holds the registers in the layout of FXSAVE, so that saving is a copy and the
//! host's own instructions can take it as it is.

mod arithmetic;
#[cfg(target_arch = "x86_64")]
mod avx;
#[cfg(target_arch = "x86_64")]
mod host;
mod integer;
mod lanes;
mod lower;
#[cfg(any(test, not(target_arch = "x86_64")))]
mod portable;
mod shuffle;
mod state;
mod string;
#[cfg(target_arch = "x86_64")]
mod vector;
mod x87;

#[cfg(not(target_arch = "x86_64"))]
use portable as host;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx::host_executes;
pub(crate) use lower::lower;
pub use state::{
    FXSAVE_BYTES, FloatState, FloatStateError, MXCSR_MASK, XCR0_LEGACY, XSAVE_AVX, XSAVE_AVX_BYTES,
    XSAVE_BYTES, XSAVE_SSE, XSAVE_X87,
};

/// Does the host's processor execute instructions of this feature for the guest?
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn host_executes(_feature: &str) -> bool {
    false
}
