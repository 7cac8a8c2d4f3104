//! What this host's processor, kernel and devices offer a VM.

use std::fs;
use std::path::Path;

use super::baselines::{BaselineOffer, baselines};
use super::{Ring0Speed, reason};
use crate::kvm::{measure_ring0, open};

/// How this process may catch page faults (for moves that begin before their pages arrive).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserfaultfdAccess {
    /// Faults of user space and of the kernel.
    Full,
    /// Faults of user space only.
    UserOnly,
    /// Not at all.
    None,
}

/// A network device that can be split into virtual functions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SriovDevice {
    /// Name of the interface.
    pub interface: String,
    /// Virtual functions that it can have.
    pub functions: u32,
}

/// What was found; a plain list of facts.
#[derive(Debug, Clone, PartialEq)]
pub struct HostProbe {
    /// Vendor of the processor, e.g. `"AuthenticAMD"`.
    pub cpu_vendor: String,
    /// Model of the processor.
    pub cpu_model: String,
    /// Logical processors that this process may use.
    pub cpus: usize,
    /// Features of the host's processor that matter to baselines.
    pub cpu_features: Vec<String>,
    /// Which baselines each engine can give here.
    pub baselines: Vec<BaselineOffer>,
    /// Weaknesses of the processor that the kernel does not call "Not affected".
    pub vulnerabilities: Vec<String>,
    /// Release of the kernel.
    pub kernel: String,
    /// `/dev/kvm` opens and has what the engine needs; else why not.
    pub kvm: Result<(), String>,
    /// How fast ring 0 is under KVM, if it could be measured.
    pub ring0: Option<Ring0Speed>,
    /// Catching page faults.
    pub userfaultfd: UserfaultfdAccess,
    /// `/dev/net/tun` opens for reading and writing.
    pub tap: bool,
    /// Sizes of huge pages in kB, with how many are reserved.
    pub huge_pages: Vec<(u64, u64)>,
    /// RDMA devices.
    pub rdma_devices: Vec<String>,
    /// Network devices with SR-IOV.
    pub sriov_devices: Vec<SriovDevice>,
}

/// Features named by baselines, now or later.
const FEATURES: [&str; 18] = [
    "sse3",
    "ssse3",
    "sse4_1",
    "sse4_2",
    "popcnt",
    "cx16",
    "lahf_lm",
    "movbe",
    "bmi1",
    "bmi2",
    "abm",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "x2apic",
    "tsc_deadline_timer",
];

impl HostProbe {
    /// Looks. Takes up to a quarter of a second (see [`measure_ring0`]).
    pub fn run() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let kvm = open();
        Self {
            cpu_vendor: field(&cpuinfo, "vendor_id"),
            cpu_model: field(&cpuinfo, "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu_features: features(&cpuinfo),
            baselines: baselines(),
            vulnerabilities: vulnerabilities(Path::new("/sys/devices/system/cpu/vulnerabilities")),
            kernel: trimmed(Path::new("/proc/sys/kernel/osrelease")),
            ring0: kvm.is_ok().then(measure_ring0).and_then(Result::ok),
            kvm: kvm.map(drop).map_err(reason),
            userfaultfd: userfaultfd(),
            tap: fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/net/tun")
                .is_ok(),
            huge_pages: huge_pages(Path::new("/sys/kernel/mm/hugepages")),
            rdma_devices: names(Path::new("/sys/class/infiniband")),
            sriov_devices: sriov(Path::new("/sys/class/net")),
        }
    }
}

fn field(cpuinfo: &str, name: &str) -> String {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map_or_else(String::new, |(_, value)| value.trim().to_owned())
}

fn features(cpuinfo: &str) -> Vec<String> {
    let flags = field(cpuinfo, "flags");
    // The kernel calls SSE3 by its code name.
    let has = |name: &str| {
        let name = if name == "sse3" { "pni" } else { name };
        flags.split_whitespace().any(|flag| flag == name)
    };
    FEATURES
        .into_iter()
        .filter(|name| has(name))
        .map(str::to_owned)
        .collect()
}

fn trimmed(path: &Path) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Names in a directory, sorted; none when it does not exist.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn vulnerabilities(directory: &Path) -> Vec<String> {
    names(directory)
        .into_iter()
        .map(|name| (trimmed(&directory.join(&name)), name))
        .filter(|(status, _)| !status.is_empty() && status != "Not affected")
        .map(|(status, name)| format!("{name}: {status}"))
        .collect()
}

