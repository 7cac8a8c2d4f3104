//! A processor of the software engine.

use std::sync::Arc;
use std::time::Instant;

use dunlin_x86::lapic::Mailbox;
use dunlin_x86::state::CpuState;
use dunlin_x86::{Cpu, Stop};

use super::Doorbells;
use crate::{EngineError, Exit, Vcpu, VcpuExitCounts, VcpuHandle, VcpuId};

/// The access that the last exit asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    None,
    /// The first `size` bytes of `data` are the answer.
    Read(usize),
    Write,
}

#[derive(Debug)]
pub(super) struct SoftVcpu {
    id: VcpuId,
    cpu: Cpu,
    mailbox: Arc<Mailbox>,
    doorbells: Arc<Doorbells>,
    access: Access,
    data: [u8; 8],
    counts: VcpuExitCounts,
}

#[derive(Debug)]
struct Handle(Arc<Mailbox>);

impl VcpuHandle for Handle {
    fn kick(&self) {
        self.0.kick();
    }
}

impl SoftVcpu {
    pub(super) fn new(
        id: VcpuId,
        cpu: Cpu,
        mailbox: Arc<Mailbox>,
        doorbells: Arc<Doorbells>,
    ) -> Self {
        Self {
            id,
            cpu,
            mailbox,
            doorbells,
            access: Access::None,
            data: [0; 8],
            counts: VcpuExitCounts::default(),
        }
    }

    /// Hands the answer to the access over to the processor.
    fn answer(&mut self) {
        match std::mem::replace(&mut self.access, Access::None) {
            Access::None => {}
            Access::Read(size) => {
                let mut value = [0; 8];
                value[..size].copy_from_slice(&self.data[..size]);
                self.cpu.complete_read(u64::from_le_bytes(value));
            }
            Access::Write => self.cpu.complete_write(),
        }
    }

    fn begin_read(&mut self, size: u8) -> usize {
        let size = usize::from(size).min(8);
        self.data = [0xff; 8];
        self.access = Access::Read(size);
        size
    }

    fn begin_write(&mut self, size: u8, value: u64) -> usize {
        self.data = value.to_le_bytes();
        self.access = Access::Write;
        usize::from(size).min(8)
    }

    fn wait(&self) {
        let deadline = self.cpu.wake_after().map(|after| {
            let now = Instant::now();
            now.checked_add(after).unwrap_or(now + FAR)
        });
        self.mailbox.wait_until(deadline);
    }
}

/// What is as good as never.
const FAR: std::time::Duration = std::time::Duration::from_secs(3600);

impl Vcpu for SoftVcpu {
    fn run(&mut self) -> Result<Exit<'_>, EngineError> {
        self.answer();
        loop {
            match self.cpu.run() {
                Stop::PortRead { port, size } => {
                    self.counts.port_reads += 1;
                    let size = self.begin_read(size);
                    let data = &mut self.data[..size];
                    return Ok(Exit::PortRead { port, data });
                }
                Stop::PortWrite { port, size, value } => {
                    self.counts.port_writes += 1;
                    let size = self.begin_write(size, value.into());
                    let data = &self.data[..size];
                    return Ok(Exit::PortWrite { port, data });
                }
                Stop::MmioRead { address, size } => {
                    self.counts.mmio_reads += 1;
                    let size = self.begin_read(size);
                    let data = &mut self.data[..size];
                    return Ok(Exit::MmioRead { address, data });
                }
                Stop::MmioWrite { size, address, .. }
                    if matches!(size, 2 | 4) && self.doorbells.ring(address) =>
                {
                    self.cpu.complete_write();
                }
                Stop::MmioWrite {
                    address,
                    size,
                    value,
                } => {
                    self.counts.mmio_writes += 1;
                    let size = self.begin_write(size, value);
                    let data = &self.data[..size];
                    return Ok(Exit::MmioWrite { address, data });
                }
                Stop::EndOfInterrupt { vector } => return Ok(Exit::EndOfInterrupt { vector }),
                Stop::Halted => {
                    self.counts.halts += 1;
                    self.wait();
                }
                Stop::Shutdown => return Ok(Exit::Shutdown),
                Stop::Differs => {
                    let report = self.cpu.difference().unwrap_or_default();
                    return Err(EngineError::Stuck {
                        vcpu: self.id.0,
                        reason: format!("the interpreter and translated code differ:\n{report}"),
                    });
                }
                Stop::Kicked => {
                    self.counts.kicks += 1;
                    return Ok(Exit::Kicked);
                }
            }
        }
    }

    fn quiesce(&mut self) -> Result<(), EngineError> {
        self.answer();
        self.cpu.finish_access();
        Ok(())
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::new(Handle(Arc::clone(&self.mailbox)))
    }

    fn save(&mut self) -> Result<CpuState, EngineError> {
        Ok(self.cpu.state())
    }

    fn restore(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.cpu
            .set_state(state)
            .map_err(|error| EngineError::InvalidState {
                vcpu: self.id.0,
                reason: chain(&error),
            })
    }

    fn exit_counts(&self) -> VcpuExitCounts {
        VcpuExitCounts {
            instructions: self.cpu.instructions(),
            ..self.counts
        }
    }
}

/// An error with its causes, for a message.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
