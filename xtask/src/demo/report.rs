//! What the demo found: for people as a table, for programs as one JSON object.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use dunlin_testbed::client::{AgentStats, Client};
use serde::Serialize;
use serde_json::Value;

use super::{Watched, shown};

/// One move, as the source, the client and the guest saw it.
#[derive(Debug, Serialize)]
pub(super) struct Move {
    total_ms: f64,
    /// From the pause until the destination's word that the guest runs, as the source saw it.
    blackout_source_ms: f64,
    /// Longest time between two answers to the client.
    blackout_client_ms: f64,
    /// Longest pause of the guest's heartbeat, less its usual one.
    blackout_guest_ms: f64,
    bytes_sent: u64,
    cpu_source_s: f64,
    cpu_destination_s: f64,
    switch_overs_aborted: u64,
    rounds: Vec<Value>,
    svg: PathBuf,
}

/// The whole demo. Sums over the moves where it says nothing else; blackouts are the longest.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    migrations: usize,
    connection_survived: bool,
    counter_gaps: u64,
    memory_errors: u64,
    client_answers: u64,
    guest_heartbeats: u64,
    guest_pages_written: u64,
    boot_to_service_s: f64,
    blackout_client_ms: f64,
    blackout_guest_ms: f64,
    /// The same figures over a span without a move: the machine's own noise.
    pub(super) control_client_ms: f64,
    pub(super) control_guest_ms: f64,
    total_ms: f64,
    rounds: usize,
    bytes_sent: u64,
    ram_bytes: u64,
    sent_over_ram: f64,
    cpu_source_s: f64,
    cpu_destination_s: f64,
    pub(super) moves: Vec<Move>,
}

impl Move {
    pub(super) fn new(outcome: &Value, watched: &Watched, svg: PathBuf) -> anyhow::Result<Self> {
        if outcome["outcome"] != "moved" {
            bail!("the VM did not move: {outcome}");
        }
        let float = |value: &Value, name: &str| {
            value[name]
                .as_f64()
                .with_context(|| format!("the migration report has no {name}: {outcome}"))
        };
        let destination = &outcome["destination"];
        Ok(Self {
            total_ms: float(outcome, "total_ms")?,
            blackout_source_ms: float(outcome, "blackout_ms")?,
            blackout_client_ms: watched.client_ms,
            blackout_guest_ms: watched.guest_ms,
            bytes_sent: float(outcome, "bytes_sent")? as u64,
            cpu_source_s: float(outcome, "cpu_seconds")?,
            cpu_destination_s: float(destination, "cpu_seconds")?,
            switch_overs_aborted: float(outcome, "switch_overs_aborted")? as u64,
            rounds: outcome["rounds"].as_array().cloned().unwrap_or_default(),
            svg,
        })
    }
}

impl Report {
    pub(super) fn new(boot: Duration, ram_bytes: u64) -> Self {
        Self {
            migrations: 0,
            connection_survived: false,
            counter_gaps: 0,
            memory_errors: 0,
            client_answers: 0,
            guest_heartbeats: 0,
            guest_pages_written: 0,
            boot_to_service_s: boot.as_secs_f64(),
            blackout_client_ms: 0.0,
            blackout_guest_ms: 0.0,
            control_client_ms: 0.0,
            control_guest_ms: 0.0,
            total_ms: 0.0,
            rounds: 0,
            bytes_sent: 0,
            ram_bytes,
            sent_over_ram: 0.0,
            cpu_source_s: 0.0,
            cpu_destination_s: 0.0,
            moves: Vec::new(),
        }
    }

    pub(super) fn finish(&mut self, client: &Client, stats: &AgentStats) {
        let longest = |figure: fn(&Move) -> f64| self.moves.iter().map(figure).fold(0.0, f64::max);
        let sum = |figure: fn(&Move) -> f64| self.moves.iter().map(figure).sum::<f64>();
        self.migrations = self.moves.len();
        self.connection_survived = client.error().is_none();
        self.counter_gaps = client.gaps_in_counter();
        self.client_answers = client.answers();
        self.memory_errors = stats.memory_errors;
        self.guest_heartbeats = stats.beats;
        self.guest_pages_written = stats.pages_written;
        self.blackout_client_ms = longest(|one| one.blackout_client_ms);
        self.blackout_guest_ms = longest(|one| one.blackout_guest_ms);
        self.total_ms = sum(|one| one.total_ms);
        self.cpu_source_s = sum(|one| one.cpu_source_s);
        self.cpu_destination_s = sum(|one| one.cpu_destination_s);
        self.rounds = self.moves.iter().map(|one| one.rounds.len()).sum();
        self.bytes_sent = self.moves.iter().map(|one| one.bytes_sent).sum();
        let all_ram = self.ram_bytes as f64 * self.moves.len().max(1) as f64;
        self.sent_over_ram = self.bytes_sent as f64 / all_ram;
    }

    pub(super) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    pub(super) fn write(&self, path: &Path) -> anyhow::Result<()> {
        std::fs::write(path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("failed to write {}", path.display()))
    }

    /// An error when a promise was broken.
    pub(super) fn verdict(&self) -> anyhow::Result<()> {
        if !self.connection_survived {
            bail!("the TCP connection did not survive");
        }
        if self.counter_gaps > 0 {
            bail!(
                "the counter skipped or repeated {} times",
                self.counter_gaps
            );
        }
        if self.memory_errors > 0 {
            bail!(
                "{} pages of the guest lost their content",
                self.memory_errors
            );
        }
        Ok(())
    }

    pub(super) fn print(&self) {
        println!(
            "boot to an answering service: {:.1} s",
            self.boot_to_service_s
        );
        println!(
            "without a move: longest pause {:.1} ms for the client, {:.1} ms for the guest",
            self.control_client_ms, self.control_guest_ms
        );
        for (index, one) in self.moves.iter().enumerate() {
            println!(
                "\nmove {}: {:.0} ms in all, blackout {:.1} ms (client) {:.1} ms (guest) {:.1} ms (source)",
                index + 1,
                one.total_ms,
                one.blackout_client_ms,
                one.blackout_guest_ms,
                one.blackout_source_ms
            );
            println!(
                "  {:>5} {:>9} {:>9} {:>10} {:>9} {:>12} {:>11}",
                "round", "pages", "zero", "MiB", "ms", "MiB/s", "dirtied"
            );
            for round in &one.rounds {
                let figure = |name: &str| round[name].as_f64().unwrap_or(f64::NAN);
                println!(
                    "  {:>5} {:>9} {:>9} {:>10.1} {:>9.1} {:>12.0} {:>11}",
                    figure("round"),
                    figure("pages"),
                    figure("zero_pages"),
                    figure("bytes") / 1048576.0,
                    figure("duration_ms"),
                    figure("goodput") / 1048576.0,
                    figure("dirtied_pages"),
                );
            }
            println!(
                "  sent {:.1} MiB = {:.2} x RAM, CPU {:.2} s (source) {:.2} s (destination), chart: {}",
                one.bytes_sent as f64 / 1048576.0,
                one.bytes_sent as f64 / self.ram_bytes as f64,
                one.cpu_source_s,
                one.cpu_destination_s,
                shown(&one.svg).display()
            );
        }
        println!(
            "\n{} moves; connection survived: {}; counter gaps: {} in {} answers; pages damaged: {} of {} writes",
            self.migrations,
            self.connection_survived,
            self.counter_gaps,
            self.client_answers,
            self.memory_errors,
            self.guest_pages_written
        );
    }
}
