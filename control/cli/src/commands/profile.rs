//! `inspect --profile`: where the time of a VM's processors goes.

use std::collections::HashMap;

use dunlin_api::profile::{
    CpuProfile, CpuSamples, DeviceTime, MAX_DURATION_MS, MAX_RATE, ProcessorCounters,
    ProfileReport, ProfileRequest, TimeKind,
};
use dunlin_api::{VmName, route};
use serde::Serialize;

use crate::args::ProfileArgs;
use crate::chart::{self, Row};
use crate::client::Client;
use crate::error::CliError;
use crate::printer::{Printer, display_milliseconds, table};
use crate::symbols::Symbols;

/// Places that are shown where nobody says how many.
const TOP: usize = 20;
/// Places in a picture.
const DRAWN: usize = 20;

/// What is printed: the report, and what it says of the guest's code.
#[derive(Debug, Serialize)]
struct Profiled<'a> {
    name: &'a VmName,
    #[serde(flatten)]
    report: &'a ProfileReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    symbols: Option<SymbolsUsed>,
    /// Samples of the processors at work, by the guest's code, most first.
    top: Vec<Top>,
}

/// Where names of code are from.
#[derive(Debug, Serialize)]
struct SymbolsUsed {
    file: String,
    count: usize,
    /// Added to the file's addresses.
    offset: String,
    offset_from: OffsetFrom,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum OffsetFrom {
    /// The user said so.
    Argument,
    /// The guest's system calls enter at a symbol of the file.
    SystemCallEntry,
    /// Nothing tells: the kernel is taken to lie where the file says.
    Assumed,
}

/// A symbol, or a block of code that has none.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Top {
    /// The symbol, of the kernel's code.
    #[serde(skip_serializing_if = "Option::is_none")]
    symbol: Option<String>,
    /// Where its beginning is in the guest.
    #[serde(with = "dunlin_api::profile::hexadecimal")]
    address: u64,
    /// Its block that was found most, by its distance from the beginning.
    hottest_offset: u64,
    user: bool,
    samples: u64,
    /// Of all samples of processors at work, from 0 to 1.
    share: f64,
    /// Of these samples, those in translated code.
    translated: u64,
}

/// Takes a profile and shows it.
pub(super) async fn profile(
    name: &VmName,
    args: ProfileArgs,
    printer: &Printer,
) -> Result<(), CliError> {
    let request = request(&args)?;
    // Before anybody waits for the rest.
    let mut symbols = args.symbols.as_deref().map(Symbols::read).transpose()?;
    let client = Client::new(name);
    let mut report: ProfileReport = client.post(route::PROFILE, &request).await?;
    let first = only(&mut report, args.vcpu, name)?;
    let used = symbols.as_mut().zip(args.symbols.as_deref());
    let used = used.map(|(symbols, file)| {
        let (offset, offset_from) = offset(symbols, &report, args.symbol_offset);
        symbols.set_offset(offset);
        SymbolsUsed {
            file: file.display().to_string(),
            count: symbols.len(),
            offset: format!("{offset:#x}"),
            offset_from,
        }
    });
    let mut top = top(&report, symbols.as_ref());
    if let Some(path) = &args.svg {
        let drawn = draw(name, &report, &top);
        std::fs::write(path, drawn).map_err(CliError::host(format!(
            "write the chart \"{}\"",
            path.display()
        )))?;
    }
    let most = if printer.is_json() { usize::MAX } else { TOP };
    top.truncate(args.top.unwrap_or(most));
    let profiled = Profiled {
        name,
        report: &report,
        symbols: used,
        top,
    };
    printer.result(&profiled, || describe(&profiled, first));
    Ok(())
}

fn request(args: &ProfileArgs) -> Result<ProfileRequest, CliError> {
    let duration_ms = u64::try_from(args.time.as_millis()).unwrap_or(u64::MAX);
    if !(1..=MAX_DURATION_MS).contains(&duration_ms) {
        return Err(CliError::Argument(format!(
            "--for: a profile takes 1 ms to {} s",
            MAX_DURATION_MS / 1000
        )));
    }
    if !(1..=MAX_RATE).contains(&args.rate) {
        return Err(CliError::Argument(format!(
            "--rate: 1 to {MAX_RATE} samples a second can be taken, not {}",
            args.rate
        )));
    }
    Ok(ProfileRequest {
        duration_ms,
        rate_hz: args.rate,
    })
}

