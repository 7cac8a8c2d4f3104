//! What is looked at besides the instructions themselves: breakpoints and single steps (SDM vol. 3,
//! chapter 18), and alignment.
//!
//! While breakpoints are enabled each instruction is done by itself, and while accesses are watched
//! the TLB serves none, so that all of them take the slow path. Nothing of this costs anything
//! otherwise.

use super::Cpu;
use super::control::CR0_AM;
use crate::exec::flags::{AC, RF, TF};
use crate::exec::{Exception, Result};

/// DR6: a single step.
pub(crate) const DR6_SINGLE_STEP: u64 = 1 << 14;
/// DR6: the debug registers were used while DR7 protects them.
const DR6_GENERAL_DETECT: u64 = 1 << 13;
/// DR7: the debug registers are protected.
const DR7_GENERAL_DETECT: u64 = 1 << 13;
/// DR7: the breakpoints that are enabled, for a task or for all.
const DR7_ENABLED: u64 = 0xff;

/// What a breakpoint waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trigger {
    Execution,
    Write,
    ReadOrWrite,
}

/// What the debug registers and RFLAGS ask for.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// Accesses are to be looked at: the TLB serves none.
    pub(crate) accesses: bool,
    /// They are to be aligned.
    pub(crate) alignment: bool,
    /// The data breakpoints that were met and not reported, as in DR6.
    pub(crate) met: u64,
    /// A single step is to be reported behind the instruction at hand.
    pub(crate) step: bool,
    /// The last instruction loaded SS: what waits is reported behind the next one.
    pub(crate) after_stack_load: bool,
}

impl Cpu {
    /// The breakpoints that are enabled: number, trigger, address, bytes.
    fn breakpoints(&self) -> impl Iterator<Item = (u64, Trigger, u64, u64)> + use<> {
        let (addresses, control) = (self.dr, self.dr7);
        (0..4u64).filter_map(move |number| {
            if control >> (2 * number) & 3 == 0 {
                return None;
            }
            let trigger = match control >> (16 + 4 * number) & 3 {
                0 => Trigger::Execution,
                1 => Trigger::Write,
                3 => Trigger::ReadOrWrite,
                // Ports need CR4.DE, which no baseline offers.
                _ => return None,
            };
            let bytes = [1, 2, 8, 4][(control >> (18 + 4 * number) & 3) as usize];
            let address = addresses[number as usize] & !(bytes - 1);
            Some((number, trigger, address, bytes))
        })
    }

    /// Is each instruction to be done by itself?
    #[inline(always)]
    pub(crate) fn steps(&self) -> bool {
        self.system_flags & TF != 0 || self.dr7 & DR7_ENABLED != 0
    }

    /// Works out again what is to be watched: after changes of DR7, CR0.AM, RFLAGS.AC, the privilege.
    #[inline]
    pub(crate) fn refresh_watch(&mut self) {
        let alignment = self.system_flags & AC != 0 && self.cpl == 3 && self.cr0 & CR0_AM != 0;
        let data = self.dr7 & DR7_ENABLED != 0
            && (self.breakpoints()).any(|(_, trigger, ..)| trigger != Trigger::Execution);
        let accesses = alignment || data;
        self.watch.alignment = alignment;
        if accesses && !self.watch.accesses {
            self.flush_tlb();
        }
        self.watch.accesses = accesses;
    }

    /// An access of the program: #AC where it is to be aligned and is not; notes what breakpoints
    /// it meets.
    #[cold]
    pub(crate) fn look_at_access(&mut self, address: u64, bytes: u64, write: bool) -> Result {
        if self.watch.alignment && bytes.is_power_of_two() && address & (bytes - 1) != 0 {
            return Err(self.raise(Exception::AlignmentCheck));
        }
        for (number, trigger, at, length) in self.breakpoints() {
            let wanted = match trigger {
                Trigger::Execution => false,
                Trigger::Write => write,
                Trigger::ReadOrWrite => true,
            };
            if wanted && address < at.wrapping_add(length) && at < address.wrapping_add(bytes) {
                self.watch.met |= 1 << number;
            }
        }
        Ok(())
    }

    /// The bits of DR6 for breakpoints at the instruction to come.
    pub(crate) fn instruction_breakpoints(&self) -> u64 {
        if self.dr7 & DR7_ENABLED == 0 || self.system_flags & RF != 0 {
            return 0;
        }
        let linear = self.linear_rip();
        self.breakpoints()
            .filter(|&(_, trigger, at, _)| trigger == Trigger::Execution && at == linear)
            .fold(0, |bits, (number, ..)| bits | 1 << number)
    }

    /// #DB where the debug registers are protected.
    pub(crate) fn check_debug_access(&mut self) -> Result {
        if self.dr7 & DR7_GENERAL_DETECT != 0 {
            return Err(self.raise(Exception::Debug(DR6_GENERAL_DETECT)));
        }
        Ok(())
    }

    /// What #DB changes in the debug registers.
    pub(super) fn note_debug(&mut self, bits: u64) {
        self.dr6 |= bits;
        self.dr7 &= !DR7_GENERAL_DETECT;
    }
}
