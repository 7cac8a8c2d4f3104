//! Records, and how they are compared with what a case expects.

use std::fmt::Write;

use crate::guest::{Case, Event, Field, LEGACY_FIELDS, LONG_FIELDS, Mode};
use crate::layout::ROUNDS;

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself.
    Exit,
    /// A triple fault.
    Shutdown,
    /// Not at all.
    Stuck(String),
}

/// What came of a case.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    report: Vec<u8>,
    end: End,
    quirk: Quirk,
}

/// What a processor does otherwise than the manuals say, throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quirk {
    None,
    /// The error code of a reserved bit says that the page is not present (TCG).
    ReservedNotPresent,
}

impl Outcome {
    pub(crate) fn new(report: Vec<u8>, end: End) -> Self {
        Self {
            report,
            end,
            quirk: Quirk::None,
        }
    }

    pub(crate) fn with(self, quirk: Quirk) -> Self {
        Self { quirk, ..self }
    }

    fn records(&self, mode: Mode) -> Vec<Vec<u64>> {
        let (fields, bytes) = match mode {
            Mode::Long => (LONG_FIELDS, 8),
            Mode::Legacy => (LEGACY_FIELDS, 4),
        };
        let value = |bytes: &[u8]| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(word)
        };
        self.report
            .chunks(fields * bytes)
            .filter(|record| record.len() == fields * bytes)
            .map(|record| record.chunks(bytes).map(value).collect())
            .collect()
    }

    /// What is not as `case` expects, if anything.
    pub(crate) fn compare(&self, case: &Case) -> Option<String> {
        let records = self.records(case.mode);
        let rounds = if case.shuts_down { 1 } else { ROUNDS as usize };
        let mut wrong = String::new();
        for number in 0..rounds * case.events.len() {
            let event = &case.events[number % case.events.len()];
            let Some(record) = records.get(number) else {
                let _ = writeln!(wrong, "  event {number}: {:?}; {event:x?}", self.end);
                break;
            };
            let mut record = record.clone();
            let error = &mut record[Field::Error as usize];
            if event.vector == 14 && *error & 8 != 0 && self.quirk == Quirk::ReservedNotPresent {
                *error |= 1;
            }
            if let Some(how) = differences(&record, event) {
                let _ = writeln!(wrong, "  event {number}:{how}\n    {record:x?}");
                break;
            }
        }
        let expected = if case.shuts_down {
            End::Shutdown
        } else {
            End::Exit
        };
        if wrong.is_empty() && self.end != expected {
            let _ = writeln!(wrong, "  ended by {:?}, not {expected:?}", self.end);
        }
        if wrong.is_empty() && records.len() != rounds * case.events.len() {
            let _ = writeln!(wrong, "  {} events", records.len());
        }
        (!wrong.is_empty()).then(|| format!("{} ({})\n{wrong}", case.name, case.manual))
    }
}

fn differences(record: &[u64], event: &Event) -> Option<String> {
    let mut wrong = String::new();
    let common = [
        (Field::Vector, u64::MAX, event.vector),
        (Field::Error, u64::MAX, event.error),
    ];
    for (field, mask, value) in common.iter().chain(&event.fields) {
        let found = record[*field as usize] & mask;
        if found != *value {
            let _ = write!(wrong, " {field:?} {found:#x} not {value:#x}");
        }
    }
    (!wrong.is_empty()).then_some(wrong)
}
