//! A whole Debian on a disk: systemd and a login on the serial console, no kernel of its own.
//!
//! `mmdebstrap` (debootstrap's work, without root too) puts the packages together, `mke2fs -d` fills
//! an ext4 image with them. The test guest's initramfs mounts it and starts its init.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::packages;
use dunlin_testbed::process;

/// The release whose packages are taken.
const SUITE: &str = "bookworm";
/// What a minimal system lacks to boot to a login. No `kmod`: the initramfs loads the modules.
const INCLUDED: &str = "systemd-sysv,udev,dbus,login,e2fsprogs";
/// Nobody reads these on a test's console.
const EXCLUDED: [&str; 3] = [
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
];
/// What makes the system a guest: root without a password; a login on `ttyS0` only, since the
/// paravirtual console shows at the same place.
const SETTLE: &str = r#"set -e
chroot "$1" passwd --quiet --delete root
echo dunlin > "$1/etc/hostname"
echo "/dev/vda / ext4 defaults 0 1" > "$1/etc/fstab"
ln -s /dev/null "$1/etc/systemd/system/serial-getty@hvc0.service"
"#;
/// `$1` the packed tree, `$2` a folder for it, `$3` the image. Device nodes need rights that not
/// even root has everywhere, and `devtmpfs` covers them.
const FILL: &str = r#"set -e
tar --extract --preserve-permissions --numeric-owner --exclude './dev/*' --file "$1" --directory "$2"
mke2fs -q -t ext4 -L root -d "$2" "$3" 512M
"#;

/// Makes the image, once per build directory and recipe; returns where it lies. A guest writes to
/// it: give it a copy.
pub(crate) fn image() -> anyhow::Result<PathBuf> {
    let folder = process::target().join("guest/debian");
    let (image, made_by) = (folder.join("root.img"), folder.join("recipe"));
    let recipe = [SUITE, INCLUDED, &EXCLUDED.join(" "), SETTLE, FILL].join("\n");
    if image.exists() && fs::read_to_string(&made_by).is_ok_and(|text| text == recipe) {
        return Ok(image);
    }
    let mut needed = vec![("mmdebstrap", "mmdebstrap")];
    if !process::is_root() {
        needed.extend([("uidmap", "newuidmap"), ("fakeroot", "fakeroot")]);
    }
    let missing = packages::install(&needed);
    if !missing.is_empty() {
        bail!("not installed: {}", missing.join(", "));
    }
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("failed to empty {}", folder.display()))?;
    }
    let tree = folder.join("tree");
    fs::create_dir_all(&tree)?;
    let packed = folder.join("root.tar");
    eprintln!("fetching a Debian {SUITE} with systemd");
    bootstrap(&packed)?;
    fill(&packed, &tree, &image)?;
    fs::remove_dir_all(&tree)?;
    fs::remove_file(&packed)?;
    fs::write(made_by, recipe)?;
    Ok(image)
}

/// Puts the packages together, as `packed`.
fn bootstrap(packed: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--quiet", "--variant=minbase", "--include", INCLUDED])
        .arg("--customize-hook")
        .arg(SETTLE)
        .env("LC_ALL", "C");
    for path in EXCLUDED {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    process::run(command.arg(SUITE).arg(packed))
}

/// Makes the image of the packed tree. Who is not root only says whose the files are.
fn fill(packed: &Path, tree: &Path, image: &Path) -> anyhow::Result<()> {
    let mut command = if process::is_root() {
        Command::new("sh")
    } else {
        let mut command = Command::new("fakeroot");
        command.arg("sh");
        command
    };
    process::run(
        command
            .args(["-c", FILL, "sh"])
            .args([packed, tree, image])
            .env("PATH", process::administrator_path()),
    )
}
