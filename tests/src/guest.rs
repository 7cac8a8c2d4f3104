//! The test guest as `cargo xtask test` hands it over, by environment variables.

use std::path::PathBuf;

/// A stock kernel and the initramfs for it.
#[derive(Debug, Clone)]
pub struct TestGuest {
    /// The distribution's bzImage.
    pub kernel: PathBuf,
    /// The same kernel as ELF.
    pub elf: PathBuf,
    /// Busybox and the agent.
    pub initramfs: PathBuf,
}

/// The `dunlin` to test; `None`, with a line that is counted as skipped, where none was built.
pub fn binary() -> Option<PathBuf> {
    variable("DUNLIN_TEST_BINARY")
}

/// The guest of a kernel series (`"6.1"`); `None`, with a line that is counted as skipped, where
/// the kernel could not be fetched.
pub fn stock(series: &str) -> Option<TestGuest> {
    let suffix = series.replace('.', "_");
    Some(TestGuest {
        kernel: variable(&format!("DUNLIN_TEST_KERNEL_{suffix}"))?,
        elf: variable(&format!("DUNLIN_TEST_ELF_{suffix}"))?,
        initramfs: variable(&format!("DUNLIN_TEST_INITRAMFS_{suffix}"))?,
    })
}

/// The image of a Debian with systemd; `None`, with a line that is counted as skipped, where it could
/// not be made. Other tests use it too: give a guest a copy.
pub fn debian() -> Option<PathBuf> {
    variable("DUNLIN_TEST_DEBIAN")
}

fn variable(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).map(PathBuf::from);
    match value {
        Some(path) if path.exists() => Some(path),
        _ => {
            eprintln!("SKIP: {name} is not set, run the tests by `cargo xtask test`");
            None
        }
    }
}
