//! A VM as the user asked for it.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::VERSION;
use crate::name::VmName;
use crate::size::display_size;

/// Least guest memory: below it no kernel of today boots.
pub const MIN_MEMORY: u64 = 1 << 20;
/// Most guest memory: RAM ends below the 64-bit window of PCI (see the guest's address map).
pub const MAX_MEMORY: u64 = (0x80_0000_0000 - 0x1_0000_0000) + 0xc000_0000;
/// Most virtual processors: APIC IDs of the xAPIC form, less the broadcast one.
pub const MAX_CPUS: u32 = 64;
/// Longest kernel command line, in bytes (what Linux keeps on x86, less the final zero).
pub const MAX_COMMAND_LINE: usize = 2047;
/// Most devices of a kind.
pub const MAX_DEVICES: usize = 12;

/// Which engine runs the guest's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// KVM where the host's processor really runs guests, else the software CPU.
    #[default]
    Auto,
    /// The software CPU.
    Soft,
    /// The host's processor.
    Kvm,
}

/// What a guest's reboot does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// The kernel is loaded again in the same process.
    #[default]
    Restart,
    /// The VM's process ends, as at power-off.
    Stop,
}

/// A disk image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The raw image file.
    pub path: PathBuf,
    /// Refuse the guest's writes.
    #[serde(default)]
    pub read_only: bool,
}

/// An Ethernet address as text, `52:54:00:12:34:56`; unicast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacText(pub [u8; 6]);

impl FromStr for MacText {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::Mac {
            text: text.chars().take(32).collect(),
        };
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).ok().ok_or_else(bad)?;
        }
        if parts.next().is_some() || bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacText {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<MacText> for String {
    fn from(mac: MacText) -> String {
        mac.to_string()
    }
}

impl std::fmt::Display for MacText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The switch's port socket (a unix datagram socket).
    pub switch: PathBuf,
    /// The device's address; derived from the VM's name and the device's index when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacText>,
}

/// Where the bytes of a debug console go, as text `unix:PATH` or `file:PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DebugConsoleConfig {
    /// A unix stream socket on which somebody listens.
    Unix(PathBuf),
    /// A file, which is appended to.
    File(PathBuf),
}

impl FromStr for DebugConsoleConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(ConfigError::DebugConsole {
                text: text.chars().take(64).collect(),
            }),
        }
    }
}

impl TryFrom<String> for DebugConsoleConfig {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<DebugConsoleConfig> for String {
    fn from(config: DebugConsoleConfig) -> String {
        match config {
            DebugConsoleConfig::Unix(path) => format!("unix:{}", path.display()),
            DebugConsoleConfig::File(path) => format!("file:{}", path.display()),
        }
    }
}

/// Ports with which a guest ends its VM, as text `iobase=PORT,iosize=COUNT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DebugExitConfig {
    /// The first port.
    pub port: u16,
    /// How many; at least 1, and not beyond port 0xffff.
    pub count: u16,
}

impl Default for DebugExitConfig {
    /// Where QEMU has its `isa-debug-exit`.
    fn default() -> Self {
        Self {
            port: 0x501,
            count: 2,
        }
    }
}

impl FromStr for DebugExitConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::DebugExit {
            text: text.chars().take(64).collect(),
        };
        let mut config = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(bad)?;
            let value = number(value).ok_or_else(bad)?;
            match key {
                "iobase" => config.port = value,
                "iosize" => config.count = value,
                _ => return Err(bad()),
            }
        }
        let end = u32::from(config.port) + u32::from(config.count);
        if config.count == 0 || end > 0x1_0000 {
            return Err(bad());
        }
        Ok(config)
    }
}

