//! The loop, and what happens between instructions.

use super::debug::DR6_SINGLE_STEP;
use super::{AbortReason, Cpu, NOWHERE, Stop};
use crate::decode::Block;
use crate::exec::flags::{IF, RF, TF};
use crate::exec::interrupt::Source;
use crate::exec::op::{At, Exit, slot};
use crate::exec::{Abort, Exception, Result};
use crate::profile::Doing;
use crate::state::Activity;

/// Blocks between two looks at the mailbox and the clock: some microseconds.
const BLOCKS: u32 = 512;
const NMI: u8 = 2;

impl Cpu {
    /// Runs until something needs the machine.
    pub fn run(&mut self) -> Stop {
        if self.profile.is_some() {
            return self.run_profiled();
        }
        self.run_until_stop()
    }

    pub(crate) fn run_until_stop(&mut self) -> Stop {
        self.budget = 0;
        self.kvmclock.refresh(&self.config.clock, &*self.memory);
        if !self.replay.is_empty()
            && let Some(stop) = self.run_alone()
        {
            return stop;
        }
        loop {
            if let Some(stop) = self.advance() {
                return stop;
            }
        }
    }

    /// Looks at what may happen between instructions, then runs [`BLOCKS`] blocks at most.
    #[inline(always)]
    pub(super) fn advance(&mut self) -> Option<Stop> {
        if let Some(stop) = self.between() {
            return Some(stop);
        }
        let stop = if self.shadow || self.steps() {
            self.run_alone()
        } else {
            self.run_blocks()
        };
        if stop.is_none() && self.difference().is_some() {
            return Some(Stop::Differs);
        }
        stop
    }

    /// Runs blocks until something must be looked at between them.
    fn run_blocks(&mut self) -> Option<Stop> {
        if self.blocks.is_full() {
            self.drop_all_code();
        }
        #[cfg(target_arch = "x86_64")]
        if self.translator.is_full() || self.blocks.has_buried_many() {
            // Samples are of the code that there is.
            self.collect_samples();
            self.counters.code_flushes += 1;
            self.blocks.forget_translated();
            self.translator.clear();
        }
        self.blocks.collect();
        // It spares the next instruction a breakpoint, and there are none here.
        self.system_flags &= !RF;
        let mut block = match self.find_block() {
            Ok(block) => block,
            Err(Abort) => return self.fetch_failed(),
        };
        loop {
            let exit = self.enter(block);
            let block_left = self.current_block();
            let link = match exit {
                Exit::Abort => return self.after_abort(block_left),
                Exit::Next | Exit::Stepped => None,
                Exit::Taken => Some(0),
                Exit::FallThrough => Some(1),
            };
            if self.budget == 0 {
                return None;
            }
            self.budget -= 1;
            block = match self.successor(block_left, link) {
                Ok(block) => block,
                Err(Abort) => return self.fetch_failed(),
            };
        }
    }

    /// Runs a block, and those that it leads to without a look in between.
    #[inline(always)]
    fn enter(&mut self, block: &'static Block) -> Exit {
        self.current = block;
        #[cfg(target_arch = "x86_64")]
        if let Some(exit) = self.enter_translated(block) {
            return exit;
        }
        self.regs[usize::from(slot::RIP)] = self.rip;
        self.instructions += u64::from(block.instructions);
        let first = At::first(&block.ops);
        (first.get().handler)(self, first)
    }

