//! A profile of the machine's processors: begun, collected and ended by the lifecycle.

use std::time::{Duration, Instant};

use dunlin_api::profile::{
    CpuProfile, CpuSamples, KindSamples, PlaceSamples, ProcessorCounters, ProfileReport,
    ProfileRequest, TimeKind, VectorCount,
};
use dunlin_api::status::ExitCounts;
use dunlin_hypervisor::VcpuProfile;
use dunlin_x86::profile::{Counters, Doing};

use super::sampler::Sampler;
use super::vcpu::VcpuThread;
use super::{Machine, VcpuError};

/// Places of a processor that are told, so that an answer stays below some megabytes.
const PLACES: usize = 8192;
/// Samples of a processor between two times that they are collected: half of what it keeps.
const COLLECTED: u64 = 4096;

/// A profile that is being taken.
#[derive(Debug)]
pub(crate) struct Profiling {
    since: Instant,
    rate_hz: u32,
    exits: Vec<ExitCounts>,
    /// Which processors the sampler knows.
    sampled: Vec<usize>,
    sampler: Option<Sampler>,
}

/// How long samples may lie before they are collected.
pub(crate) fn collect_every(request: &ProfileRequest) -> Duration {
    let most = Duration::from_secs(1);
    (Duration::from_secs(COLLECTED) / request.rate_hz.max(1)).min(most)
}

impl Machine {
    /// Begins a profile.
    pub(crate) fn begin_profile(&self, request: &ProfileRequest) -> Result<Profiling, VcpuError> {
        let begun = self.try_begin_profile(request);
        if begun.is_err() {
            for vcpu in &self.vcpus {
                // Those that had begun.
                let _ended = vcpu.end_profile();
            }
        }
        begun
    }

    fn try_begin_profile(&self, request: &ProfileRequest) -> Result<Profiling, VcpuError> {
        let exits = self.exits()?;
        let mut threads = Vec::new();
        let mut sampled = Vec::new();
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            if let Some(thread) = vcpu.begin_profile()? {
                threads.push(thread);
                sampled.push(index);
            }
        }
        let sampler = if threads.is_empty() {
            None
        } else {
            let started = Sampler::start(threads, request.rate_hz);
            Some(started.map_err(|source| VcpuError::Sampler { source })?)
        };
        Ok(Profiling {
            since: Instant::now(),
            rate_hz: request.rate_hz,
            exits,
            sampled,
            sampler,
        })
    }

    /// Makes room for more samples.
    pub(crate) fn collect_profile(&self) -> Result<(), VcpuError> {
        self.vcpus.iter().try_for_each(VcpuThread::collect_profile)
    }

    /// Ends it.
    pub(crate) fn end_profile(&self, profiling: Profiling) -> Result<ProfileReport, VcpuError> {
        let duration = profiling.since.elapsed();
        let missed = profiling.sampler.map(Sampler::end).unwrap_or_default();
        let exits = self.exits()?;
        let mut cpus = Vec::new();
        for (index, (vcpu, exits)) in self.vcpus.iter().zip(exits).enumerate() {
            let (devices, profile) = vcpu.end_profile()?;
            let before = profiling.exits.get(index).copied().unwrap_or_default();
            let number = profiling.sampled.iter().position(|&cpu| cpu == index);
            let missed = number.and_then(|number| missed.get(number).copied());
            cpus.push(CpuProfile {
                exits: since(&exits, &before),
                devices,
                samples: profile.map(|profile| samples(&profile, missed.unwrap_or(0))),
            });
        }
        let none = cpus.iter().all(|cpu| cpu.samples.is_none());
        Ok(ProfileReport {
            version: dunlin_api::VERSION,
            engine: self.engine_name().into(),
            duration_ms: duration.as_secs_f64() * 1e3,
            rate_hz: profiling.rate_hz,
            without_samples: none.then(|| {
                format!(
                    "engine \"{}\" runs the guest on the host's processor: only exits are known",
                    self.engine_name()
                )
            }),
            cpus,
        })
    }
}

fn since(now: &ExitCounts, before: &ExitCounts) -> ExitCounts {
    ExitCounts {
        port_reads: now.port_reads - before.port_reads,
        port_writes: now.port_writes - before.port_writes,
        mmio_reads: now.mmio_reads - before.mmio_reads,
        mmio_writes: now.mmio_writes - before.mmio_writes,
        halts: now.halts - before.halts,
        kicks: now.kicks - before.kicks,
        end_of_interrupts: now.end_of_interrupts - before.end_of_interrupts,
        instructions: now.instructions - before.instructions,
    }
}

fn kind(doing: Doing) -> TimeKind {
    match doing {
        Doing::Translated => TimeKind::Translated,
        Doing::Interpreted => TimeKind::Interpreted,
        Doing::Stepped => TimeKind::Stepped,
        Doing::Decoding => TimeKind::Decoding,
        Doing::Translating => TimeKind::Translating,
        Doing::FillingTlb => TimeKind::TlbFill,
        Doing::Delivering => TimeKind::Delivering,
        Doing::Port => TimeKind::Port,
        Doing::Mmio => TimeKind::Mmio,
        Doing::Halted => TimeKind::Halted,
        Doing::Stopped => TimeKind::Stopped,
    }
}

fn samples(profile: &VcpuProfile, missed: u64) -> CpuSamples {
    let VcpuProfile {
        samples,
        counters,
        vectors,
        system_call_entry,
    } = profile;
    let kinds = Doing::ALL.map(|doing| KindSamples {
        kind: kind(doing),
        samples: samples.samples(doing),
    });
    let mut places = samples.places();
    places.truncate(PLACES);
    let told: u64 = places.iter().map(|(_, _, count)| count).sum();
    let happened = vectors.iter().enumerate().filter(|(_, count)| **count > 0);
    CpuSamples {
        total: samples.all_samples(),
        lost: samples.lost + missed,
        kinds: kinds.to_vec(),
        counters: counts(counters),
        vectors: happened
            .map(|(vector, &count)| VectorCount {
                vector: vector as u8,
                count,
            })
            .collect(),
        system_call_entry: *system_call_entry,
        elsewhere: samples.all_samples() - told,
        places: places
            .into_iter()
            .map(|(place, doing, samples)| PlaceSamples {
                address: place.address,
                user: place.user,
                kind: kind(doing),
                samples,
            })
            .collect(),
    }
}

fn counts(counters: &Counters) -> ProcessorCounters {
    let Counters {
        tlb_fills,
        tlb_flushes,
        page_flushes,
        decoded_blocks,
        translated_blocks,
        code_flushes,
        code_bytes,
        msr_reads,
        msr_writes,
    } = *counters;
    ProcessorCounters {
        tlb_fills,
        tlb_flushes,
        page_flushes,
        decoded_blocks,
        translated_blocks,
        code_flushes,
        code_bytes,
        msr_reads,
        msr_writes,
    }
}
