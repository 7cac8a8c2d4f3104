//! A guest that writes twice as fast as its pages can travel: it must arrive all the same.

use std::time::Duration;

use anyhow::{Context, bail};
use dunlin_guest_migbench::Parameters;

use super::Bench;
use crate::bench::Row;
use dunlin_testbed::mover::Mover;

const MEBIBYTES: u64 = 512;
/// For `--bandwidth`, and the guest writes twice as much.
const BANDWIDTH: &str = "100M";
/// How long the guest's rate is measured without a move.
const BEFORE: Duration = Duration::from_secs(2);

pub(super) fn above_bandwidth(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let parameters = Parameters {
        working_set_mebibytes: 128,
        rate_mebibytes: 200,
        ..Parameters::default()
    };
    let mut mover = Mover::start(&bench.setup("above", MEBIBYTES, parameters))?;
    let (mut gaps, mut slowdowns, mut faults) = (Vec::new(), Vec::new(), Vec::new());
    let (mut totals, mut blackouts, mut behind) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.runs(30, 3) {
        mover.listen_for(BEFORE)?;
        let now = mover.recorder().now();
        let before = mover.write_rate(now.saturating_sub(BEFORE), now)?;
        let hop = mover.hop(&["--bandwidth", BANDWIDTH, "--mode", "auto"], &[])?;
        let during = mover.write_rate(hop.span.0, hop.span.1)?;
        let (before, during) = before.zip(during).context("the guest tells its writes")?;
        let slowdown = (1.0 - during / before) * 100.0;
        let post = &hop.report["post_copy"];
        if post.is_null() {
            bail!(
                "the move ended without post-copy ({}), with {slowdown:.0} % fewer writes and a gap of {:.1} ms",
                hop.report["no_post_copy"],
                hop.worst_gap_ms.unwrap_or(0.0)
            );
        }
        if post["faults"].as_u64() != Some(0) {
            faults.extend(post["fault_p99_us"].as_f64());
        }
        // While memory followed: from the arrival on, as long as the report says.
        let arrived = hop.arrived.context("the guest ticks at the destination")?;
        let followed = post["duration_ms"]
            .as_f64()
            .context("post-copy took time")?;
        let end = arrived + Duration::from_secs_f64(followed / 1e3);
        let following = mover.write_rate(arrived, end)?;
        behind.extend(following.map(|rate| (1.0 - rate / before) * 100.0));
        slowdowns.push(slowdown);
        gaps.extend(hop.worst_gap_ms);
        blackouts.extend(hop.blackout_ms);
        totals.extend(hop.report["total_ms"].as_f64());
    }
    Ok(vec![
        Row::percentile_at_most("above_bw_gap_ms", "ms", (1.0, 50.0), &gaps),
        Row::at_most(
            "above_bw_slowdown_pct",
            "percent of writes",
            30.0,
            &slowdowns,
        ),
        Row::percentile_at_most("fault_p99_us", "us", (1.0, 1000.0), &faults),
        Row::information(
            "above_bw_slowdown_following_pct",
            "percent of writes",
            &behind,
        ),
        Row::information("above_bw_blackout_ms", "ms", &blackouts),
        Row::information("above_bw_total_ms", "ms", &totals),
    ])
}
