//! What CI runs: formatting, lints, licences, arrows, documentation, then every test.

use std::process::Command;
use std::time::Instant;

use anyhow::bail;

use crate::{deps, test};
use dunlin_testbed::process;

/// The cargo-deny that CI uses, installed when it is missing.
const DENY_VERSION: &str = "0.20.2";

pub(crate) fn run() -> anyhow::Result<()> {
    let mut failed = Vec::new();
    let mut step = |name: &'static str, work: &dyn Fn() -> anyhow::Result<()>| {
        let start = Instant::now();
        let result = work();
        let seconds = start.elapsed().as_secs();
        match result {
            Ok(()) => println!("ci: {name} ok ({seconds} s)"),
            Err(error) => {
                println!("ci: {name} FAILED ({seconds} s): {error:#}");
                failed.push(name);
            }
        }
    };
    step("fmt", &|| cargo(&["fmt", "--all", "--check"]));
    step("deps", &deps::run);
    step("clippy", &|| {
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "--deny",
            "warnings",
        ])
    });
    step("deny", &deny);
    step("docs", &|| {
        process::run_shown(
            cargo_command(&["doc", "--workspace", "--no-deps", "--quiet"])
                .env("RUSTDOCFLAGS", "--deny warnings"),
        )
    });
    step("test", &|| test::run(&test::TestArguments::default()));
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn cargo_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(process::root());
    command
}

fn cargo(arguments: &[&str]) -> anyhow::Result<()> {
    process::run_shown(&mut cargo_command(arguments))
}

/// Licences, bans and sources; advisories too where their database can be reached.
fn deny() -> anyhow::Result<()> {
    if process::output(&mut cargo_command(&["deny", "--version"])).is_err() {
        println!("ci: installing cargo-deny {DENY_VERSION}");
        cargo(&[
            "install",
            "--locked",
            "--quiet",
            "cargo-deny",
            "--version",
            DENY_VERSION,
        ])?;
    }
    cargo(&[
        "deny",
        "--log-level",
        "error",
        "check",
        "licenses",
        "bans",
        "sources",
    ])?;
    if let Err(error) = process::output(&mut cargo_command(&["deny", "check", "advisories"])) {
        let text = format!("{error:#}");
        if text.contains("failed to fetch advisory database") {
            println!("SKIP: deny advisories: the advisory database cannot be reached from here");
        } else {
            return Err(error);
        }
    }
    Ok(())
}
