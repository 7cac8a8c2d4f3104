//! Debian packages below `target/`: fetched with `apt-get download`, unpacked with `dpkg-deb`,
//! which needs no root. Where the system's package lists are missing, lists of our own are made.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use dunlin_testbed::process;

/// A series of stock kernels, and the package that was last proven to work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Series {
    /// Debian 12's kernel.
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13's kernel, backported to 12.
    #[value(name = "6.12")]
    V6_12,
}

impl Series {
    pub(crate) const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }

    /// The pinned package. A mirror that has dropped it offers a later build of the series.
    fn pinned(self) -> &'static str {
        match self {
            Self::V6_1 => "linux-image-6.1.0-56-cloud-amd64",
            Self::V6_12 => "linux-image-6.12.117+deb12-cloud-amd64",
        }
    }

    fn matches(self, package: &str) -> bool {
        let prefix = format!("linux-image-{}.", self.name());
        package.starts_with(&prefix) && package.ends_with("-cloud-amd64")
    }
}

/// How apt is called: with the system's lists, or with lists below `target/`.
#[derive(Debug)]
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new() -> anyhow::Result<Self> {
        for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
            if !process::installed(tool) {
                bail!(
                    "{tool} is not installed: the guest is made of Debian packages, run this on Debian or Ubuntu"
                );
            }
        }
        let system = Self {
            options: Vec::new(),
        };
        if system.knows("busybox-static") {
            return Ok(system);
        }
        let state = process::target().join("guest/apt");
        fs::create_dir_all(state.join("lists/partial"))?;
        fs::create_dir_all(state.join("cache/archives/partial"))?;
        let private = Self {
            options: vec![
                format!("-oDir::State={}", state.display()),
                format!("-oDir::Cache={}", state.join("cache").display()),
                "-oDir::State::status=/var/lib/dpkg/status".to_owned(),
                "-oAPT::Sandbox::User=".to_owned(),
            ],
        };
        if !private.knows("busybox-static") {
            eprintln!("fetching the distribution's package lists to target/guest/apt");
            process::run(private.command("apt-get").arg("update"))?;
        }
        Ok(private)
    }

    fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(tool);
        command.args(&self.options).env("LC_ALL", "C");
        command
    }

    fn knows(&self, package: &str) -> bool {
        process::output(
            self.command("apt-cache")
                .args(["show", "--no-all-versions", package]),
        )
        .is_ok_and(|shown| shown.contains("Package: "))
    }

    /// The kernel package of a series: the pinned one, or else the newest there is.
    fn kernel(&self, series: Series) -> anyhow::Result<String> {
        if self.knows(series.pinned()) {
            return Ok(series.pinned().to_owned());
        }
        let names = process::output(self.command("apt-cache").args(["pkgnames", "linux-image-"]))?;
        let newest = names
            .lines()
            .filter(|name| series.matches(name) && self.knows(name))
            .max_by_key(|name| numbers(name))
            .with_context(|| {
                format!(
                    "no stock kernel of series {} is on this machine's mirror (looked for {} and others)",
                    series.name(),
                    series.pinned()
                )
            })?;
        eprintln!(
            "{} is no longer on the mirror, taking {newest}",
            series.pinned()
        );
        Ok(newest.to_owned())
    }

    /// Downloads and unpacks a package; returns the folder that holds its files.
    fn unpack(&self, package: &str) -> anyhow::Result<PathBuf> {
        let folder = process::target().join("guest/packages").join(package);
        if folder.join(".complete").exists() {
            return Ok(folder);
        }
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        let download = folder.join("download");
        fs::create_dir_all(&download)?;
        eprintln!("fetching Debian package {package}");
        process::run(
            self.command("apt-get")
                .args(["download", package])
                .current_dir(&download),
        )?;
        let archive = fs::read_dir(&download)?
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get download {package} left no .deb"))?;
        process::run(
            Command::new("dpkg-deb")
                .arg("-x")
                .arg(&archive)
                .arg(&folder),
        )?;
        fs::remove_dir_all(&download)?;
        fs::write(folder.join(".complete"), "")?;
        Ok(folder)
    }
}

/// The numbers in a package name, for ordering: 6.1.0-9 comes before 6.1.0-10.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// A stock kernel, unpacked.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The bzImage.
    pub(crate) image: PathBuf,
    /// `lib/modules/VERSION`.
    pub(crate) modules: PathBuf,
}

