//! The test guest: a stock kernel, a busybox initramfs with our agent.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use clap::Args;

use crate::cpio::Archive;
use crate::debian;
use crate::packages::{self, Kernel, Series};
use dunlin_testbed::process;

/// Modules that the guest loads, where the kernel does not have them built in.
const MODULES: [&str; 6] = [
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "virtio-rng",
    "failover",
];

/// Arguments of `cargo xtask guest`.
#[derive(Debug, Args)]
pub(crate) struct GuestArguments {
    /// What the kernel starts
    #[arg(value_enum, default_value = "busybox")]
    system: System,
    /// Which stock kernel
    #[arg(long, value_enum, default_value = "6.1")]
    kernel: Series,
}

/// What runs on the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum System {
    /// The initramfs alone.
    Busybox,
    /// A Debian with systemd, on a disk (ext4).
    Debian,
}

/// What `dunlin run` needs to boot the test guest.
#[derive(Debug)]
pub(crate) struct Guest {
    /// The stock bzImage.
    pub(crate) kernel: PathBuf,
    /// The same kernel unpacked, for peers that boot an ELF by PVH.
    pub(crate) elf: PathBuf,
    pub(crate) initramfs: PathBuf,
}

pub(crate) fn run(arguments: &GuestArguments) -> anyhow::Result<()> {
    let guest = build(arguments.kernel)?;
    let root = process::root();
    let shown = |path: &Path| {
        path.strip_prefix(&root)
            .unwrap_or(path)
            .display()
            .to_string()
    };
    let (cmdline, disk) = match arguments.system {
        System::Busybox => ("console=ttyS0 quiet", String::new()),
        System::Debian => {
            let image = debian::image()?;
            println!("log in as root, without a password; `systemctl poweroff` ends it");
            let disk = format!(" --disk {}", shown(&image));
            (
                "console=ttyS0 quiet dunlin.init=root dunlin.root=/dev/vda",
                disk,
            )
        }
    };
    println!(
        "cargo run --release --package dunlin -- run --kernel {} --initrd {} --cmdline '{cmdline}' --memory 512M{disk}",
        shown(&guest.kernel),
        shown(&guest.initramfs),
    );
    Ok(())
}

/// Fetches the kernel, builds the agent and packs the initramfs.
pub(crate) fn build(series: Series) -> anyhow::Result<Guest> {
    let kernel = packages::kernel(series)?;
    let busybox = packages::busybox()?;
    let agent = build_agent()?;
    let folder = process::target().join("guest").join(series.name());
    fs::create_dir_all(&folder)?;
    let initramfs = folder.join("initramfs");
    fs::write(&initramfs, pack(&kernel, &busybox, &agent)?)?;
    let elf = folder.join("vmlinux");
    fs::write(&elf, dunlin_boot::kernel_image(&kernel.image)?)?;
    Ok(Guest {
        kernel: kernel.image,
        elf,
        initramfs,
    })
}

/// Builds the agent as a static program for the guest.
fn build_agent() -> anyhow::Result<PathBuf> {
    let target = process::target().join("guest/build");
    process::run(
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--release", "--package", "dunlin-guest-agent"])
            .args(["--target", "x86_64-unknown-linux-gnu"])
            .arg("--target-dir")
            .arg(&target)
            .env("RUSTFLAGS", "-Ctarget-feature=+crt-static -Cstrip=symbols")
            .current_dir(process::root()),
    )?;
    Ok(target.join("x86_64-unknown-linux-gnu/release/dunlin-guest-agent"))
}

fn pack(kernel: &Kernel, busybox: &Path, agent: &Path) -> anyhow::Result<Vec<u8>> {
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("failed to read {}", path.display()));
    let scripts = process::root().join("guests/initramfs");
    let mut archive = Archive::default();
    for folder in [
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/modules",
        "proc",
        "root",
        "tmp",
    ] {
        archive.directory(folder);
    }
    archive.character_device("dev/console", 5, 1);
    archive.character_device("dev/null", 1, 3);
    archive.file("init", &read(&scripts.join("init"))?);
    archive.file("etc/udhcpc.sh", &read(&scripts.join("udhcpc.sh"))?);
    archive.file("etc/work.sh", &read(&scripts.join("work.sh"))?);
    archive.file("bin/busybox", &read(busybox)?);
    archive.symlink("bin/sh", "busybox");
    archive.file("bin/agent", &read(agent)?);
    let mut order = String::new();
    for (name, content) in modules(kernel)? {
        archive.file(&format!("lib/modules/{name}.ko"), &content);
        order.push_str(&format!("{name}.ko\n"));
    }
    archive.file("lib/modules/order", order.as_bytes());
    Ok(archive.finish())
}

/// The wanted modules and what they depend on, in loading order, unpacked.
fn modules(kernel: &Kernel) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let builtin = fs::read_to_string(kernel.modules.join("modules.builtin"))
        .context("the kernel package lists no built-in modules")?;
    let builtin: BTreeSet<String> = builtin.lines().map(module_name).collect();
    let mut found = Vec::new();
    files_below(&kernel.modules, &mut found)?;
    let mut loaded = BTreeSet::new();
    let mut result = Vec::new();
    for name in MODULES {
        add_module(&normal(name), &builtin, &found, &mut loaded, &mut result)?;
    }
    Ok(result)
}

fn add_module(
    name: &str,
    builtin: &BTreeSet<String>,
    files: &[PathBuf],
    loaded: &mut BTreeSet<String>,
    result: &mut Vec<(String, Vec<u8>)>,
) -> anyhow::Result<()> {
    if builtin.contains(name) || !loaded.insert(name.to_owned()) {
        return Ok(());
    }
    let path = files
        .iter()
        .find(|path| module_name(&path.to_string_lossy()) == name)
        .with_context(|| format!("the kernel package has no module {name}"))?;
    let mut content = fs::read(path)?;
    if path.extension().is_some_and(|extension| extension == "xz") {
        let mut unpacked = Vec::new();
        lzma_rust2::XzReader::new(content.as_slice(), false)
            .read_to_end(&mut unpacked)
            .with_context(|| format!("failed to unpack {}", path.display()))?;
        content = unpacked;
    }
    for dependency in dependencies(&content) {
        add_module(&dependency, builtin, files, loaded, result)?;
    }
    result.push((name.to_owned(), content));
    Ok(())
}

/// What a module's `.modinfo` section says it depends on.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[start + KEY.len()..];
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(normal)
        .collect()
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split('.').next().unwrap_or(file))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            files_below(&entry.path(), found)?;
        } else if kind.is_file() && entry.path().to_string_lossy().contains(".ko") {
            found.push(entry.path());
        }
    }
    if found.len() > 100_000 {
        bail!(
            "{} holds more files than a kernel package does",
            folder.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let module = b"junk\0license=GPL\0depends=virtio_ring,net-failover\0name=x\0";
        assert_eq!(dependencies(module), ["virtio_ring", "net_failover"]);
        assert!(dependencies(b"\0depends=\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }

    #[test]
    fn a_module_is_found_under_any_spelling() {
        assert_eq!(module_name("kernel/drivers/virtio-rng.ko.xz"), "virtio_rng");
    }
}
