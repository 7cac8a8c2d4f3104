//! Arguments that describe a guest.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use dunlin_api::size::parse_size;
use dunlin_api::{
    DebugConsoleConfig, DebugExitConfig, EngineChoice, MacText, ModuleConfig, OnReboot, VmName,
};

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Kernel: a bzImage, an ELF file with a PVH note, or a multiboot 1 kernel
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk; for a multiboot kernel also modules, with
    /// arguments: "FILE ARGUMENTS,FILE"
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    pub cmdline: String,
    /// Memory, such as 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// Virtual processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Disk image (raw); repeat for more
    #[arg(long = "disk", value_name = "FILE[,ro]")]
    pub disks: Vec<DiskArgument>,
    /// Network device on a switch's port socket; repeat for more
    #[arg(long = "net", value_name = "SOCKET[,mac=ADDRESS]")]
    pub nets: Vec<NetArgument>,
    /// What runs the guest's processors: "auto" takes KVM where it is real
    #[arg(long, value_enum, default_value_t = EngineArgument::Auto)]
    pub engine: EngineArgument,
    /// With "--engine soft": interpret as well all that is translated, and end the VM at the first
    /// difference (slow)
    #[arg(long)]
    pub verify: bool,
    /// Named set of processor features that the guest sees
    #[arg(long, value_name = "NAME")]
    pub baseline: Option<String>,
    /// What a reboot of the guest does
    #[arg(long, value_enum, default_value_t = OnRebootArgument::Restart)]
    pub on_reboot: OnRebootArgument,
    /// Give the guest a debug port (0xe9), whose bytes go to a socket or are appended to a file
    #[arg(long, value_name = "unix:PATH|file:PATH")]
    pub debugcon: Option<DebugConsoleConfig>,
    /// Give the guest ports with which it ends the VM; twice what it writes, plus one, is the exit
    /// status. PORTS: "iobase=0x501,iosize=2" when absent
    #[arg(long, value_name = "PORTS", num_args = 0..=1, default_missing_value = "")]
    pub isa_debug_exit: Option<DebugExitConfig>,
    /// Give the guest the interrupt controllers and the timer of the first PCs (8259A, 8254), beside
    /// the APICs; under engine "soft"
    #[arg(long)]
    pub legacy: bool,
    /// Name of the VM; "vm-" and the process id when absent
    #[arg(long)]
    pub name: Option<VmName>,
    /// Return when the guest runs; "dunlin console" attaches
    #[arg(long)]
    pub detach: bool,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The saved file
    pub file: PathBuf,
    /// Another name than the saved one
    #[arg(long)]
    pub name: Option<VmName>,
    /// Switch port sockets of this host, in the order of the guest's devices
    #[arg(long = "net", value_name = "SOCKET")]
    pub nets: Vec<NetArgument>,
    /// Another engine than the saved one
    #[arg(long, value_enum)]
    pub engine: Option<EngineArgument>,
    /// Read all of the guest's memory before it runs, instead of behind the running guest
    #[arg(long)]
    pub eager: bool,
    /// Another place than the saved one for the bytes of the guest's debug port
    #[arg(long, value_name = "unix:PATH|file:PATH")]
    pub debugcon: Option<DebugConsoleConfig>,
    /// Return when the guest runs; "dunlin console" attaches
    #[arg(long)]
    pub detach: bool,
}

/// `--engine`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EngineArgument {
    /// KVM where the host's processor really runs guests, else the software CPU
    Auto,
    /// The software CPU
    Soft,
    /// The host's processor
    Kvm,
}

impl From<EngineArgument> for EngineChoice {
    fn from(argument: EngineArgument) -> Self {
        match argument {
            EngineArgument::Auto => Self::Auto,
            EngineArgument::Soft => Self::Soft,
            EngineArgument::Kvm => Self::Kvm,
        }
    }
}

/// `--on-reboot`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnRebootArgument {
    /// Load the kernel again in the same process
    Restart,
    /// End the VM
    Stop,
}

impl From<OnRebootArgument> for OnReboot {
    fn from(argument: OnRebootArgument) -> Self {
        match argument {
            OnRebootArgument::Restart => Self::Restart,
            OnRebootArgument::Stop => Self::Stop,
        }
    }
}

/// `FILE[,ro]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskArgument {
    /// The image.
    pub path: PathBuf,
    /// Refuse writes.
    pub read_only: bool,
}

impl FromStr for DiskArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, read_only) = match text.strip_suffix(",ro") {
            Some(path) => (path, true),
            None => (text, false),
        };
        if path.is_empty() {
            return Err("name an image file, such as disk.raw or disk.raw,ro".into());
        }
        Ok(Self {
            path: path.into(),
            read_only,
        })
    }
}

/// `SOCKET[,mac=ADDRESS]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetArgument {
    /// The switch's port socket.
    pub switch: PathBuf,
    /// The device's address.
    pub mac: Option<MacText>,
}

impl FromStr for NetArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (switch, mac) = match text.rsplit_once(",mac=") {
            Some((switch, mac)) => {
                let mac = mac.parse::<MacText>().map_err(|error| error.to_string())?;
                (switch, Some(mac))
            }
            None => (text, None),
        };
        if switch.is_empty() {
            return Err("name the switch's port socket, such as /run/vm1.switch".into());
        }
        Ok(Self {
            switch: switch.into(),
            mac,
        })
    }
}

/// `FILE[ ARGUMENTS][,FILE...]`: modules as QEMU reads them. A comma in a name or in arguments is
/// written twice.
///
/// # Errors
/// When a module has no name.
pub fn modules(text: &str) -> Result<Vec<ModuleConfig>, String> {
    // A comma that is meant cannot be part of what the shell hands over.
    let parts = text.replace(",,", "\0");
    let parts = parts.split(',').map(|part| part.replace('\0', ","));
    parts
        .map(|part| {
            let (path, arguments) = part.split_once(' ').unwrap_or((&part, ""));
            if path.is_empty() {
                return Err(format!("\"{text}\" has a module without a name"));
            }
            Ok(ModuleConfig {
                path: path.into(),
                arguments: arguments.into(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_separated_by_commas_and_have_arguments() {
        let read = |text| {
            let modules = modules(text)?.into_iter();
            Ok(modules
                .map(|module| (module.path.display().to_string(), module.arguments))
                .collect::<Vec<_>>())
        };
        let pair = |path: &str, arguments: &str| (path.to_owned(), arguments.to_owned());
        assert_eq!(
            read("/a x=1 y,/b"),
            Ok(vec![pair("/a", "x=1 y"), pair("/b", "")])
        );
        assert_eq!(read("/a,,b 1,,2"), Ok(vec![pair("/a,b", "1,2")]));
        for bad in ["/a,", ",/a", " x", "/a, x"] {
            let refused: Result<_, String> = read(bad);
            assert!(refused.unwrap_err().contains(bad), "{bad}");
        }
    }

    #[test]
    fn a_disk_may_be_read_only() {
        let disk: DiskArgument = "/d,ro".parse().unwrap();
        assert!(disk.read_only);
        assert_eq!(disk.path, PathBuf::from("/d"));
        assert!(",ro".parse::<DiskArgument>().is_err());
    }

    #[test]
    fn a_net_may_carry_an_address() {
        let net: NetArgument = "/s,mac=52:54:00:00:00:01".parse().unwrap();
        assert_eq!(net.mac.unwrap().to_string(), "52:54:00:00:00:01");
        assert!("/s,mac=zz".parse::<NetArgument>().is_err());
    }
}