/// Fetches and unpacks the kernel of a series, and checks that it is what it claims.
pub(crate) fn kernel(series: Series) -> anyhow::Result<Kernel> {
    let apt = Apt::new()?;
    let package = apt.kernel(series)?;
    let folder = apt.unpack(&package)?;
    let release = package
        .strip_prefix("linux-image-")
        .context("a kernel package has a fixed prefix")?;
    let image = folder.join(format!("boot/vmlinuz-{release}"));
    let modules = modules_folder(&folder, release)
        .with_context(|| format!("package {package} has no modules of release {release}"))?;
    let found = release_of(&image)?;
    if found != release {
        bail!("package {package} holds kernel {found}, expected {release}");
    }
    Ok(Kernel { image, modules })
}

fn modules_folder(package: &Path, release: &str) -> Option<PathBuf> {
    ["lib/modules", "usr/lib/modules"]
        .iter()
        .map(|base| package.join(base).join(release))
        .find(|path| path.is_dir())
}

/// The release that a bzImage says it is: the string that the setup header's `kernel_version`
/// points to (Documentation/arch/x86/boot.rst).
fn release_of(image: &Path) -> anyhow::Result<String> {
    let bytes = fs::read(image).with_context(|| format!("failed to read {}", image.display()))?;
    let field = |offset: usize, length: usize| {
        bytes
            .get(offset..offset + length)
            .with_context(|| format!("{} is truncated", image.display()))
    };
    if field(0x202, 4)? != b"HdrS" {
        bail!("{} is no bzImage", image.display());
    }
    let pointer = field(0x20e, 2)?;
    let start = usize::from(u16::from_le_bytes([pointer[0], pointer[1]])) + 0x200;
    let text = field(start, 64)?;
    let end = text
        .iter()
        .position(|&byte| byte == b' ' || byte == 0)
        .unwrap_or(text.len());
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// The static busybox.
pub(crate) fn busybox() -> anyhow::Result<PathBuf> {
    let folder = Apt::new()?.unpack("busybox-static")?;
    ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .map(|path| folder.join(path))
        .find(|path| path.is_file())
        .context("package busybox-static holds no busybox")
}

/// Installs packages for the tests where that is allowed; returns those that are missing.
pub(crate) fn install(packages: &[(&str, &str)]) -> Vec<String> {
    let missing: Vec<_> = packages
        .iter()
        .filter(|(_, program)| !process::installed(program))
        .map(|(package, _)| *package)
        .collect();
    if missing.is_empty() {
        return Vec::new();
    }
    let prefix: &[&str] = if process::is_root() {
        &[]
    } else if process::installed("sudo")
        && process::run(Command::new("sudo").args(["-n", "true"])).is_ok()
    {
        &["sudo", "-n"]
    } else {
        eprintln!(
            "not installed, and no right to install: {}. Tests that need them are skipped. Run `apt-get install {}` as root.",
            missing.join(", "),
            missing.join(" ")
        );
        return missing.into_iter().map(str::to_owned).collect();
    };
    eprintln!("installing Debian packages: {}", missing.join(", "));
    let apt = |words: &[&str]| {
        let mut line = prefix.to_vec();
        line.extend(["apt-get", "-y", "-q"]);
        line.extend(words);
        process::run(
            Command::new(line[0])
                .args(&line[1..])
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    let mut install = vec!["install", "--no-install-recommends"];
    install.extend(&missing);
    if apt(&install).is_err() {
        let result = apt(&["update"]).and_then(|()| apt(&install));
        if let Err(error) = result {
            eprintln!("could not install: {error:#}");
        }
    }
    packages
        .iter()
        .filter(|(_, program)| !process::installed(program))
        .map(|(package, _)| (*package).to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_matches_its_own_kernels_only() {
        assert!(Series::V6_1.matches("linux-image-6.1.0-47-cloud-amd64"));
        assert!(!Series::V6_1.matches("linux-image-6.12.117+deb12-cloud-amd64"));
        assert!(!Series::V6_12.matches("linux-image-6.12.117+deb12-cloud-amd64-unsigned"));
        assert!(!Series::V6_12.matches("linux-image-6.12-cloud-amd64"));
    }

    #[test]
    fn later_builds_order_after_earlier_ones() {
        assert!(numbers("linux-image-6.1.0-10-x") > numbers("linux-image-6.1.0-9-x"));
    }
}
