//! Where the time of a VM's processors goes.

use serde::{Deserialize, Serialize};

use crate::status::ExitCounts;

/// Samples a second where nobody says otherwise: not in step with what a guest does a hundred or a
/// thousand times a second.
pub const DEFAULT_RATE: u32 = 997;
/// Samples a second, at most.
pub const MAX_RATE: u32 = 10_000;
/// Longest profile, in milliseconds.
pub const MAX_DURATION_MS: u64 = 300_000;

/// Asks for a profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileRequest {
    /// How long, in milliseconds: 1 to [`MAX_DURATION_MS`].
    pub duration_ms: u64,
    /// Samples a second: 1 to [`MAX_RATE`].
    pub rate_hz: u32,
}

/// What a processor's thread was found doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeKind {
    /// The guest's code, translated into the host's.
    Translated,
    /// The guest's code, interpreted block by block; the ways between blocks.
    Interpreted,
    /// Single instructions that translated code leaves to the interpreter.
    Stepped,
    /// Finding and decoding code.
    Decoding,
    /// Translating code.
    Translating,
    /// Walking page tables and filling the TLB.
    TlbFill,
    /// Timers, interrupts and exceptions.
    Delivering,
    /// Devices, at an IN or OUT.
    Port,
    /// Devices, at a load or store.
    Mmio,
    /// Waiting for an interrupt.
    Halted,
    /// Stopped by the VM's process: paused, slowed down, or told something.
    Stopped,
}

impl TimeKind {
    /// All kinds, in the order in which they are shown.
    pub const ALL: [Self; 11] = [
        Self::Translated,
        Self::Interpreted,
        Self::Stepped,
        Self::Decoding,
        Self::Translating,
        Self::TlbFill,
        Self::Delivering,
        Self::Port,
        Self::Mmio,
        Self::Halted,
        Self::Stopped,
    ];

    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Translated => "translated code",
            Self::Interpreted => "interpreted code",
            Self::Stepped => "single instructions",
            Self::Decoding => "decoding",
            Self::Translating => "translation",
            Self::TlbFill => "TLB fills",
            Self::Delivering => "interrupts, exceptions",
            Self::Port => "port devices",
            Self::Mmio => "MMIO devices",
            Self::Halted => "halted",
            Self::Stopped => "stopped",
        }
    }

    /// Is the processor at work?
    pub fn is_busy(self) -> bool {
        !matches!(self, Self::Halted | Self::Stopped)
    }
}

/// A profile: the answer to [`crate::route::PROFILE`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProfileReport {
    /// Version of this type, [`crate::VERSION`].
    pub version: u32,
    /// Engine, `soft` or `kvm`.
    pub engine: String,
    /// How long it was taken, in milliseconds.
    pub duration_ms: f64,
    /// Samples a second that were asked for.
    pub rate_hz: u32,
    /// Why no processor has samples, when none has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without_samples: Option<String>,
    /// Per virtual processor.
    pub cpus: Vec<CpuProfile>,
}

/// What one processor did while the profile was taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CpuProfile {
    /// Exits by kind.
    pub exits: ExitCounts,
    /// Devices that it used, those first on which it spent most time.
    pub devices: Vec<DeviceTime>,
    /// Samples; absent where the engine does not see what happens within a run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<CpuSamples>,
}

/// Accesses of one processor to one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceTime {
    /// The device, or `none` where no device answers.
    pub device: String,
    /// IN and loads from memory-mapped registers.
    pub reads: u64,
    /// OUT and stores to memory-mapped registers, without those that only ring a doorbell.
    pub writes: u64,
    /// Time in the device, in nanoseconds.
    pub nanoseconds: u64,
}

/// Samples and counts of one processor of the software engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuSamples {
    /// Samples of all kinds.
    pub total: u64,
    /// Samples that could not be taken or kept.
    pub lost: u64,
    /// Samples by kind; the sum is `total`.
    pub kinds: Vec<KindSamples>,
    /// What was counted.
    pub counters: ProcessorCounters,
    /// Exceptions and interrupts by vector, those that happened.
    pub vectors: Vec<VectorCount>,
    /// Linear address at which system calls enter the guest's kernel, 0 before it is set: what tells
    /// where a kernel lies.
    #[serde(with = "hexadecimal")]
    pub system_call_entry: u64,
    /// Samples by place, most first.
    pub places: Vec<PlaceSamples>,
    /// Samples at places that the list has no room for.
    pub elsewhere: u64,
}

/// Samples of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindSamples {
    /// What was done.
    pub kind: TimeKind,
    /// How often it was found.
    pub samples: u64,
}

/// What the software processor counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessorCounters {
    /// Pages entered into the TLB.
    pub tlb_fills: u64,
    /// Flushes of the whole TLB, or of all that is not global.
    pub tlb_flushes: u64,
    /// Flushes of one page.
    pub page_flushes: u64,
    /// Blocks of code decoded.
    pub decoded_blocks: u64,
    /// Blocks of code translated.
    pub translated_blocks: u64,
    /// Times that all translated code was forgotten.
    pub code_flushes: u64,
    /// Bytes of translated code at the end.
    pub code_bytes: u64,
    /// RDMSR.
    pub msr_reads: u64,
    /// WRMSR.
    pub msr_writes: u64,
}

/// Deliveries of a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorCount {
    /// The vector; below 32 an exception.
    pub vector: u8,
    /// How often.
    pub count: u64,
}

/// Samples at one place of the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaceSamples {
    /// Linear address: of translated and of interpreted code that of the block, which begins at a
    /// branch's target or behind one.
    #[serde(with = "hexadecimal")]
    pub address: u64,
    /// In user mode.
    pub user: bool,
    /// What was done.
    pub kind: TimeKind,
    /// How often it was found.
    pub samples: u64,
}

/// Addresses as `"0x…"`: many readers of JSON keep 53 bits of a number.
pub mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Writes an address.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:#x}"))
    }

    /// Reads one.
    ///
    /// # Errors
    /// What is no `0x` with hexadecimal digits is refused.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0x");
        let value = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        value.ok_or_else(|| D::Error::custom(format!("\"{text}\" is no hexadecimal address")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_keep_all_of_their_bits() {
        let place = PlaceSamples {
            address: 0xffff_ffff_8123_4567,
            user: false,
            kind: TimeKind::TlbFill,
            samples: 3,
        };
        let text = serde_json::to_string(&place).unwrap();
        assert!(text.contains(r#""address":"0xffffffff81234567""#), "{text}");
        assert!(text.contains(r#""kind":"tlb-fill""#), "{text}");
        assert_eq!(serde_json::from_str::<PlaceSamples>(&text).unwrap(), place);
        let wrong = text.replace("0xffffffff81234567", "81234567");
        assert!(serde_json::from_str::<PlaceSamples>(&wrong).is_err());
    }
}
