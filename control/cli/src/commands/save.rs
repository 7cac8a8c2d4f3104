//! `save`: a VM to a file.

use std::path::Path;
use std::time::Duration;

use dunlin_api::size::display_size;
use dunlin_api::snapshot::{SavePhase, SaveReport, SaveRequest, SaveStatus};
use dunlin_api::status::{VmState, VmStatus};
use dunlin_api::{ApiError, ErrorCode, VmName, route};
use serde::Serialize;
use serde_json::json;

use super::absolute;
use super::lifecycle::wait_for_end;
use crate::args::SaveArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::printer::Printer;
use crate::terminal::Interrupts;

const POLL: Duration = Duration::from_millis(20);

/// What is printed for programs of a guest that ran on.
#[derive(Serialize)]
struct Saved<'a> {
    name: &'a VmName,
    file: &'a Path,
    bytes: u64,
    state: VmState,
    #[serde(flatten)]
    report: &'a SaveReport,
}

/// Saves a VM; with `--stop` it ends afterwards, with `--live` it runs on.
pub(super) async fn save(args: SaveArgs, printer: &Printer) -> Result<(), CliError> {
    let client = Client::new(&args.name);
    let request = SaveRequest {
        to: absolute(&args.to)?,
        live: args.live,
        without_disks: args.without_disks,
    };
    if args.live {
        return save_live(&client, &request, printer).await;
    }
    let bar = printer.progress();
    bar.set_message("saving");
    let mut status: VmStatus = client.post(route::SAVE, &request).await?;
    if args.stop {
        status = client.post(route::STOP, &()).await?;
        wait_for_end(status.pid).await;
    }
    bar.finish_and_clear();
    let path = &request.to;
    let bytes = std::fs::metadata(path).map(|file| file.len()).unwrap_or(0);
    let value = json!({ "name": args.name, "file": path, "bytes": bytes, "state": status.state });
    printer.result(&value, || {
        format!(
            "{}: saved to {} ({})",
            args.name,
            path.display(),
            display_size(bytes)
        )
    });
    if !args.stop {
        printer.note(&format!(
            "it is paused: \"dunlin resume {0}\" lets it go on, \"dunlin stop {0}\" ends it",
            args.name
        ));
    }
    Ok(())
}

async fn save_live(
    client: &Client,
    request: &SaveRequest,
    printer: &Printer,
) -> Result<(), CliError> {
    let mut interrupts = Interrupts::listen()?;
    let _begun: VmStatus = client.post(route::SAVE, request).await?;
    let last = follow(client, &mut interrupts, printer).await?;
    let Some(report) = last.report else {
        let unsaid = || ApiError::new(ErrorCode::Unknown, "the save failed without a reason");
        let error = last.error.unwrap_or_else(unsaid);
        if error.hint.is_some() {
            return Err(error.into());
        }
        return Err(error
            .with_hint("the guest runs on; there is no file")
            .into());
    };
    let status: VmStatus = client.get(route::VM).await?;
    let name = client.name();
    let value = Saved {
        name,
        file: &request.to,
        bytes: report.file_bytes,
        state: status.state,
        report: &report,
    };
    printer.result(&value, || {
        format!(
            "{name}: saved to {} ({}) as it was when it stopped for {:.1} ms",
            request.to.display(),
            display_size(report.file_bytes),
            report.pause_ms.unwrap_or_default()
        )
    });
    Ok(())
}

/// Looks until the save is over; an interrupt cancels it, and it is still followed to its end.
async fn follow(
    client: &Client,
    interrupts: &mut Interrupts,
    printer: &Printer,
) -> Result<SaveStatus, CliError> {
    let bar = printer.progress();
    loop {
        let status: SaveStatus = client.get(route::SAVE).await?;
        if status.phase != SavePhase::Writing {
            bar.finish_and_clear();
            return Ok(status);
        }
        bar.set_length(status.pages_total);
        bar.set_position(status.pages_done);
        bar.set_message(format!("saving, {} written", display_size(status.bytes)));
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            () = interrupts.next() => {
                printer.note("cancelling the save");
                let _asked: SaveStatus = client.post(route::SAVE_CANCEL, &()).await?;
            }
        }
    }
}
