//! Time from starting the program to init in a stock kernel: Dunlin's software CPU beside
//! `qemu-system-x86_64 -accel tcg` with the same kernel, initramfs, memory and PVH direct boot.

use std::process::Command;
use std::time::Duration;

use super::session::{Session, dunlin, qemu};
use super::{BenchArguments, Row, print};
use crate::guest;
use crate::packages::{self, Series};
use dunlin_testbed::process;

pub(super) const CMDLINE: &str = "console=ttyS0 quiet dunlin.init=poweroff";
/// What the initramfs prints first.
pub(super) const MARKER: &str = "dunlin-init: reached";
/// A boot that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// One boot: time to init, and whether the program ended well by itself after power-off.
struct Boot {
    to_init: Duration,
    clean: bool,
}

pub(super) fn run(arguments: &BenchArguments) -> anyhow::Result<()> {
    process::catch_interrupts();
    let missing = packages::install(&[("qemu-system-x86", "qemu-system-x86_64")]);
    let binary = super::build()?;
    let mut rows = Vec::new();
    for series in Series::ALL {
        let suffix = series.name().replace('.', "_");
        let guest = match guest::build(series) {
            Ok(guest) => guest,
            Err(error) => {
                rows.push(Row::missing(
                    &format!("boot_{suffix}_ok"),
                    "boolean",
                    format!("{error:#}"),
                ));
                continue;
            }
        };
        let mut ours = Vec::new();
        let mut peer = Vec::new();
        for _ in 0..arguments.runs {
            ours.push(boot(&mut dunlin(&binary, &guest, 1, CMDLINE))?);
            if missing.is_empty() {
                peer.push(boot(&mut qemu(&guest, 1, CMDLINE))?);
            }
        }
        rows.extend(evaluate(series, &suffix, &ours, &peer));
    }
    print("boot", &rows, arguments.json)
}

fn evaluate(
    series: Series,
    suffix: &str,
    ours: &[Option<Boot>],
    peer: &[Option<Boot>],
) -> Vec<Row> {
    let seconds = |boots: &[Option<Boot>]| -> Vec<f64> {
        boots
            .iter()
            .flatten()
            .map(|boot| boot.to_init.as_secs_f64())
            .collect()
    };
    let clean = ours
        .iter()
        .filter(|boot| boot.as_ref().is_some_and(|boot| boot.clean))
        .count();
    let ok = f64::from(u8::from(clean == ours.len()));
    let name = match series {
        Series::V6_1 => "boot".to_owned(),
        Series::V6_12 => format!("boot_{suffix}"),
    };
    let unit = "time ratio to QEMU TCG";
    let (own_times, peer_times) = (seconds(ours), seconds(peer));
    let ratio = match super::median(&peer_times) {
        Some(peer) => {
            let ratios: Vec<_> = own_times.iter().map(|own| own / peer).collect();
            Row::at_most(&name, unit, 8.0, &ratios)
        }
        None => Row::missing(
            &name,
            unit,
            "qemu-system-x86_64 is not installed".to_owned(),
        ),
    };
    vec![
        Row::exactly(&format!("boot_{suffix}_ok"), "boolean", 1.0, ok, ours.len()),
        ratio,
        Row::information(&format!("boot_{suffix}_dunlin"), "s", &own_times),
        Row::information(&format!("boot_{suffix}_qemu"), "s", &peer_times),
    ]
}

/// Boots once; `None` when init was not reached in time.
fn boot(command: &mut Command) -> anyhow::Result<Option<Boot>> {
    let session = Session::run(command, LIMIT)?;
    Ok(session.said(MARKER).map(|to_init| Boot {
        to_init,
        clean: session.clean,
    }))
}
