//! Post-copy whose connections are cut at a random moment: it must go on over new ones.

use std::net::SocketAddrV4;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use dunlin_guest_migbench::Parameters;
use serde_json::Value;

use super::Bench;
use crate::bench::Row;
use dunlin_testbed::mover::{Mover, NAME};
use dunlin_testbed::proxy::Proxy;

const MEBIBYTES: u64 = 256;
/// Slow enough that memory, of which the guest writes much before it goes, follows for seconds.
const BANDWIDTH: &str = "40M";
/// The cut comes at most this long after it was noticed that the guest has changed hands.
const LATEST_CUT_MS: u64 = 1000;
const SCRUBBED: Duration = Duration::from_secs(60);

pub(super) fn run(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    if !bench.moves_behind_the_guest() {
        bail!("memory cannot follow a guest here, or not yet");
    }
    let parameters = Parameters {
        fill_mebibytes: Some(96),
        working_set_mebibytes: 64,
        rate_mebibytes: 100,
        scrub_pages: 64,
        ..Parameters::default()
    };
    let mut mover = Mover::start(&bench.setup("recoveries", MEBIBYTES, parameters))?;
    let wanted = bench.runs(20, 3);
    let (mut cuts, mut whole, mut worst, mut failure) = (0, 0, Vec::new(), None);
    // A cut that comes when all has followed already is none; there are enough moves for that.
    for number in 0..wanted * 3 {
        if cuts == wanted {
            break;
        }
        match cut_once(&mut mover, number) {
            Ok(None) => {}
            Ok(Some(gap)) => {
                cuts += 1;
                whole += 1;
                worst.push(gap);
            }
            Err(error) => {
                cuts += 1;
                failure.get_or_insert(format!("{error:#}"));
                // The old one first: its hosts lie in the same folder.
                drop(mover);
                mover = Mover::start(&bench.setup("recoveries", MEBIBYTES, parameters))?;
            }
        }
    }
    let (cuts, whole) = (cuts as f64, f64::from(whole));
    let mut row = Row::exactly(
        "recoveries_ok",
        "moves",
        wanted as f64,
        whole,
        cuts as usize,
    );
    row.why = failure;
    Ok(vec![
        row,
        Row::information("recovery_worst_gap_ms", "ms", &worst),
    ])
}

/// Moves the guest and cuts all connections while its memory follows; the guest's longest silence.
/// `None` when the cut came too late.
fn cut_once(mover: &mut Mover, number: u64) -> anyhow::Result<Option<f64>> {
    let target = mover.await_guest(&[])?;
    let target: SocketAddrV4 = target
        .strip_prefix("tcp://")
        .context("the place is at a TCP address")?
        .parse()?;
    let proxy = Proxy::new(target, None, Box::new(|_| {}))?;
    let mut inspect = mover.host().command(&["inspect", NAME, "--json"]);
    // Any numbers that are spread evenly will do.
    let delay = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % LATEST_CUT_MS;
    let over = AtomicBool::new(false);
    let hop = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                if phase(&mut inspect).as_deref() == Some("following") {
                    std::thread::sleep(Duration::from_millis(delay));
                    proxy.cut();
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let target = format!("tcp://{}", proxy.address());
        let slow = ["--mode", "post", "--verify", "--bandwidth", BANDWIDTH];
        let hop = mover.hop_to(&target, &slow);
        over.store(true, Ordering::SeqCst);
        hop
    })?;
    mover.scrubbed(SCRUBBED)?;
    if hop.report["verified"] != true {
        bail!("the memory of both sides was not compared: {}", hop.report);
    }
    let recoveries = hop.report["post_copy"]["recoveries"].as_u64();
    match recoveries {
        None => bail!("the move ended without post-copy"),
        Some(0) => Ok(None),
        Some(_) => Ok(hop.worst_gap_ms),
    }
}

fn phase(inspect: &mut Command) -> Option<String> {
    let output = inspect.output().ok()?;
    let status: Value = serde_json::from_slice(&output.stdout).ok()?;
    Some(status["migration"]["phase"].as_str()?.to_owned())
}