/// Leaves the processor that was asked for; the number of the first that is left.
fn only(report: &mut ProfileReport, vcpu: Option<usize>, name: &VmName) -> Result<usize, CliError> {
    let Some(vcpu) = vcpu else { return Ok(0) };
    if vcpu >= report.cpus.len() {
        return Err(CliError::Argument(format!(
            "--vcpu: VM \"{name}\" has no processor {vcpu}, but 0 to {}",
            report.cpus.len().saturating_sub(1)
        )));
    }
    report.cpus = vec![report.cpus.swap_remove(vcpu)];
    Ok(vcpu)
}

fn offset(symbols: &Symbols, report: &ProfileReport, given: Option<u64>) -> (u64, OffsetFrom) {
    if let Some(offset) = given {
        return (offset, OffsetFrom::Argument);
    }
    let entries = all_samples(report).map(|samples| samples.system_call_entry);
    let found = entries
        .filter_map(|entry| symbols.offset_by_entry(entry))
        .next();
    found.map_or((0, OffsetFrom::Assumed), |offset| {
        (offset, OffsetFrom::SystemCallEntry)
    })
}

fn all_samples(report: &ProfileReport) -> impl Iterator<Item = &CpuSamples> {
    report.cpus.iter().filter_map(|cpu| cpu.samples.as_ref())
}

fn of_kind(samples: &CpuSamples, kind: TimeKind) -> u64 {
    let kinds = samples.kinds.iter();
    kinds
        .filter(|of| of.kind == kind)
        .map(|of| of.samples)
        .sum()
}

fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// Samples of all processors while at work.
fn busy(report: &ProfileReport) -> u64 {
    let kinds = || TimeKind::ALL.into_iter().filter(|kind| kind.is_busy());
    all_samples(report)
        .map(|samples| kinds().map(|kind| of_kind(samples, kind)).sum::<u64>())
        .sum()
}

/// A symbol, or a block that has none, and its samples so far.
#[derive(Default)]
struct Gathered {
    samples: u64,
    translated: u64,
    /// Samples by distance from its beginning.
    offsets: HashMap<u64, u64>,
}

/// Where the guest was found at work, most first.
fn top(report: &ProfileReport, symbols: Option<&Symbols>) -> Vec<Top> {
    let busy = busy(report);
    let mut found: HashMap<(Option<&str>, u64, bool), Gathered> = HashMap::new();
    let places = all_samples(report).flat_map(|samples| &samples.places);
    for place in places.filter(|place| place.kind.is_busy()) {
        let symbols = symbols.filter(|_| !place.user);
        let symbol = symbols.and_then(|symbols| symbols.find(place.address));
        let (name, offset) = symbol.map_or((None, 0), |(name, offset)| (Some(name), offset));
        let key = (name, place.address - offset, place.user);
        let gathered = found.entry(key).or_default();
        gathered.samples += place.samples;
        if place.kind == TimeKind::Translated {
            gathered.translated += place.samples;
        }
        *gathered.offsets.entry(offset).or_default() += place.samples;
    }
    let mut top: Vec<Top> = found
        .into_iter()
        .map(|((symbol, address, user), gathered)| {
            let offsets = gathered.offsets.into_iter();
            let hottest = offsets.max_by_key(|&(offset, samples)| (samples, u64::MAX - offset));
            Top {
                symbol: symbol.map(str::to_owned),
                address,
                hottest_offset: hottest.map_or(0, |(offset, _)| offset),
                user,
                samples: gathered.samples,
                share: share(gathered.samples, busy),
                translated: gathered.translated,
            }
        })
        .collect();
    top.sort_by_key(|top| (u64::MAX - top.samples, top.address, top.user));
    top
}

