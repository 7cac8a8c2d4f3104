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
        table(&rows)
    });
}
