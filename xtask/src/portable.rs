//! Checks that hosts of another architecture can build the engines.

use std::process::{Command, Stdio};

use dunlin_testbed::process;

/// The other architecture.
const TARGET: &str = "aarch64-unknown-linux-gnu";

/// The crate above all that depends on the host's architecture. It needs no C compiler.
const PACKAGE: &str = "dunlin-hypervisor";

/// Checks, without building. `Some` is why that could not be done.
///
/// # Errors
/// It does not build.
pub(crate) fn check() -> anyhow::Result<Option<String>> {
    if !has_target() {
        return Ok(Some(format!(
            "the build for {TARGET}: rustup has no such target and cannot add it"
        )));
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    process::run_shown(
        Command::new(cargo)
            .args(["check", "--quiet", "--package", PACKAGE, "--target", TARGET])
            .current_dir(process::root()),
    )?;
    println!("{PACKAGE} builds for {TARGET}");
    Ok(None)
}

/// Is the target's standard library there, or can it be had?
fn has_target() -> bool {
    let installed = Command::new("rustup")
        .args(["target", "list", "--installed"])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(TARGET));
    installed
        || Command::new("rustup")
            .args(["target", "add", TARGET])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}