impl Top {
    fn describe(&self) -> String {
        match &self.symbol {
            Some(symbol) => symbol.clone(),
            None => format!("{:#x}", self.address),
        }
    }

    fn mode(&self) -> &'static str {
        if self.user { "user" } else { "kernel" }
    }
}

fn headline(name: &VmName, report: &ProfileReport) -> String {
    format!(
        "{name}: profile of {}, engine {}, {} samples a second",
        display_milliseconds(report.duration_ms as u64),
        report.engine,
        report.rate_hz
    )
}

fn draw(name: &VmName, report: &ProfileReport, top: &[Top]) -> String {
    let all: u64 = all_samples(report).map(|samples| samples.total).sum();
    let kinds = TimeKind::ALL.map(|kind| {
        let samples = all_samples(report).map(|samples| of_kind(samples, kind));
        let samples: u64 = samples.sum();
        Row {
            name: kind.describe().into(),
            share: share(samples, all),
            hint: format!("{}: {samples} of {all} samples", kind.describe()),
        }
    });
    let places = top.iter().take(DRAWN).map(|top| Row {
        name: top.describe(),
        share: top.share,
        hint: format!(
            "{} ({}): {} samples",
            top.describe(),
            top.mode(),
            top.samples
        ),
    });
    let places: Vec<Row> = places.collect();
    chart::profile(&headline(name, report), &kinds, &places)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn describe(profiled: &Profiled<'_>, first: usize) -> String {
    let report = profiled.report;
    let mut text = format!("{}\n", headline(profiled.name, report));
    if let Some(why) = &report.without_samples {
        text.push_str(&format!("{why}\n"));
    } else {
        text.push_str(&describe_kinds(report, first));
        if let Some(used) = &profiled.symbols {
            text.push_str(&describe_symbols(used));
        }
        text.push_str(&describe_top(&profiled.top));
        text.push_str(&describe_counts(report));
    }
    text.push_str(&describe_exits(&report.cpus));
    text
}

fn describe_kinds(report: &ProfileReport, first: usize) -> String {
    let cpus: Vec<&CpuSamples> = all_samples(report).collect();
    let all: u64 = cpus.iter().map(|samples| samples.total).sum();
    let mut header = vec!["TIME".to_owned(), "ALL".to_owned()];
    if cpus.len() > 1 {
        header.extend((0..cpus.len()).map(|cpu| format!("CPU {}", first + cpu)));
    }
    let mut rows = vec![header];
    for kind in TimeKind::ALL {
        let samples = || cpus.iter().map(|samples| of_kind(samples, kind));
        let mut row = vec![
            kind.describe().to_owned(),
            percent(share(samples().sum(), all)),
        ];
        if cpus.len() > 1 {
            let shares = samples().zip(&cpus);
            row.extend(shares.map(|(part, of)| percent(share(part, of.total))));
        }
        rows.push(row);
    }
    let lost: u64 = cpus.iter().map(|samples| samples.lost).sum();
    let lost = match lost {
        0 => String::new(),
        lost => format!(", {lost} lost"),
    };
    format!("\n{}{all} samples{lost}\n", table(&rows))
}

fn describe_symbols(used: &SymbolsUsed) -> String {
    let how = match used.offset_from {
        OffsetFrom::Argument => "as was said",
        OffsetFrom::SystemCallEntry => "by where system calls enter",
        OffsetFrom::Assumed => "assumed: nothing tells where the kernel lies",
    };
    format!(
        "\nsymbols: {} of {}, moved by {} ({how})\n",
        used.count, used.file, used.offset
    )
}

fn describe_top(top: &[Top]) -> String {
    if top.is_empty() {
        return "\nno code of the guest was found running\n".into();
    }
    let mut rows = vec![["CODE", "SHARE", "SAMPLES", "MODE", "HOTTEST BLOCK"].map(str::to_owned)];
    rows.extend(top.iter().map(|top| {
        [
            top.describe(),
            percent(top.share),
            top.samples.to_string(),
            top.mode().to_owned(),
            format!("{:#x}", top.address.wrapping_add(top.hottest_offset)),
        ]
    }));
    format!("\n{}", rows_of(rows))
}

fn rows_of<const N: usize>(rows: Vec<[String; N]>) -> String {
    let rows: Vec<Vec<String>> = rows.into_iter().map(Vec::from).collect();
    table(&rows)
}

fn describe_counts(report: &ProfileReport) -> String {
    let seconds = (report.duration_ms / 1e3).max(1e-3);
    let sum = |pick: fn(&ProcessorCounters) -> u64| -> u64 {
        all_samples(report).map(|of| pick(&of.counters)).sum()
    };
    let vectors = |wanted: fn(u8) -> bool| -> u64 {
        let all = all_samples(report).flat_map(|samples| &samples.vectors);
        all.filter(|of| wanted(of.vector)).map(|of| of.count).sum()
    };
    let counted = [
        ("TLB fills", sum(|of| of.tlb_fills)),
        ("TLB flushes", sum(|of| of.tlb_flushes)),
        ("page flushes", sum(|of| of.page_flushes)),
        ("page faults", vectors(|vector| vector == 14)),
        (
            "other exceptions",
            vectors(|vector| vector < 32 && vector != 14),
        ),
        ("interrupts", vectors(|vector| vector >= 32)),
        ("MSR reads", sum(|of| of.msr_reads)),
        ("MSR writes", sum(|of| of.msr_writes)),
        ("blocks decoded", sum(|of| of.decoded_blocks)),
        ("blocks translated", sum(|of| of.translated_blocks)),
        ("code cache flushes", sum(|of| of.code_flushes)),
    ];
    let mut rows = vec![["COUNTED", "TIMES", "A SECOND"].map(str::to_owned)];
    rows.extend(counted.map(|(name, count)| {
        let rate = format!("{:.0}", count as f64 / seconds);
        [name.to_owned(), count.to_string(), rate]
    }));
    let size = dunlin_api::size::display_size(sum(|of| of.code_bytes));
    format!("\n{}translated code: {size}\n", rows_of(rows))
}

fn describe_exits(cpus: &[CpuProfile]) -> String {
    let mut devices: HashMap<&str, DeviceTime> = HashMap::new();
    for device in cpus.iter().flat_map(|cpu| &cpu.devices) {
        let sum = devices.entry(&device.device).or_insert_with(|| DeviceTime {
            device: device.device.clone(),
            reads: 0,
            writes: 0,
            nanoseconds: 0,
        });
        sum.reads += device.reads;
        sum.writes += device.writes;
        sum.nanoseconds += device.nanoseconds;
    }
    let mut devices: Vec<_> = devices.into_values().collect();
    devices.sort_by(|a, b| (b.nanoseconds, &a.device).cmp(&(a.nanoseconds, &b.device)));
    let sum = |pick: fn(&CpuProfile) -> u64| cpus.iter().map(pick).sum::<u64>();
    let mut text = format!(
        "\nexits: {} halts, {} kicks, {} ends of interrupt\n",
        sum(|cpu| cpu.exits.halts),
        sum(|cpu| cpu.exits.kicks),
        sum(|cpu| cpu.exits.end_of_interrupts)
    );
    if devices.is_empty() {
        text.push_str("no device was used\n");
        return text;
    }
    let mut rows = vec![["DEVICE", "READS", "WRITES", "TIME"].map(str::to_owned)];
    rows.extend(devices.into_iter().map(|device| {
        [
            device.device,
            device.reads.to_string(),
            device.writes.to_string(),
            format!("{:.2} ms", device.nanoseconds as f64 / 1e6),
        ]
    }));
    text.push_str(&format!("\n{}", rows_of(rows)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_api::profile::{KindSamples, PlaceSamples};
    use dunlin_api::status::ExitCounts;

    fn place(address: u64, user: bool, kind: TimeKind, samples: u64) -> PlaceSamples {
        PlaceSamples {
            address,
            user,
            kind,
            samples,
        }
    }

    fn report() -> ProfileReport {
        let kinds = TimeKind::ALL.map(|kind| KindSamples {
            kind,
            samples: match kind {
                TimeKind::Translated => 60,
                TimeKind::TlbFill => 20,
                TimeKind::Halted => 20,
                _ => 0,
            },
        });
        let cpu = CpuProfile {
            exits: ExitCounts {
                halts: 4,
                ..ExitCounts::default()
            },
            devices: vec![DeviceTime {
                device: "serial".into(),
                reads: 3,
                writes: 5,
                nanoseconds: 1_500_000,
            }],
            samples: Some(CpuSamples {
                total: 100,
                lost: 0,
                kinds: kinds.to_vec(),
                counters: ProcessorCounters::default(),
                vectors: Vec::new(),
                system_call_entry: 0x2000,
                places: vec![
                    place(0x1010, false, TimeKind::Translated, 30),
                    place(0x1000, false, TimeKind::TlbFill, 20),
                    place(0x1010, true, TimeKind::Translated, 30),
                    place(0x1100, false, TimeKind::Halted, 20),
                ],
                elsewhere: 0,
            }),
        };
        ProfileReport {
            version: 1,
            engine: "soft".into(),
            duration_ms: 1000.0,
            rate_hz: 100,
            without_samples: None,
            cpus: vec![cpu.clone(), cpu],
        }
    }

    fn symbols() -> Symbols {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("System.map");
        std::fs::write(&path, "1000 T hot\n1100 T idle\n").unwrap();
        Symbols::read(&path).unwrap()
    }

    #[test]
    fn samples_of_a_symbol_are_one_row_and_users_are_apart() {
        let symbols = symbols();
        let top = top(&report(), Some(&symbols));
        assert_eq!(top.len(), 2, "{top:?}");
        let (hot, user) = (&top[0], &top[1]);
        assert_eq!(hot.symbol.as_deref(), Some("hot"));
        assert_eq!((hot.samples, hot.hottest_offset), (100, 0x10));
        assert_eq!((hot.translated, hot.address), (60, 0x1000));
        assert_eq!((user.symbol.as_deref(), user.user), (None, true));
        assert_eq!((user.samples, user.address), (60, 0x1010));
        let shares: f64 = top.iter().map(|top| top.share).sum();
        assert!((shares - 1.0).abs() < 1e-9, "{shares}");
    }

    #[test]
    fn without_symbols_each_block_is_a_row() {
        let top = top(&report(), None);
        let found: Vec<_> = top.iter().map(|top| (top.address, top.samples)).collect();
        assert_eq!(found, [(0x1010, 60), (0x1010, 60), (0x1000, 40)]);
    }

    #[test]
    fn a_table_says_shares_of_all_and_of_each_processor() {
        let report = report();
        let name = "a".parse().unwrap();
        let profiled = Profiled {
            name: &name,
            report: &report,
            symbols: None,
            top: top(&report, None),
        };
        let text = describe(&profiled, 0);
        let line = |start: &str| {
            let line = text.lines().find(|line| line.starts_with(start));
            line.unwrap_or_else(|| panic!("{start}: {text}")).to_owned()
        };
        assert_eq!(line("translated code").matches("60.0 %").count(), 3);
        assert!(line("exits: 8 halts").contains("0 kicks"));
        assert!(line("serial").contains("3.00 ms"));
        assert!(!text.contains("lost"));
    }

    #[test]
    fn one_processor_can_be_asked_for_and_one_that_is_none_cannot() {
        let name = "a".parse().unwrap();
        let mut one = report();
        assert_eq!(only(&mut one, Some(1), &name).unwrap(), 1);
        assert_eq!(one.cpus.len(), 1);
        let error = only(&mut report(), Some(2), &name).unwrap_err();
        assert!(error.message().contains("0 to 1"), "{}", error.message());
    }

    #[test]
    fn a_file_that_knows_no_entry_of_system_calls_is_taken_as_it_is() {
        let symbols = symbols();
        assert_eq!(offset(&symbols, &report(), None), (0, OffsetFrom::Assumed));
        let given = offset(&symbols, &report(), Some(0x1000));
        assert_eq!(given, (0x1000, OffsetFrom::Argument));
    }
}
