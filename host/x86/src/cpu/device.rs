//! Accesses that leave the processor: ports, MMIO, and the local APIC's page, which does not.
//!
//! An access that a device must answer ends its instruction before anything is committed and
//! stops the processor. When it is answered, the instruction is run again from its start; the
//! accesses of its earlier runs are answered from the list in `replay`, in order.

use super::{AbortReason, Cpu, Stop};
use crate::exec::{Abort, Result};

/// An access of the instruction at hand.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceAccess {
    stop: Stop,
    /// The answer, once there is one (0 for a write).
    answer: Option<u64>,
}

/// The accesses of the instruction at hand that were already asked for.
#[derive(Debug, Default)]
pub(super) struct Replay {
    accesses: Vec<DeviceAccess>,
    next: usize,
}

impl Replay {
    /// The instruction is run from its start.
    pub(super) fn rewind(&mut self) {
        self.next = 0;
    }

    /// The instruction, or one round of a repeated one, is complete.
    pub(super) fn clear(&mut self) {
        self.accesses.clear();
        self.next = 0;
    }

    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.accesses.is_empty()
    }

    /// Has the last access been answered?
    pub(super) fn is_answered(&self) -> bool {
        self.accesses
            .last()
            .is_some_and(|access| access.answer.is_some())
    }

    /// Answers the access that waits.
    pub(super) fn answer(&mut self, value: u64) {
        if let Some(access) = self.accesses.last_mut() {
            access.answer.get_or_insert(value);
        }
    }
}

impl Cpu {
    /// A round of a repeated instruction has been committed.
    pub(crate) fn commit_round(&mut self) {
        self.replay.clear();
    }

    /// Has the instruction at hand asked devices already?
    pub(crate) fn is_replaying(&self) -> bool {
        !self.replay.is_empty()
    }

    /// Ends an instruction that is only tried before it does something to a device.
    fn check_for_real(&mut self) -> Result {
        if self.is_trying() {
            self.abort = AbortReason::Alone;
            return Err(Abort);
        }
        Ok(())
    }

    fn ask(&mut self, stop: Stop) -> Result<u64> {
        match self.replay.accesses.get(self.replay.next) {
            Some(DeviceAccess {
                answer: Some(value),
                ..
            }) => {
                self.replay.next += 1;
                return Ok(*value);
            }
            Some(_) => {}
            None => self
                .replay
                .accesses
                .push(DeviceAccess { stop, answer: None }),
        }
        let stop = self
            .replay
            .accesses
            .last()
            .map_or(stop, |access| access.stop);
        self.abort = AbortReason::Stop(stop);
        Err(Abort)
    }

    /// Reads a port.
    pub(crate) fn port_read(&mut self, port: u16, size: u8) -> Result<u64> {
        self.ask(Stop::PortRead { port, size })
    }

    /// Writes a port.
    pub(crate) fn port_write(&mut self, port: u16, size: u8, value: u32) -> Result {
        self.ask(Stop::PortWrite { port, size, value }).map(drop)
    }

    /// Reads physical address space that is not RAM.
    pub(crate) fn device_read(&mut self, address: u64, size: u8) -> Result<u64> {
        self.check_for_real()?;
        if self.apic_page == Some(address & !0xfff) {
            let offset = address as u32 & 0xfff;
            let now = self.tsc();
            let word = self.apic.read_mmio(offset & !3, now);
            self.apic_changed();
            return Ok(u64::from(word) >> (8 * (offset & 3)));
        }
        self.ask(Stop::MmioRead { address, size })
    }

    /// Writes physical address space that is not RAM.
    pub(crate) fn device_write(&mut self, address: u64, size: u8, value: u64) -> Result {
        self.check_for_real()?;
        if self.apic_page == Some(address & !0xfff) {
            let now = self.tsc();
            let ended = self
                .apic
                .write_mmio(address as u32 & 0xfff, value as u32, now);
            self.ended_interrupt(ended);
            self.apic_changed();
            return Ok(());
        }
        let value = if size >= 8 {
            value
        } else {
            value & ((1 << (8 * size)) - 1)
        };
        self.ask(Stop::MmioWrite {
            address,
            size,
            value,
        })
        .map(drop)
    }

    /// The local APIC ended an interrupt; the machine must learn of it when it was level-triggered.
    pub(crate) fn ended_interrupt(&mut self, vector: Option<u8>) {
        if vector.is_some() {
            self.ended = vector;
        }
        self.budget = 0;
    }

    /// The local APIC's registers may have changed.
    pub(crate) fn apic_changed(&mut self) {
        self.deadline = self.apic.next_deadline_tsc().unwrap_or(u64::MAX);
        let page = self.apic.mmio_page();
        if page != self.apic_page {
            self.apic_page = page;
            self.tlb.flush();
        }
        self.budget = 0;
    }
}
