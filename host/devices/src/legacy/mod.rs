//! Interrupt controllers and timer of the first PCs, for programs that insist on them.

mod chip;
mod counter;
pub mod pic;
pub mod pit;

use std::sync::Arc;

use dunlin_guest::InterruptLine;

/// A line with two ends: what drives it reaches both interrupt controllers of the machine.
#[derive(Debug)]
pub struct Fork(pub [Arc<dyn InterruptLine>; 2]);

impl InterruptLine for Fork {
    fn set_level(&self, high: bool) {
        for line in &self.0 {
            line.set_level(high);
        }
    }

    fn pulse(&self) {
        for line in &self.0 {
            line.pulse();
        }
    }
}