    /// Runs a block's translation, if it has one; gives it one when it has run often.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn enter_translated(&mut self, block: &'static Block) -> Option<Exit> {
        if matches!(self.cpl, 1 | 2) {
            // Pages are the supervisor's to them, instructions are not.
            return None;
        }
        if block.code.get().is_null() {
            let runs = block.runs.get().wrapping_add(1);
            block.runs.set(runs);
            if runs != self.translator.after {
                return None;
            }
            self.translate_block(block);
            if block.code.get().is_null() {
                return None;
            }
        }
        if self.translator.verifies {
            return self.run_verified(block, block.code.get());
        }
        Some(self.run_translated(block.code.get()))
    }

    #[cfg(target_arch = "x86_64")]
    #[cold]
    #[inline(never)]
    fn translate_block(&mut self, block: &'static Block) {
        if !self.is_64_bit() || self.alone {
            return;
        }
        let before = self.begin(Doing::Translating);
        if let Some(code) = self.translate_from(block) {
            block.code.set(code);
            self.counters.translated_blocks += 1;
        }
        self.go_back(before);
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn set_current(&mut self, block: &'static Block) {
        self.current = block;
    }

    /// An instruction of `block` ended early that was done by itself: it stands for the block's, from
    /// operation `op` on.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn aborted_in(&mut self, block: &Block, op: usize, first: At) {
        let index = self.abort_at.since(first);
        self.abort_at = At::of(&block.ops[op + index..]);
    }

    /// The block that runs, or ran last.
    #[inline(always)]
    pub(crate) fn current_block(&self) -> &'static Block {
        // SAFETY: set by `enter`, and blocks live until `collect`, which only `run_blocks` calls,
        // before it enters one; or they are the single one, which lives until the next single one.
        #[expect(unsafe_code, reason = "blocks are chained by pointer")]
        unsafe {
            &*self.current
        }
    }

    /// A block has ended: goes on with the next one where that is known, or leaves it to the
    /// loop. Unoptimised builds always do: there the calls would nest without end.
    #[inline(always)]
    pub(crate) fn chain(&mut self, exit: Exit) -> Exit {
        // Not at the end of the budget, and not behind an instruction that is done by itself.
        if cfg!(debug_assertions) || self.budget as i32 <= 0 {
            return exit;
        }
        let next = match exit {
            Exit::Taken => self.current_block().link(0),
            Exit::FallThrough => self.current_block().link(1),
            Exit::Next => self.blocks.jump(self.linear_rip()),
            Exit::Abort | Exit::Stepped => None,
        };
        match next {
            Some(next) => {
                self.budget -= 1;
                self.enter(next)
            }
            None => exit,
        }
    }

    /// The block that follows: by its link, by its address, or by a look into the page.
    #[inline(always)]
    fn successor(&mut self, block: &'static Block, link: Option<usize>) -> Result<&'static Block> {
        if let Some(link) = link {
            if let Some(next) = block.link(link) {
                return Ok(next);
            }
            let next = self.find_block()?;
            if block.frame.is_some() && block.frame == next.frame && next.second.is_none() {
                block.links[link].set(next);
            }
            return Ok(next);
        }
        if let Some(next) = self.blocks.jump(self.linear_rip()) {
            return Ok(next);
        }
        self.find_block()
    }

    /// The instruction at `rip` could not be fetched.
    #[cold]
    fn fetch_failed(&mut self) -> Option<Stop> {
        self.budget = 0;
        match self.abort {
            AbortReason::Exception(exception) => self.deliver_exception(exception),
            AbortReason::Stop(stop) => Some(stop),
            AbortReason::Alone => None,
        }
    }

    /// Of a block that was counted as a whole, only the instructions before an operation were done.
    #[cold]
    pub(crate) fn count_only(&mut self, block: &Block, op: usize) {
        self.instructions = self
            .instructions
            .wrapping_sub(u64::from(block.instructions))
            .wrapping_add(block.instructions_in(0..op));
    }

    /// The block that runs ends behind an instruction that does not end it always.
    #[cold]
    pub(crate) fn ended_behind(&mut self, at: At) {
        let block = self.current_block();
        let ops = block.ops.as_ptr_range();
        // What is done by itself belongs to no block that was counted.
        if ops.contains(&at.pointer()) {
            self.count_only(block, at.since(At::first(&block.ops)) + 1);
        }
    }

    /// Interrupts are permitted again, after the next instruction.
    pub(crate) fn begin_shadow(&mut self) {
        let due = self.mailbox.has_events()
            || self.nmi_pending
            || self.external_due()
            || self.apic.pending_vector().is_some();
        if due {
            self.shadow = true;
            self.budget = 0;
        } else {
            // Nobody looks before the budget is at its end.
            self.shadow_at = self.rip;
        }
    }

    /// Does the controller outside of the local APIC have an interrupt for this processor?
    fn external_due(&self) -> bool {
        self.mailbox.external() && self.apic.passes_external()
    }

    /// An instruction of `block` ended early.
    #[cold]
    fn after_abort(&mut self, block: &Block) -> Option<Stop> {
        let at = self.abort_at.get();
        let op = (block.ops.iter()).position(|op| std::ptr::eq(op, self.abort_at.pointer()));
        self.count_only(block, op.unwrap_or(block.ops.len()));
        if !std::mem::take(&mut self.task_entered) {
            let rip = self.slot(slot::RIP).wrapping_add(at.offset.into());
            self.rip = if self.is_64_bit() {
                rip
            } else {
                rip & 0xffff_ffff
            };
        }
        self.replay.rewind();
        self.budget = 0;
        match self.abort {
            AbortReason::Exception(exception) => {
                self.replay.clear();
                self.deliver_exception(exception)
            }
            AbortReason::Stop(stop) => Some(stop),
            AbortReason::Alone => self.run_alone(),
        }
    }

    /// Runs the one instruction at `rip`.
    pub(super) fn run_alone(&mut self) -> Option<Stop> {
        let shadow = std::mem::take(&mut self.shadow);
        let after_stack_load = std::mem::take(&mut self.watch.after_stack_load);
        let met = self.watch.met;
        self.watch.step = self.system_flags & TF != 0;
        if !after_stack_load && self.replay.is_empty() {
            let bits = self.instruction_breakpoints();
            if bits != 0 {
                self.shadow = shadow;
                return self.deliver_exception(Exception::Debug(bits));
            }
        }
        // For this instruction; one that returns may set it for the next.
        self.system_flags &= !RF;
        self.replay.rewind();
        let block = match self.single_block() {
            Ok(block) => block,
            Err(Abort) => return self.fetch_failed(),
        };
        self.alone = true;
        self.budget = 0;
        let exit = self.enter(block);
        self.alone = false;
        self.budget = 0;
        if exit == Exit::Abort {
            if matches!(self.abort, AbortReason::Stop(_) | AbortReason::Alone) {
                // The instruction is still to be done, in the same circumstances.
                self.shadow = shadow;
                self.watch.after_stack_load = after_stack_load;
            }
            // Of what it met, all is met again, or it faults.
            self.watch.met = met;
            if matches!(self.abort, AbortReason::Alone) {
                // Cannot be: it was alone. Never loop over it.
                self.abort = AbortReason::Exception(Exception::InvalidOpcode);
            }
            return self.after_abort(block);
        }
        self.replay.clear();
        if self.watch.after_stack_load {
            return None;
        }
        let mut bits = std::mem::take(&mut self.watch.met);
        if self.watch.step {
            bits |= DR6_SINGLE_STEP;
        }
        if bits != 0 {
            return self.deliver_exception(Exception::Debug(bits));
        }
        None
    }

    /// Looks at everything that may happen between instructions.
    fn between(&mut self) -> Option<Stop> {
        if self.budget != 0 {
            return None;
        }
        let before = self.begin(Doing::Delivering);
        let stop = self.look_between();
        self.go_back(before);
        stop
    }

    fn look_between(&mut self) -> Option<Stop> {
        self.budget = BLOCKS;
        self.shadow |= std::mem::replace(&mut self.shadow_at, NOWHERE) == self.rip;
        if self.config.code.pages_added() != self.pages_added {
            self.pages_added = self.config.code.pages_added();
            self.tlb.withhold_writes();
        }
        if let Some(vector) = self.ended.take() {
            self.budget = 0;
            return Some(Stop::EndOfInterrupt { vector });
        }
        if self.mailbox.has_events()
            && let Some(stop) = self.take_mail()
        {
            return Some(stop);
        }
        if self.deadline != u64::MAX && self.tsc() >= self.deadline {
            let now = self.tsc();
            self.apic.tick(now);
            self.deadline = self.apic.next_deadline_tsc().unwrap_or(u64::MAX);
        }
        if self.activity == Activity::WaitForSipi {
            self.budget = 0;
            return Some(Stop::Halted);
        }
        if self.shadow {
            return None;
        }
        if self.watch.met != 0 {
            // A task that is to be trapped was entered.
            let bits = std::mem::take(&mut self.watch.met);
            return self.deliver_exception(Exception::Debug(bits));
        }
        if self.nmi_pending && !self.nmi_masked {
            self.nmi_pending = false;
            self.nmi_masked = true;
            self.activity = Activity::Running;
            self.synchronise_code();
            return self.deliver(NMI, Source::Event, None);
        }
        let external = self.external_due();
        let pending = external || self.apic.pending_vector().is_some();
        #[cfg(target_arch = "x86_64")]
        self.native.set_due(pending && self.system_flags & IF == 0);
        if self.system_flags & IF != 0 && pending {
            let from_outside = external.then(|| self.mailbox.acknowledge_external());
            let vector = match from_outside.flatten() {
                Some(vector) => vector,
                None => self.apic.acknowledge(),
            };
            self.activity = Activity::Running;
            self.synchronise_code();
            return self.deliver(vector, Source::Event, None);
        }
        if self.activity == Activity::Halted {
            self.budget = 0;
            return Some(Stop::Halted);
        }
        None
    }

    pub(super) fn take_mail(&mut self) -> Option<Stop> {
        let posted = self.apic.poll_mailbox();
        self.deadline = self.apic.next_deadline_tsc().unwrap_or(u64::MAX);
        self.nmi_pending |= posted.nmi;
        if posted.init {
            self.reset_for_init();
            self.apic_changed();
            if self.config.id != 0 {
                self.activity = Activity::WaitForSipi;
            } else {
                self.activity = Activity::Running;
            }
        }
        if let Some(vector) = posted.sipi {
            self.start_up(vector);
        }
        if posted.kick {
            self.budget = 0;
            return Some(Stop::Kicked);
        }
        None
    }

    /// Delivers an interrupt, and the exceptions that this raises in turn.
    fn deliver(&mut self, vector: u8, source: Source, error: Option<u32>) -> Option<Stop> {
        self.alone = true;
        let outcome = self.interrupt(vector, source, error);
        self.alone = false;
        self.system_flags &= if outcome.is_ok() { !RF } else { u64::MAX };
        match (outcome, self.abort) {
            (Ok(()), _) => None,
            (Err(Abort), AbortReason::Exception(exception)) => self.deliver_exception(exception),
            // The stack lies in a device.
            (Err(Abort), _) => self.shut_down(),
        }
    }

    /// INT n and its kin: what they raise is for the caller.
    pub(crate) fn software_interrupt(&mut self, vector: u8, source: Source) -> Result {
        self.interrupt(vector, source, None)
    }

    /// Delivers an exception, and those that this raises in turn (SDM vol. 3, 6.15, double fault).
    fn deliver_exception(&mut self, first: Exception) -> Option<Stop> {
        let before = self.begin(Doing::Delivering);
        let stop = self.deliver_exceptions(first);
        self.go_back(before);
        stop
    }

    fn deliver_exceptions(&mut self, first: Exception) -> Option<Stop> {
        let mut current = first;
        loop {
            let mut source = Source::Fault;
            match current {
                Exception::PageFault(address, _) => self.cr2 = address,
                Exception::Debug(bits) => {
                    self.note_debug(bits);
                    source = Source::Event;
                }
                _ => {}
            }
            let (vector, error) = current.vector();
            self.alone = true;
            // Real mode pushes no error code.
            let outcome = self.interrupt(vector, source, error);
            self.alone = false;
            if outcome.is_ok() {
                self.activity = Activity::Running;
                return None;
            }
            let AbortReason::Exception(second) = self.abort else {
                return self.shut_down();
            };
            if let Exception::PageFault(address, _) = second {
                // Also where a double fault comes of it.
                self.cr2 = address;
            }
            current = match (class(current), class(second)) {
                (Class::DoubleFault, _) => return self.shut_down(),
                (Class::Contributory, Class::Contributory)
                | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                    Exception::DoubleFault
                }
                _ => second,
            };
        }
    }

    #[cold]
    fn shut_down(&mut self) -> Option<Stop> {
        tracing::debug!(id = self.config.id, rip = self.rip, "triple fault");
        Some(Stop::Shutdown)
    }

    /// IRET lets NMIs in again.
    pub(crate) fn unmask_nmi(&mut self) {
        self.nmi_masked = false;
        self.budget = 0;
        self.synchronise_code();
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(exception: Exception) -> Class {
    match exception {
        Exception::DivideError
        | Exception::InvalidTss(_)
        | Exception::SegmentNotPresent(_)
        | Exception::StackFault(_)
        | Exception::GeneralProtection(_) => Class::Contributory,
        Exception::PageFault(..) => Class::PageFault,
        Exception::DoubleFault => Class::DoubleFault,
        _ => Class::Benign,
    }
}
