//! `ps`: the VMs of this runtime directory.

use std::time::Duration;

use dunlin_api::VmName;
use dunlin_api::route;
use dunlin_api::size::display_size;
use dunlin_api::status::{VmState, VmStatus};

use crate::client::{Client, runtime_directory};
use crate::printer::{Printer, display_milliseconds, table};

/// Lists VMs. One that does not answer within a second is listed by name alone.
pub(super) async fn ps(printer: &Printer) {
    let mut running = Vec::new();
    let mut silent = Vec::new();
    for name in names() {
        let client = Client::new(&name);
        let status =
            tokio::time::timeout(Duration::from_secs(1), client.get::<VmStatus>(route::VM));
        match status.await {
            Ok(Ok(status)) => running.push(status),
            // What a process that died left behind.
            Ok(Err(_)) => {}
            Err(_) => silent.push(name),
        }
    }
    let value = serde_json::json!({ "vms": running, "silent": silent });
    printer.result(&value, || {
        let mut rows = vec![header()];
        rows.extend(running.iter().map(row));
        rows.extend(
            silent
                .iter()
                .map(|name| vec![name.to_string(), "no answer".into()]),
        );
        table(&rows)
    });
}

fn names() -> Vec<VmName> {
    let Ok(entries) = std::fs::read_dir(runtime_directory().path()) else {
        return Vec::new();
    };
    let mut names: Vec<VmName> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    names.sort();
    names
}

fn header() -> Vec<String> {
    ["NAME", "STATE", "ENGINE", "CPUS", "MEMORY", "UPTIME", "PID"]
        .map(String::from)
        .into()
}

fn row(status: &VmStatus) -> Vec<String> {
    vec![
        status.name.to_string(),
        display_state(status.state).into(),
        status.engine.clone(),
        status.cpus.to_string(),
        display_size(status.memory_bytes),
        display_milliseconds(status.uptime_ms),
        status.pid.to_string(),
    ]
}

/// A state as a word.
pub(super) fn display_state(state: VmState) -> &'static str {
    match state {
        VmState::Created => "created",
        VmState::Incoming => "incoming",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Moved => "moved",
        VmState::InDoubt => "in doubt",
        VmState::Lost => "lost",
        VmState::Stopped => "stopped",
    }
}
