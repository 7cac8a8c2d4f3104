//! `inspect`: a VM's status, exits, dirty rate and last move; or what a saved file holds.

use dunlin_api::migration::{MigrationPhase, MigrationStatus};
use dunlin_api::size::display_size;
use dunlin_api::snapshot::{Reading, RestoreReport, SnapshotReport};
use dunlin_api::status::{ExitReport, VmStatus};
use dunlin_api::{VmConfig, VmName, route};
use serde_json::json;

use super::migrate::{Bars, describe as describe_move};
use super::profile;
use super::ps::display_state;
use crate::args::InspectArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::host::Host;
use crate::printer::{Printer, display_milliseconds, table};

/// Inspects a VM or a file.
pub(super) async fn inspect(
    args: InspectArgs,
    printer: &Printer,
    host: &dyn Host,
) -> Result<(), CliError> {
    let what = args.what.as_path();
    let name = what.to_str().and_then(|text| text.parse::<VmName>().ok());
    if args.profile {
        let name = name.ok_or_else(|| {
            CliError::Argument(format!(
                "\"{}\" is no VM's name: a profile is of a VM",
                what.display()
            ))
        })?;
        return profile::profile(&name, args.profile_of, printer).await;
    }
    if let Some(name) = name {
        match vm(&name, printer).await {
            Err(CliError::NoSuchVm { .. }) if what.exists() => {}
            other => return other,
        }
    }
    let report = host.describe_snapshot(what)?;
    printer.result(&report, || describe_snapshot(&report));
    Ok(())
}

async fn vm(name: &VmName, printer: &Printer) -> Result<(), CliError> {
    let client = Client::new(name);
    let status: VmStatus = client.get(route::VM).await?;
    let config: VmConfig = client.get(route::CONFIG).await?;
    let exits: ExitReport = client.get(route::EXITS).await?;
    let migration: MigrationStatus = client.get(route::MIGRATION).await?;
    let value =
        json!({ "status": status, "config": config, "exits": exits, "migration": migration });
    printer.result(&value, || {
        format!(
            "{}{}{}",
            describe_status(&status, &config),
            describe_exits(&exits),
            describe_migration(&migration)
        )
    });
    Ok(())
}

fn describe_status(status: &VmStatus, config: &VmConfig) -> String {
    let mut rows = vec![
        vec!["name".into(), status.name.to_string()],
        vec!["state".into(), display_state(status.state).into()],
        vec![
            "engine".into(),
            format!("{} ({})", status.engine, status.engine_reason),
        ],
        vec!["processors".into(), status.cpus.to_string()],
        vec!["memory".into(), display_size(status.memory_bytes)],
        vec!["uptime".into(), display_milliseconds(status.uptime_ms)],
        vec!["pid".into(), status.pid.to_string()],
    ];
    for disk in &config.disks {
        let mode = if disk.read_only { " (read-only)" } else { "" };
        rows.push(vec![
            "disk".into(),
            format!("{}{mode}", disk.path.display()),
        ]);
    }
    for (net, mac) in config.nets.iter().zip(config.macs()) {
        rows.push(vec![
            "net".into(),
            format!("{mac} on {}", net.switch.display()),
        ]);
    }
    if !status.throttled_percent.is_empty() {
        let shares = status.throttled_percent.iter();
        let shares: Vec<_> = shares.map(|percent| format!("{percent} %")).collect();
        rows.push(vec![
            "slowed down".into(),
            format!("by {} for a move", shares.join(", ")),
        ]);
    }
    if let Some(restore) = &status.restore {
        rows.push(vec!["restored".into(), describe_restore(restore)]);
    }
    if let Some(missing) = status.missing_pages {
        let silent = if status.waits_for_source {
            ", which cannot be reached: the guest waits where it needs it"
        } else {
            ""
        };
        let size = display_size(missing.saturating_mul(4096));
        rows.push(vec![
            "to come".into(),
            format!("{size} from the host that it came from{silent}"),
        ]);
    }
    if let Some(reason) = &status.reason {
        rows.push(vec!["reason".into(), reason.clone()]);
    }
    table(&rows)
}

fn describe_restore(restore: &RestoreReport) -> String {
    let how = match restore.reading {
        Reading::Lazy => "memory read behind the running guest",
        Reading::Eager => "memory read before it ran",
    };
    let time = restore
        .restore_ms
        .map_or(String::new(), |ms| format!("in {ms:.1} ms, "));
    match restore.pages_missing {
        0 => format!("{time}{how}"),
        missing => format!("{time}{how}, {} to come", display_size(missing * 4096)),
    }
}

fn describe_exits(report: &ExitReport) -> String {
    if report.cpus.is_empty() {
        return "exits: not counted while memory is arriving\n".to_owned();
    }
    let sum = |pick: fn(&dunlin_api::status::ExitCounts) -> u64| {
        report.cpus.iter().map(pick).sum::<u64>().to_string()
    };
    let mut rows = vec![
        vec!["port reads".into(), sum(|exits| exits.port_reads)],
        vec!["port writes".into(), sum(|exits| exits.port_writes)],
        vec!["mmio reads".into(), sum(|exits| exits.mmio_reads)],
        vec!["mmio writes".into(), sum(|exits| exits.mmio_writes)],
        vec!["halts".into(), sum(|exits| exits.halts)],
        vec!["kicks".into(), sum(|exits| exits.kicks)],
        vec![
            "ends of interrupt".into(),
            sum(|exits| exits.end_of_interrupts),
        ],
        vec!["interpreted".into(), sum(|exits| exits.instructions)],
        vec!["exits/s".into(), format!("{:.0}", report.exits_per_second)],
        vec![
            "interpreted/s".into(),
            format!("{:.0}", report.instructions_per_second),
        ],
    ];
    if let Some(rate) = report.dirty_pages_per_second {
        let bytes = display_size((rate * 4096.0) as u64);
        rows.push(vec![
            "dirty pages/s".into(),
            format!("{rate:.0} ({bytes}/s)"),
        ]);
    }
    table(&rows)
}

fn describe_migration(status: &MigrationStatus) -> String {
    if status.phase == MigrationPhase::None {
        return String::new();
    }
    let mut text = format!("last move: {:?}\n", status.phase).to_lowercase();
    if let Some(error) = &status.error {
        text.push_str(&format!("  {error}\n"));
    }
    if let Some(report) = &status.report {
        text.push_str(&describe_move(report, Bars::None));
    }
    text
}

fn describe_snapshot(report: &SnapshotReport) -> String {
    let config = &report.config;
    let mut rows = vec![
        vec!["name".into(), config.name.to_string()],
        vec!["processors".into(), config.cpus.to_string()],
        vec!["memory".into(), display_size(config.memory_bytes)],
        vec![
            "file".into(),
            format!(
                "{}, format version {}",
                display_size(report.file_bytes),
                report.format_version
            ),
        ],
    ];
    for component in &report.components {
        rows.push(vec![
            component.name.clone(),
            format!(
                "{} version {}, {}",
                component.kind,
                component.version,
                display_size(component.bytes)
            ),
        ]);
    }
    table(&rows)
}