/// A number in decimal, or in hexadecimal behind `0x`.
fn number(text: &str) -> Option<u16> {
    match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

impl TryFrom<String> for DebugExitConfig {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<DebugExitConfig> for String {
    fn from(config: DebugExitConfig) -> String {
        format!("iobase={:#x},iosize={}", config.port, config.count)
    }
}

/// A file that a multiboot kernel gets, with a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleConfig {
    /// The file.
    pub path: PathBuf,
    /// What follows the path in the module's text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub arguments: String,
}

/// A VM as the user asked for it. [`VmConfig::validate`] says whether it can be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Version of this type, [`VERSION`].
    pub version: u32,
    /// Name on this host.
    pub name: VmName,
    /// Kernel: ELF with a PVH note, a bzImage, or a file with a multiboot header.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Modules of a multiboot kernel, behind the initial RAM disk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<ModuleConfig>,
    /// Kernel command line.
    pub command_line: String,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// Disks, in the order in which the guest sees them.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network devices, in the order in which the guest sees them.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Engine.
    #[serde(default)]
    pub engine: EngineChoice,
    /// Named CPU baseline that the guest sees (x86-64-v1, -v2 or -v3); x86-64-v2 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<String>,
    /// What a guest's reboot does.
    #[serde(default)]
    pub on_reboot: OnReboot,
    /// Where the bytes go that the guest writes to its debug port; no such port when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debug_console: Option<DebugConsoleConfig>,
    /// Ports with which the guest ends the VM and chooses its exit status; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debug_exit: Option<DebugExitConfig>,
    /// The interrupt controllers and the timer of the first PCs (8259A, 8254); under engine `soft`
    /// only, which [`EngineChoice::Auto`] then takes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub legacy: bool,
    /// The software CPU interprets all that it translates as well, and the VM ends when the two
    /// differ.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub verify: bool,
}

/// Why a configuration cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Written for a newer version of these types.
    #[error(
        "configuration of VM \"{name}\" has version {found}, newer than the supported {VERSION}"
    )]
    TooNew {
        /// The VM.
        name: VmName,
        /// Its version.
        found: u32,
    },
    /// Memory size out of range.
    #[error(
        "cannot give VM \"{name}\" {bytes} bytes of memory: it must be a multiple of 4096 between {} and {}",
        display_size(MIN_MEMORY),
        display_size(MAX_MEMORY)
    )]
    Memory {
        /// The VM.
        name: VmName,
        /// What was asked for.
        bytes: u64,
    },
    /// Number of processors out of range.
    #[error("cannot give VM \"{name}\" {cpus} processors: it must be between 1 and {MAX_CPUS}")]
    Cpus {
        /// The VM.
        name: VmName,
        /// What was asked for.
        cpus: u32,
    },
    /// Verification is for one processor of the software CPU.
    #[error("VM \"{name}\" cannot be verified: that takes engine \"soft\" and one processor")]
    Verify {
        /// The VM.
        name: VmName,
    },
    /// Legacy devices are for the software CPU.
    #[error("VM \"{name}\" cannot have legacy devices under engine \"kvm\": they take \"soft\"")]
    Legacy {
        /// The VM.
        name: VmName,
    },
    /// The command line is too long or holds a zero byte.
    #[error(
        "the kernel command line of VM \"{name}\" has {bytes} bytes or a zero byte: at most {MAX_COMMAND_LINE} bytes without zero are possible"
    )]
    CommandLine {
        /// The VM.
        name: VmName,
        /// Its length.
        bytes: usize,
    },
    /// Too many devices of a kind.
    #[error("VM \"{name}\" has {count} {kind}, more than the {MAX_DEVICES} that are possible")]
    TooMany {
        /// The VM.
        name: VmName,
        /// Disks or network devices.
        kind: &'static str,
        /// How many.
        count: usize,
    },
    /// One image file given twice, at least once for writing.
    #[error("disk \"{path}\" is given to VM \"{name}\" twice: make both read-only, or drop one")]
    DiskTwice {
        /// The VM.
        name: VmName,
        /// The image file.
        path: PathBuf,
    },
    /// One Ethernet address given twice.
    #[error("address {mac} is given to two network devices of VM \"{name}\"")]
    MacTwice {
        /// The VM.
        name: VmName,
        /// The address.
        mac: MacText,
    },
    /// Not a place for a debug console's bytes.
    #[error("\"{text}\" is no place for the debug console: write unix:PATH or file:PATH")]
    DebugConsole {
        /// What was given.
        text: String,
    },
    /// Not ports for a debug exit.
    #[error(
        "\"{text}\" names no ports for the debug exit: write iobase=PORT,iosize=COUNT, such as iobase=0xf4,iosize=4"
    )]
    DebugExit {
        /// What was given.
        text: String,
    },
    /// Not an Ethernet address.
    #[error("\"{text}\" is not a unicast Ethernet address such as 52:54:00:12:34:56")]
    Mac {
        /// What was given.
        text: String,
    },
}

