//! Dunlin's development tasks. `cargo xtask demo` shows the main job, `cargo xtask test` runs all
//! tests after installing what they need; the rest is for those who change the code.

mod bench;
mod checks;
mod cpio;
mod debian;
mod demo;
mod deps;
mod fuzz;
mod guest;
mod packages;
mod portable;
mod soak;
mod test;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Dunlin's development tasks")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boots a stock guest, moves it live between two hosts and back, and reports what it cost
    Demo(demo::DemoArguments),
    /// Runs the tests, after installing what they need; a name selects those of one area
    Test(test::TestArguments),
    /// Runs what CI runs: fmt, clippy, deny, deps, docs, then all tests
    Ci,
    /// Checks that dependencies between our crates point downward only
    Deps,
    /// Measures, beside a peer in the same run
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Feeds random input to what guests, peers and files reach, for a bounded time
    Fuzz(fuzz::FuzzArguments),
    /// Breaks moves of guests at random places, and counts what became of the guests
    #[command(subcommand)]
    Soak(soak::Soak),
    /// Makes the test guest (kernel and initramfs), or a whole Debian, and prints the command that
    /// runs it
    Guest(guest::GuestArguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Ci => checks::run(),
        Task::Deps => deps::run(),
        Task::Bench(bench) => bench::run(&bench),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Soak(soak) => soak::run(&soak),
        Task::Guest(arguments) => guest::run(&arguments),
    }
}
