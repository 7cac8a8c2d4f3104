//! `probe`: what this host offers.

use crate::host::Host;
use crate::printer::{Printer, table};

/// Prints what the host offers.
pub(super) fn probe(printer: &Printer, host: &dyn Host) {
    let report = host.probe();
    printer.result(&report, || {
        let mut rows = vec![vec![
            "engine".into(),
            format!("{} ({})", report.engine, report.engine_reason),
        ]];
        rows.extend(report.items.iter().map(|item| {
            let word = if item.usable { "yes" } else { "no" };
            vec![item.name.clone(), format!("{word:3}  {}", item.detail)]
        }));
        rows.extend(report.baselines.iter().map(|offer| {
            let name = format!("{} under {}", offer.name, offer.engine);
            let word = if offer.usable { "yes" } else { "no" };
            let detail = match &offer.reason {
                Some(reason) => reason.clone(),
                None if offer.missing.is_empty() => "all features".into(),
                None => format!("lacks {}", offer.missing.join(", ")),
            };
            vec![name, format!("{word:3}  {detail}")]
        }));
        table(&rows)
    });
}
