//! `migrate`: asks for a move, follows it, prints what it took.

use std::time::Duration;

use dunlin_api::migration::{
    Endpoint, MigrateRequest, MigrationPhase, MigrationReport, MigrationStatus, RoundKind,
};
use dunlin_api::plan::MovePrediction;
use dunlin_api::size::display_size;
use dunlin_api::status::VmStatus;
use dunlin_api::{ApiError, ErrorCode, VmName, route};
use serde::Serialize;

use super::explain::{self, Figure};
use super::lifecycle::wait_for_end;
use super::security::{resolve, security};
use crate::args::{ExplainArgument, MigrateArgs};
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
    #[serde(flatten)]
    explanation: Option<Explanation<'a>>,
}

/// What was expected, and how far that was off.
#[derive(Serialize)]
struct Explanation<'a> {
    prediction: &'a MovePrediction,
    figures: Vec<Figure>,
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
        reconnect_window_ms: Some(milliseconds(args.reconnect_window)),
        security: security(args.tls, host)?,
    };
    let mut interrupts = Interrupts::listen()?;
    let expected: Option<MovePrediction> = match args.explain {
        Some(_) => Some(client.post(route::PREDICTION, &request).await?),
        None => None,
    };
    if let Some(expected) = &expected {
        let text = || explain::describe(expected, request.downtime_ms);
        if args.explain == Some(ExplainArgument::Only) {
            printer.result(expected, text);
            return Ok(());
        }
        printer.note(text().trim_end());
    }
    let started: MigrationStatus = client.post(route::MIGRATE, &request).await?;
    let last = follow(&client, started, &mut interrupts, printer).await?;
    if let (Some(path), Some(report)) = (&args.svg, &last.report) {
        std::fs::write(path, chart::rounds(report, expected.as_ref())).map_err(CliError::host(
            format!("write the chart \"{}\"", path.display()),
        ))?;
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
        explanation: expected.as_ref().map(|prediction| Explanation {
            prediction,
            figures: explain::figures(prediction, &report),
        }),
    };
    let bars = if printer.draws() {
        Bars::Shown
    } else {
        Bars::None
    };
    printer.result(&value, || {
        let figures = value
            .explanation
            .as_ref()
            .map(|explanation| &explanation.figures);
        format!(
            "{}: moved to {}\n{}{}",
            args.name,
            request.to,
            describe(&report, bars),
            figures.map_or_else(String::new, |figures| explain::compare(figures))
        )
    });
    Ok(())
}

pub(super) fn milliseconds(time: Duration) -> u64 {
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

/// A line for each round, with a bar of what it sent where `bars` are to be.
fn rounds(report: &MigrationReport, bars: Bars) -> Vec<Vec<String>> {
    let heading = [
        "ROUND", "PAGES", "ZERO", "SAME", "SENT", "TIME", "GOODPUT", "DIRTY", "REMAINS",
    ];
    let mut rows = vec![heading.map(String::from).to_vec()];
    let largest = report.rounds.iter().map(|round| round.bytes).max();
    let rate = |rate: f64| format!("{}/s", display_size(rate.max(0.0) as u64));
    rows.extend(report.rounds.iter().map(|round| {
        let mark = match round.kind {
            RoundKind::Live => "",
            RoundKind::Final => " (paused)",
            RoundKind::TakenBack => " (taken back)",
        };
        let mut row = vec![
            format!("{}{mark}", round.round),
            round.pages.to_string(),
            round.zero_pages.to_string(),
            round.same_pages.to_string(),
            display_size(round.bytes),
            format!("{:.1} ms", round.duration_ms),
            rate(round.goodput),
            rate(round.dirty_rate),
            display_size(round.dirtied_pages.saturating_mul(PAGE)),
        ];
        if bars == Bars::Shown {
            row.push(chart::bar(round.bytes, largest.unwrap_or(0)));
        }
        row
    }));
    rows
}

/// Whether a report is drawn as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bars {
    /// On a terminal.
    Shown,
    /// Into a pipe.
    None,
}

/// Bytes of a page.
const PAGE: u64 = 4096;

/// A report for people.
pub(super) fn describe(report: &MigrationReport, bars: Bars) -> String {
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
    if let Some(following) = &report.post_copy {
        facts.push(vec![
            "followed".into(),
            format!(
                "{} pages in {}: {} by fault, {} beside one, {} in turn",
                following.missing_pages,
                ms(following.duration_ms),
                following.urgent_pages,
                following.prefetched_pages,
                following.bulk_pages
            ),
        ]);
        facts.push(vec![
            "faults".into(),
            format!(
                "half within {} µs, 99 of 100 within {} µs, all within {} µs",
                following.fault_p50_us, following.fault_p99_us, following.fault_max_us
            ),
        ]);
    }
    if report.streams > 1 {
        facts.push(vec!["streams".into(), report.streams.to_string()]);
    }
    if let Some(verified) = report.verified {
        let word = if verified {
            "equal on both sides"
        } else {
            "DIFFERENT"
        };
        facts.push(vec!["memory".into(), word.into()]);
    }
    let rounds = rounds(report, bars);
    format!("{}{}", table(&facts), table(&rounds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_api::migration::RoundReport;

    fn report() -> MigrationReport {
        let round = |round, kind, bytes, duration_ms, dirtied_pages| RoundReport {
            round,
            kind,
            bytes,
            duration_ms,
            dirtied_pages,
            pages: bytes / 4096,
            goodput: bytes as f64 / duration_ms * 1e3,
            dirty_rate: dirtied_pages as f64 * 4096.0 / duration_ms * 1e3,
            ..RoundReport::default()
        };
        MigrationReport {
            ram_bytes: 512 << 20,
            rounds: vec![
                round(0, RoundKind::Live, 256 << 20, 250.0, 1280),
                round(1, RoundKind::Final, 8 << 20, 8.0, 0),
            ],
            total_ms: 270.0,
            downtime_limit_ms: 50.0,
            blackout_ms: Some(12.5),
            bytes_sent: 264 << 20,
            cpu_seconds: 0.25,
            ..MigrationReport::default()
        }
    }

    const PLAIN: &str = "\
total      270.0 ms
blackout   12.5 ms (limit 50.0 ms)
sent       264 MiB (0.52 of RAM)
processor  0.25 s to send
ROUND       PAGES  ZERO  SAME  SENT     TIME      GOODPUT     DIRTY     REMAINS
0           65536  0     0     256 MiB  250.0 ms  1 GiB/s     20 MiB/s  5 MiB
1 (paused)  2048   0     0     8 MiB    8.0 ms    1000 MiB/s  0 B/s     0 B
";

    #[test]
    fn a_pipe_gets_a_table() {
        assert_eq!(describe(&report(), Bars::None), PLAIN);
    }

    #[test]
    fn a_terminal_gets_bars_beside_it() {
        let text = describe(&report(), Bars::Shown);
        let without: Vec<&str> = text
            .lines()
            .map(|line| line.trim_end_matches(['█', '▏', '▎', '▍', '▌', '▋', '▊', '▉', ' ']))
            .collect();
        assert_eq!(without, PLAIN.lines().collect::<Vec<_>>());
        assert!(text.contains("5 MiB    █"), "{text}");
    }
}
