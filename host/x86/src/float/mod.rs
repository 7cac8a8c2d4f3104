//! x87, MMX and SSE: the state and what the instructions do to it.
//!
//! [`FloatState`] holds the registers in the layout of FXSAVE, so that saving is a copy and the
//! host's own instructions can take it as it is.

mod arithmetic;
mod host;
mod integer;
mod lanes;
mod lower;
mod shuffle;
mod state;
mod string;
#[cfg(target_arch = "x86_64")]
mod vector;
mod x87;

pub(crate) use lower::lower;
pub use state::{
    FXSAVE_BYTES, FloatState, FloatStateError, MXCSR_MASK, XCR0_SUPPORTED, XSAVE_BYTES, XSAVE_SSE,
    XSAVE_X87,
};