impl VmConfig {
    /// Checks all that can be checked without the host.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let name = || self.name.clone();
        if self.version > VERSION {
            let found = self.version;
            return Err(ConfigError::TooNew {
                name: name(),
                found,
            });
        }
        let bytes = self.memory_bytes;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) || !bytes.is_multiple_of(4096) {
            return Err(ConfigError::Memory {
                name: name(),
                bytes,
            });
        }
        let cpus = self.cpus;
        if !(1..=MAX_CPUS).contains(&cpus) {
            return Err(ConfigError::Cpus { name: name(), cpus });
        }
        if self.verify && (self.engine != EngineChoice::Soft || cpus != 1) {
            return Err(ConfigError::Verify { name: name() });
        }
        if self.legacy && self.engine == EngineChoice::Kvm {
            return Err(ConfigError::Legacy { name: name() });
        }
        let bytes = self.command_line.len();
        if bytes > MAX_COMMAND_LINE || self.command_line.contains('\0') {
            return Err(ConfigError::CommandLine {
                name: name(),
                bytes,
            });
        }
        self.validate_devices()
    }

    fn validate_devices(&self) -> Result<(), ConfigError> {
        let name = || self.name.clone();
        for (kind, count) in [
            ("disks", self.disks.len()),
            ("network devices", self.nets.len()),
        ] {
            if count > MAX_DEVICES {
                return Err(ConfigError::TooMany {
                    name: name(),
                    kind,
                    count,
                });
            }
        }
        for (index, disk) in self.disks.iter().enumerate() {
            let clash = self.disks[..index]
                .iter()
                .any(|other| other.path == disk.path && !(other.read_only && disk.read_only));
            if clash {
                let path = disk.path.clone();
                return Err(ConfigError::DiskTwice { name: name(), path });
            }
        }
        let macs = self.macs();
        for (index, mac) in macs.iter().enumerate() {
            if macs[..index].contains(mac) {
                return Err(ConfigError::MacTwice {
                    name: name(),
                    mac: *mac,
                });
            }
        }
        Ok(())
    }

    /// The address of each network device: the configured one, or one derived from the VM's name
    /// and the device's index, in the locally administered range (IEEE 802, second bit of the
    /// first byte).
    pub fn macs(&self) -> Vec<MacText> {
        (self.nets.iter().enumerate())
            .map(|(index, net)| net.mac.unwrap_or_else(|| derived_mac(&self.name, index)))
            .collect()
    }
}

