//! `console`: this terminal as the serial console of a VM that runs already.

use dunlin_api::status::VmStatus;
use dunlin_api::{VmName, route};
use serde_json::json;

use crate::client::Client;
use crate::error::CliError;
use crate::printer::Printer;
use crate::terminal::{self, Ending, Interrupts, Output};

/// Attaches until Ctrl-], a signal, or the VM's end.
pub(super) async fn console(name: &VmName, printer: &Printer) -> Result<(), CliError> {
    let client = Client::new(name);
    let console = client.connect(&client.place().console_socket()).await?;
    let mut interrupts = Interrupts::listen()?;
    let output = if printer.is_json() {
        Output::Error
    } else {
        Output::Standard
    };
    let ending = terminal::attach(console, &mut interrupts, output).await?;
    let (word, remark) = match ending {
        Ending::Closed => ("closed", where_it_is(&client).await),
        Ending::Detached | Ending::Interrupted => {
            ("detached", "detached; the VM goes on".to_owned())
        }
    };
    printer.result(&json!({ "name": name, "console": word }), String::new);
    printer.note(&format!("\r\n{name}: {remark}"));
    Ok(())
}

/// Why the console closed: a VM that still answers has another process now.
async fn where_it_is(client: &Client) -> String {
    match client.get::<VmStatus>(route::VM).await {
        Ok(VmStatus { pid, name, .. }) => format!(
            "handed over, goes on in process {pid}; \"dunlin console {name}\" attaches again"
        ),
        Err(_) => "the VM has ended or moved".to_owned(),
    }
}
