//! `save`: a VM to a file.

use dunlin_api::route;
use dunlin_api::size::display_size;
use dunlin_api::snapshot::SaveRequest;
use dunlin_api::status::VmStatus;
use serde_json::json;

use super::absolute;
use super::lifecycle::wait_for_end;
use crate::args::SaveArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::printer::Printer;

/// Saves a VM; with `--stop` it ends afterwards.
pub(super) async fn save(args: SaveArgs, printer: &Printer) -> Result<(), CliError> {
    let client = Client::new(&args.name);
    let request = SaveRequest {
        to: absolute(&args.to)?,
    };
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