/// FNV-1a of the name and the index, behind the prefix 52:54:00.
fn derived_mac(name: &VmName, index: usize) -> MacText {
    let bytes = name.as_str().bytes().chain([0, index as u8]);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    let [a, b, c, ..] = (hash ^ (hash >> 32)).to_le_bytes();
    MacText([0x52, 0x54, 0x00, a, b, c])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            version: VERSION,
            name: "web".parse().unwrap(),
            kernel: "/boot/vmlinuz".into(),
            initrd: None,
            modules: vec![ModuleConfig {
                path: "/m".into(),
                arguments: "a=1".into(),
            }],
            command_line: "console=ttyS0".into(),
            memory_bytes: 512 << 20,
            cpus: 1,
            disks: Vec::new(),
            nets: Vec::new(),
            engine: EngineChoice::Auto,
            baseline: None,
            on_reboot: OnReboot::Restart,
            debug_console: Some(DebugConsoleConfig::File("/tmp/debug".into())),
            debug_exit: Some(DebugExitConfig {
                port: 0xf4,
                count: 4,
            }),
            legacy: true,
            verify: false,
        }
    }

    #[test]
    fn a_plain_configuration_is_valid_and_survives_json() {
        let config = config();
        config.validate().unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
    }

    #[test]
    fn absurd_memory_is_refused_by_name() {
        for bytes in [0, 4097, u64::MAX, MAX_MEMORY + 4096] {
            let config = VmConfig {
                memory_bytes: bytes,
                ..config()
            };
            let text = config.validate().unwrap_err().to_string();
            assert!(text.contains("\"web\""), "{text}");
        }
    }

    #[test]
    fn processors_devices_and_command_line_are_bounded() {
        let long = VmConfig {
            command_line: "x".repeat(4096),
            ..config()
        };
        assert!(matches!(
            long.validate(),
            Err(ConfigError::CommandLine { .. })
        ));
        for cpus in [0, MAX_CPUS + 1] {
            let many = VmConfig { cpus, ..config() };
            assert!(matches!(many.validate(), Err(ConfigError::Cpus { .. })));
        }
        let net = NetConfig {
            switch: "/run/s".into(),
            mac: None,
        };
        let nets = VmConfig {
            nets: vec![net; MAX_DEVICES + 1],
            ..config()
        };
        assert!(matches!(nets.validate(), Err(ConfigError::TooMany { .. })));
        let newer = VmConfig {
            version: VERSION + 1,
            ..config()
        };
        assert!(matches!(newer.validate(), Err(ConfigError::TooNew { .. })));
    }

    #[test]
    fn legacy_devices_are_refused_under_kvm() {
        let kvm = VmConfig {
            engine: EngineChoice::Kvm,
            ..config()
        };
        assert!(matches!(kvm.validate(), Err(ConfigError::Legacy { .. })));
        let modern = VmConfig {
            legacy: false,
            ..kvm
        };
        modern.validate().unwrap();
    }

    #[test]
    fn a_disk_given_twice_for_writing_is_refused() {
        let disk = |read_only| DiskConfig {
            path: "/d".into(),
            read_only,
        };
        let twice = VmConfig {
            disks: vec![disk(false), disk(true)],
            ..config()
        };
        assert!(matches!(
            twice.validate(),
            Err(ConfigError::DiskTwice { .. })
        ));
        let shared = VmConfig {
            disks: vec![disk(true), disk(true)],
            ..config()
        };
        shared.validate().unwrap();
    }

    #[test]
    fn derived_addresses_are_stable_distinct_and_unicast() {
        let net = NetConfig {
            switch: "/run/s".into(),
            mac: None,
        };
        let config = VmConfig {
            nets: vec![net; 2],
            ..config()
        };
        let macs = config.macs();
        assert_eq!(macs, config.macs());
        assert_ne!(macs[0], macs[1]);
        assert_eq!(macs[0].0[0] & 1, 0);
    }

    #[test]
    fn places_for_a_debug_console_are_read_and_written() {
        for text in ["unix:/run/x.sock", "file:/tmp/a:b"] {
            let place: DebugConsoleConfig = text.parse().unwrap();
            assert_eq!(String::from(place), text);
        }
        for bad in ["", "unix:", "/tmp/x", "tcp:1"] {
            assert!(bad.parse::<DebugConsoleConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_for_a_debug_exit_are_read_and_written() {
        let read = |text: &str| text.parse::<DebugExitConfig>().map(|c| (c.port, c.count));
        assert_eq!(read(""), Ok((0x501, 2)));
        assert_eq!(read("iobase=0xf4"), Ok((0xf4, 2)));
        assert_eq!(read("iosize=4,iobase=244"), Ok((0xf4, 4)));
        assert_eq!(read("iobase=0xffff,iosize=1"), Ok((0xffff, 1)));
        for bad in [
            "0xf4",
            "iobase",
            "iobase=",
            "iobase=0x10000",
            "iosize=0",
            "port=1",
            "iobase=0xffff",
        ] {
            let message = bad.parse::<DebugExitConfig>().unwrap_err().to_string();
            assert!(message.contains(&format!("\"{bad}\"")), "{message}");
        }
        let text = "iobase=0xf4,iosize=4";
        assert_eq!(String::from(text.parse::<DebugExitConfig>().unwrap()), text);
    }

    #[test]
    fn addresses_are_read_strictly() {
        let text = "52:54:00:12:34:56";
        assert_eq!(text.parse::<MacText>().unwrap().to_string(), text);
        for bad in [
            "",
            "52:54:00:12:34",
            "53:54:00:12:34:56",
            "52:54:00:12:34:5g",
            "00:00:00:00:00:00",
            "52:54:00:12:34:56:78",
        ] {
            assert!(bad.parse::<MacText>().is_err(), "{bad}");
        }
    }
}
