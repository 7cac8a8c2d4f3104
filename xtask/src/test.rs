//! Runs the tests, after installing what they need, and counts what was skipped.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use clap::Args;

use crate::packages::{self, Series};
use crate::{debian, guest, portable};
use dunlin_testbed::process;

/// Debian packages that tests use, and a program of each by which it is found.
const NEEDED: [(&str, &str); 3] = [
    ("qemu-system-x86", "qemu-system-x86_64"),
    ("iproute2", "ip"),
    ("cpio", "cpio"),
];

/// Arguments of `cargo xtask test`.
#[derive(Debug, Default, Args)]
pub(crate) struct TestArguments {
    /// Only the tests of this area, e.g. `migration`, `debian`, or a crate's without "dunlin-"
    area: Option<String>,
}

/// What a line-by-line reading of the test runner's output found.
#[derive(Debug, Default)]
struct Counts {
    passed: u64,
    failed: u64,
    skips: BTreeMap<String, u64>,
}

pub(crate) fn run(arguments: &TestArguments) -> anyhow::Result<()> {
    let mut unavailable = packages::install(&NEEDED);
    for package in &mut unavailable {
        package.insert_str(0, "could not install package ");
    }
    let mut kernels = Vec::new();
    for series in Series::ALL {
        match guest::build(series) {
            Ok(guest) => kernels.push((series, guest)),
            Err(error) => {
                unavailable.push(format!("no guest of series {}: {error:#}", series.name()))
            }
        }
    }
    if matches!(arguments.area.as_deref(), None | Some("x86" | "hypervisor")) {
        unavailable.extend(portable::check()?);
    }
    let debian = match arguments.area.as_deref() {
        None | Some("debian" | "testbed") => debian::image()
            .inspect_err(|error| unavailable.push(format!("no Debian: {error:#}")))
            .ok(),
        Some(_) => None,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // The tests drive the release binary as a user would.
    process::run_shown(
        Command::new(&cargo)
            .args(["build", "--release", "--quiet", "--package", "dunlin"])
            .current_dir(process::root()),
    )?;
    let mut command = Command::new(&cargo);
    command
        .args(["test", "--no-fail-fast"])
        .current_dir(process::root())
        .env(
            "DUNLIN_TEST_BINARY",
            process::target().join("release/dunlin"),
        );
    for (series, guest) in &kernels {
        let name = series.name().replace('.', "_");
        command
            .env(format!("DUNLIN_TEST_KERNEL_{name}"), &guest.kernel)
            .env(format!("DUNLIN_TEST_ELF_{name}"), &guest.elf)
            .env(format!("DUNLIN_TEST_INITRAMFS_{name}"), &guest.initramfs);
    }
    if let Some((_, guest)) = kernels.first() {
        command.env("DUNLIN_TEST_KERNEL", &guest.kernel);
    }
    if let Some(image) = &debian {
        command.env("DUNLIN_TEST_DEBIAN", image);
    }
    match arguments.area.as_deref() {
        None => {
            command.arg("--workspace");
        }
        Some("debian") => {
            command.args(["--package", "dunlin-testbed", "--test", "debian"]);
        }
        Some("migration") => {
            command.args([
                "--package",
                "dunlin-migration",
                "--package",
                "dunlin-testbed",
            ]);
        }
        Some(area) => {
            command.args(["--package", &format!("dunlin-{area}")]);
        }
    }
    if let Some("migration") = arguments.area.as_deref() {
        command.env("DUNLIN_TEST_MOVES", "100");
    }
    command.args(["--", "--show-output"]);
    let (counts, ended_well) = follow(&mut command)?;
    for (reason, count) in &counts.skips {
        println!("SKIP: {reason} ({count})");
    }
    for reason in &unavailable {
        println!("SKIP: {reason}");
    }
    println!(
        "{} passed, {} failed, {} skipped",
        counts.passed,
        counts.failed,
        counts.skips.values().sum::<u64>() + unavailable.len() as u64
    );
    if counts.failed > 0 || !ended_well {
        bail!("tests failed");
    }
    if counts.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// Runs the tests, shows what matters, and counts.
fn follow(command: &mut Command) -> anyhow::Result<(Counts, bool)> {
    let log = process::target().join("test.log");
    let (reader, writer) = std::io::pipe()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .context("failed to start cargo test")?;
    // The command holds the writing end too; the reader would never see the end of file.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut file = std::fs::File::create(&log)?;
    let mut counts = Counts::default();
    let mut failures = false;
    for line in BufReader::new(reader).lines() {
        use std::io::Write;
        let line = line?;
        writeln!(file, "{line}")?;
        if line.trim() == "failures:" {
            failures = true;
        }
        if line.starts_with("     Running") || line.starts_with("   Doc-tests") {
            failures = false;
        }
        let shown = counts.take(&line)
            || failures
            || line.starts_with("error")
            || line.starts_with("MEASURED:");
        if shown {
            println!("{line}");
        }
    }
    let status = child.wait()?;
    println!("full output: {}", log.display());
    Ok((counts, status.success()))
}

impl Counts {
    /// Counts what the line reports; true when a person should see the line.
    fn take(&mut self, line: &str) -> bool {
        if let Some(reason) = line.trim().strip_prefix("SKIP: ") {
            *self.skips.entry(reason.to_owned()).or_default() += 1;
            return false;
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            let number = |key: &str| {
                result
                    .split(['.', ';'])
                    .find_map(|part| part.trim().strip_suffix(key)?.trim().parse::<u64>().ok())
                    .unwrap_or(0)
            };
            self.passed += number("passed");
            self.failed += number("failed");
            return number("passed") + number("failed") > 0;
        }
        line.trim_start().starts_with("Running ") || line.ends_with("... FAILED")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_skips_are_counted() {
        let mut counts = Counts::default();
        for line in [
            "test result: ok. 15 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.04s",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.04s",
            "SKIP: no /dev/kvm",
            "SKIP: no /dev/kvm",
        ] {
            counts.take(line);
        }
        assert_eq!((counts.passed, counts.failed), (17, 1));
        assert_eq!(counts.skips.get("no /dev/kvm"), Some(&2));
    }
}
