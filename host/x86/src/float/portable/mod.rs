//! The seam of [`super::host`] for hosts of other architectures: arithmetic on integers.
//!
//! Results and flags are those of x86 processors, bit by bit, with two exceptions. RCPPS and
//! RSQRTPS are more exact than they must be: rounded correctly, where the manual allows a relative
//! error of 1.5 × 2^−12, and every processor has its own. The x87's transcendental instructions
//! are computed with more than 100 bits and rounded once: to nearest, the error is half a unit of
//! the last place and hardly more, where processors promise one. Angles are reduced by the
//! processor's π of 66 bits (SDM vol. 1, 8.3.8).
//!
//! Where the manuals of Intel and AMD leave something open or differ, AMD's processors are
//! followed, which the tests were run on.
//!
//! [`number`] computes and rounds, [`format`](self::format) reads and writes the guest's formats,
//! [`sse`] is what MXCSR rules, and [`x87`] the stack. On x86-64 the tests compile all this, and
//! compare it with the host's own instructions.

mod format;
mod number;
mod sse;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
mod x87;

pub(super) use sse::*;
pub(super) use x87::x87;

/// Exception flags, where MXCSR and the x87's status word have them.
const INVALID: u32 = 1 << 0;
const DENORMAL: u32 = 1 << 1;
const DIVIDE: u32 = 1 << 2;
const OVERFLOW: u32 = 1 << 3;
const UNDERFLOW: u32 = 1 << 4;
const PRECISION: u32 = 1 << 5;
