//! The host's own instructions against the portable ones.

use super::super::host;

mod operands;
mod sse;
mod x87;
