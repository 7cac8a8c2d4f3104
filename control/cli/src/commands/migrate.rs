//! `migrate`: asks for a move, follows it, prints what it took.

use std::time::Duration;

use dunlin_api::migration::{
    Endpoint, MigrateRequest, MigrationPhase, MigrationReport, MigrationStatus, RoundKind,
};
use dunlin_api::size::display_size;
use dunlin_api::status::VmStatus;
use dunlin_api::{ApiError, ErrorCode, VmName, route};
use serde::Serialize;

use super::lifecycle::wait_for_end;
use super::security::{resolve, security};
use crate::args::MigrateArgs;
use crate::chart;
use crate::client::Client;
use crate::error::CliError;
use crate::printer::{Printer, table};
use crate::terminal::Interrupts;

const POLL: Duration = Duration::from_millis(50);

/// What is printed for programs.
#[derive(Serialize)]
struct Moved<'a> {
    name: &'a VmName,
    to: &'a Endpoint,
    #[serde(flatten)]
    report: &'a MigrationReport,
}

/// Moves a VM, and ends the process that it left.
pub(super) async fn migrate(args: MigrateArgs, printer: &Printer) -> Result<(), CliError> {
    let client = Client::new(&args.name);
    let (to, host) = resolve(args.to).await?;
    let request = MigrateRequest {
        to,
        downtime_ms: milliseconds(args.downtime),
        bandwidth: args.bandwidth,
        max_rounds: args.max_rounds,
        verify: args.verify.map(Into::into).unwrap_or_default(),
        mode: args.mode.into(),
        streams: args.streams.0,
        compression: args.compress.into(),
        timeout_ms: args.timeout.map(milliseconds),
        peer_timeout_ms: Some(milliseconds(args.peer_timeout)),
        security: security(args.tls, host)?,
    };
    let mut interrupts = Interrupts::listen()?;
    let started: MigrationStatus = client.post(route::MIGRATE, &request).await?;
    let last = follow(&client, started, &mut interrupts, printer).await?;
    if let (Some(path), Some(report)) = (&args.svg, &last.report) {
        std::fs::write(path, chart::rounds(report)).map_err(CliError::host(format!(
            "write the chart \"{}\"",
            path.display()
        )))?;
    }
    let report = match last.phase {
        MigrationPhase::Done => last.report.unwrap_or_default(),
        _ => return Err(failure(&client, last).into()),
    };
    // The process that the guest left has told its report and may go.
    if let Ok(status) = client.post::<_, VmStatus>(route::STOP, &()).await {
        wait_for_end(status.pid).await;
    }
    let value = Moved {
        name: &args.name,
        to: &request.to,
        report: &report,
    };
    printer.result(&value, || {
        format!(
            "{}: moved to {}\n{}",
            args.name,
            request.to,
            describe(&report)
        )
    });
    Ok(())
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Looks until the move is over; an interrupt cancels it, and it is still followed to its end.
async fn follow(
    client: &Client,
    mut status: MigrationStatus,
    interrupts: &mut Interrupts,
    printer: &Printer,
) -> Result<MigrationStatus, CliError> {
    let bar = printer.progress();
    while !status.is_over() {
        bar.set_length(status.pages_total);
        bar.set_position(status.pages_done);
        bar.set_message(message(&status));
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            () = interrupts.next() => {
                printer.note("cancelling the move");
                let _asked: MigrationStatus = client.post(route::CANCEL, &()).await?;
            }
        }
        status = client.get(route::MIGRATION).await?;
    }
    bar.finish_and_clear();
    Ok(status)
}

fn message(status: &MigrationStatus) -> String {
    let sent = display_size(status.bytes_sent);
    match status.phase {
        MigrationPhase::Copying => format!("round {}, {sent} sent", status.round),
        MigrationPhase::Connecting => "connecting".into(),
        MigrationPhase::Following => format!("memory follows the guest, {sent} sent"),
        _ => format!("switching over, {sent} sent"),
    }
}

fn failure(client: &Client, status: MigrationStatus) -> ApiError {
    let name = client.name();
    let error = status
        .error
        .unwrap_or_else(|| ApiError::new(ErrorCode::Unknown, "the move failed without a reason"));
    if error.hint.is_some() {
        return error;
    }
    match status.phase {
        MigrationPhase::InDoubt => error.with_hint(format!(
            "look at the destination: if the guest runs there, \"dunlin stop {name} --kill\" here; if the destination is dead for certain, \"dunlin resume {name}\""
        )),
        MigrationPhase::Lost => error.with_hint(format!(
            "what the guest did since the hand-over is gone; make sure that the destination does not run it, then \"dunlin resume {name}\" goes on from the hand-over, \"dunlin stop {name}\" gives it up"
        )),
        _ => error.with_hint(format!("the guest goes on here; \"dunlin inspect {name}\" shows it")),
    }
}

/// A report for people.
pub(super) fn describe(report: &MigrationReport) -> String {
    let ms = |value: f64| format!("{value:.1} ms");
    let mut facts = vec![
        vec!["total".into(), ms(report.total_ms)],
        vec![
            "blackout".into(),
            format!(
                "{} (limit {})",
                report.blackout_ms.map_or("none".into(), ms),
                ms(report.downtime_limit_ms)
            ),
        ],
        vec![
            "sent".into(),
            format!(
                "{} ({:.2} of RAM)",
                display_size(report.bytes_sent),
                report.bytes_sent as f64 / report.ram_bytes.max(1) as f64
            ),
        ],
        vec![
            "processor".into(),
            format!("{:.2} s to send", report.cpu_seconds),
        ],
    ];
    if report.switch_overs_aborted > 0 {
        facts.push(vec![
            "taken back".into(),
            format!("{} switch-overs", report.switch_overs_aborted),
        ]);
    }
    if let Some(verified) = report.verified {
        let word = if verified {
            "equal on both sides"
        } else {
            "DIFFERENT"
        };
        facts.push(vec!["memory".into(), word.into()]);
    }
    let mut rounds = vec![
        [
            "ROUND", "PAGES", "ZERO", "SENT", "TIME", "RATE/s", "DIRTIED",
        ]
        .map(String::from)
        .to_vec(),
    ];
    rounds.extend(report.rounds.iter().map(|round| {
        let mark = match round.kind {
            RoundKind::Live => "",
            RoundKind::Final => " (paused)",
            RoundKind::TakenBack => " (taken back)",
        };
        vec![
            format!("{}{mark}", round.round),
            round.pages.to_string(),
            round.zero_pages.to_string(),
            display_size(round.bytes),
            ms(round.duration_ms),
            display_size(round.goodput.max(0.0) as u64),
            round.dirtied_pages.to_string(),
        ]
    }));
    format!("{}{}", table(&facts), table(&rounds))
}
