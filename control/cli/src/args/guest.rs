//! Arguments that describe a guest.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use dunlin_api::size::parse_size;
use dunlin_api::{DebugConsoleConfig, EngineChoice, MacText, OnReboot, VmName};

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Kernel: a bzImage or an ELF file with a PVH note
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk
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

#[cfg(test)]
mod tests {
    use super::*;

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