fn huge_pages(directory: &Path) -> Vec<(u64, u64)> {
    let mut sizes: Vec<_> = names(directory)
        .into_iter()
        .filter_map(|name| {
            let kilobytes = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            let reserved = trimmed(&directory.join(&name).join("nr_hugepages"));
            Some((kilobytes.parse().ok()?, reserved.parse().unwrap_or(0)))
        })
        .collect();
    sizes.sort_unstable();
    sizes
}

fn sriov(directory: &Path) -> Vec<SriovDevice> {
    names(directory)
        .into_iter()
        .filter_map(|interface| {
            let path = directory.join(&interface).join("device/sriov_totalvfs");
            let functions = trimmed(&path).parse().ok().filter(|count| *count > 0)?;
            Some(SriovDevice {
                interface,
                functions,
            })
        })
        .collect()
}

fn userfaultfd() -> UserfaultfdAccess {
    /// UFFD_USER_MODE_ONLY of `linux/userfaultfd.h`.
    const USER_MODE_ONLY: libc::c_int = 1;
    let opens = |flags: libc::c_int| {
        // SAFETY: the call makes a descriptor, which is closed at once.
        #[expect(unsafe_code, reason = "userfaultfd has no safe wrapper in std")]
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags);
            fd >= 0 && libc::close(fd as libc::c_int) == 0
        }
    };
    if opens(0) {
        UserfaultfdAccess::Full
    } else if opens(USER_MODE_ONLY) {
        UserfaultfdAccess::UserOnly
    } else {
        UserfaultfdAccess::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Engine;

    /// A directory of files below the system's temporary directory, removed at the end.
    struct Tree(std::path::PathBuf);

    impl Tree {
        fn new(name: &str, files: &[(&str, &str)]) -> std::io::Result<Self> {
            let unique = format!("dunlin-probe-{name}-{}", std::process::id());
            let root = std::env::temp_dir().join(unique);
            for (path, content) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap())?;
                fs::write(path, content)?;
            }
            Ok(Self(root))
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn this_host_can_be_probed() {
        let probe = HostProbe::run();
        assert!(!probe.cpu_vendor.is_empty());
        assert!(!probe.kernel.is_empty());
        assert!(probe.cpus > 0);
        let mut under_kvm = probe.baselines.iter().filter(|o| o.engine == Engine::Kvm);
        assert!(under_kvm.all(|offer| probe.kvm.is_ok() || !offer.is_complete()));
        eprintln!("{probe:#?}");
    }

    #[test]
    fn the_processor_is_read_from_cpuinfo() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: A: B\nflags\t\t: fpu pni popcnt\n";
        assert_eq!(field(text, "vendor_id"), "GenuineIntel");
        assert_eq!(field(text, "model name"), "A: B");
        assert_eq!(features(text), ["sse3", "popcnt"]);
        assert_eq!(field("", "vendor_id"), "");
    }

    #[test]
    fn network_devices_with_virtual_functions_are_found() {
        let tree = Tree::new(
            "sriov",
            &[
                ("ens1/device/sriov_totalvfs", "8\n"),
                ("ens2/device/sriov_totalvfs", "0\n"),
                ("lo/mtu", "65536\n"),
            ],
        )
        .unwrap();
        let expected = SriovDevice {
            interface: "ens1".to_owned(),
            functions: 8,
        };
        assert_eq!(sriov(&tree.0), [expected]);
        assert!(sriov(&tree.0.join("absent")).is_empty());
    }

    #[test]
    fn huge_pages_and_weaknesses_are_read() {
        let tree = Tree::new(
            "kernel",
            &[
                ("huge/hugepages-2048kB/nr_hugepages", "16\n"),
                ("huge/hugepages-1048576kB/nr_hugepages", "0\n"),
                ("weak/meltdown", "Not affected\n"),
                ("weak/l1tf", "Vulnerable\n"),
            ],
        )
        .unwrap();
        assert_eq!(huge_pages(&tree.0.join("huge")), [(2048, 16), (1048576, 0)]);
        assert_eq!(vulnerabilities(&tree.0.join("weak")), ["l1tf: Vulnerable"]);
    }
}
