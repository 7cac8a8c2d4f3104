//! Checks the arrows between our crates: downward only, as ARCHITECTURE.md draws them.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, bail};
use serde::Deserialize;

use dunlin_testbed::process;

/// What each crate may depend on, of ours. A crate that is missing here fails the check.
const ALLOWED: &[(&str, &[&str])] = &[
    ("dunlin-api", &[]),
    ("dunlin-guest", &[]),
    ("dunlin-x86", &[]),
    ("dunlin-boot", &["dunlin-guest"]),
    ("dunlin-storage", &["dunlin-guest"]),
    ("dunlin-vswitch", &["dunlin-guest"]),
    ("dunlin-hypervisor", &["dunlin-guest", "dunlin-x86"]),
    ("dunlin-lane", &[]),
    ("dunlin-migration", &["dunlin-guest", "dunlin-lane"]),
    (
        "dunlin-devices",
        &["dunlin-guest", "dunlin-storage", "dunlin-vswitch"],
    ),
    (
        "dunlin-vmm",
        &[
            "dunlin-api",
            "dunlin-boot",
            "dunlin-devices",
            "dunlin-guest",
            "dunlin-hypervisor",
            "dunlin-migration",
            "dunlin-storage",
            "dunlin-vswitch",
            "dunlin-x86",
        ],
    ),
    ("dunlin-cli", &["dunlin-api"]),
    (
        "dunlin",
        &[
            "dunlin-api",
            "dunlin-cli",
            "dunlin-hypervisor",
            "dunlin-migration",
            "dunlin-vmm",
            "dunlin-vswitch",
            "dunlin-x86",
        ],
    ),
    ("dunlin-guest-agent", &[]),
    ("dunlin-guest-baremetal", &[]),
    ("dunlin-guest-kvmtest", &["dunlin-guest", "dunlin-x86"]),
    ("dunlin-guest-migbench", &[]),
    ("dunlin-testbed", &["dunlin-guest-migbench"]),
    (
        "xtask",
        &["dunlin-boot", "dunlin-guest-migbench", "dunlin-testbed"],
    ),
];

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    path: Option<String>,
    kind: Option<String>,
}

pub(crate) fn run() -> anyhow::Result<()> {
    let text = process::output(
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .current_dir(process::root()),
    )?;
    let metadata: Metadata =
        serde_json::from_str(&text).context("cargo metadata printed no valid JSON")?;
    let violations = check(&metadata);
    if !violations.is_empty() {
        bail!(
            "arrows that do not point downward:\n  {}",
            violations.join("\n  ")
        );
    }
    println!(
        "deps: {} crates, every arrow points downward",
        metadata.packages.len()
    );
    Ok(())
}

fn check(metadata: &Metadata) -> Vec<String> {
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    let mut violations = Vec::new();
    for package in &metadata.packages {
        let Some(below) = allowed.get(package.name.as_str()) else {
            violations.push(format!(
                "{} has no place in xtask/src/deps.rs",
                package.name
            ));
            continue;
        };
        for dependency in &package.dependencies {
            let test_only = dependency.kind.as_deref() == Some("dev");
            let ours = dependency.path.is_some();
            if ours && !test_only && !below.contains(&dependency.name.as_str()) {
                violations.push(format!("{} → {}", package.name, dependency.name));
            }
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, dependency: &str, kind: Option<&str>) -> Metadata {
        Metadata {
            packages: vec![Package {
                name: name.to_owned(),
                dependencies: vec![Dependency {
                    name: dependency.to_owned(),
                    path: Some("somewhere".to_owned()),
                    kind: kind.map(str::to_owned),
                }],
            }],
        }
    }

    #[test]
    fn an_arrow_upward_is_found() {
        assert_eq!(
            check(&package("dunlin-guest", "dunlin-vmm", None)),
            ["dunlin-guest → dunlin-vmm"]
        );
    }

    #[test]
    fn an_unknown_crate_is_found() {
        assert_eq!(check(&package("dunlin-new", "dunlin-guest", None)).len(), 1);
    }

    #[test]
    fn arrows_downward_and_of_tests_are_allowed() {
        assert!(check(&package("dunlin-vmm", "dunlin-guest", None)).is_empty());
        assert!(check(&package("dunlin-guest", "dunlin-vmm", Some("dev"))).is_empty());
    }
}
