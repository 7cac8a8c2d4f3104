//! A processor of the software engine.

use std::sync::Arc;
use std::time::Instant;

use dunlin_x86::lapic::Mailbox;
use dunlin_x86::profile::{Counters, Doing};
use dunlin_x86::state::CpuState;
use dunlin_x86::{Cpu, Stop};

use super::Doorbells;
use super::sampler::ThreadSampler;
use crate::{EngineError, Exit, Sampled, Vcpu, VcpuExitCounts, VcpuHandle, VcpuId, VcpuProfile};

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
    profiling: Option<Profiling>,
}

/// A profile that is taken, and what was counted when it began.
#[derive(Debug)]
struct Profiling {
    sampler: Arc<ThreadSampler>,
    counters: Counters,
    vectors: [u64; 256],
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
            profiling: None,
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

    /// Rings the doorbell at `address`, if there is one.
    fn ring(&self, address: u64) -> bool {
        self.cpu.begin_outside(Doing::Mmio);
        self.doorbells.ring(address)
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
                    self.cpu.begin_outside(Doing::Port);
                    self.counts.port_reads += 1;
                    let size = self.begin_read(size);
                    let data = &mut self.data[..size];
                    return Ok(Exit::PortRead { port, data });
                }
                Stop::PortWrite { port, size, value } => {
                    self.cpu.begin_outside(Doing::Port);
                    self.counts.port_writes += 1;
                    let size = self.begin_write(size, value.into());
                    let data = &self.data[..size];
                    return Ok(Exit::PortWrite { port, data });
                }
                Stop::MmioRead { address, size } => {
                    self.cpu.begin_outside(Doing::Mmio);
                    self.counts.mmio_reads += 1;
                    let size = self.begin_read(size);
                    let data = &mut self.data[..size];
                    return Ok(Exit::MmioRead { address, data });
                }
                Stop::MmioWrite { size, address, .. }
                    if matches!(size, 2 | 4) && self.ring(address) =>
                {
                    self.cpu.complete_write();
                }
                Stop::MmioWrite {
                    address,
                    size,
                    value,
                } => {
                    self.cpu.begin_outside(Doing::Mmio);
                    self.counts.mmio_writes += 1;
                    let size = self.begin_write(size, value);
                    let data = &self.data[..size];
                    return Ok(Exit::MmioWrite { address, data });
                }
                Stop::EndOfInterrupt { vector } => {
                    self.cpu.begin_outside(Doing::Delivering);
                    return Ok(Exit::EndOfInterrupt { vector });
                }
                Stop::Halted => {
                    self.cpu.begin_outside(Doing::Halted);
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
                    self.cpu.begin_outside(Doing::Stopped);
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

    fn begin_profile(&mut self) -> Result<Option<Arc<dyn Sampled>>, EngineError> {
        self.end_profile();
        let sampler = ThreadSampler::attach(self.cpu.begin_profile())?;
        self.profiling = Some(Profiling {
            sampler: Arc::clone(&sampler),
            counters: self.cpu.counters(),
            vectors: *self.cpu.vectors(),
        });
        Ok(Some(sampler))
    }

    fn collect_profile(&mut self) {
        self.cpu.collect_samples();
    }

    fn end_profile(&mut self) -> Option<VcpuProfile> {
        let Profiling {
            sampler,
            counters,
            vectors,
        } = self.profiling.take()?;
        sampler.detach();
        let samples = self.cpu.end_profile()?;
        let now = self.cpu.vectors().iter().zip(vectors);
        Some(VcpuProfile {
            samples,
            counters: self.cpu.counters().since(&counters),
            vectors: now.map(|(now, before)| now - before).collect(),
            system_call_entry: self.cpu.system_call_entry(),
        })
    }
}

impl Drop for SoftVcpu {
    /// On its thread, or by whoever never gave it one: no handler finds a probe that is gone.
    fn drop(&mut self) {
        self.end_profile();
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
