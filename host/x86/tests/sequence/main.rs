//! The proof of the software CPU, third part: programs of random instructions with branches, loops, calls
//! and stores, on the interpreter, in translated code and on the host's processor, end with the same
//! registers, memory, defined flags and exceptions.
//!
//! Translated code runs several times over without anything being flushed in between, so that it finds
//! its operands in the software TLB. Environment variables:
//!
//! * `DUNLIN_SEQUENCE_COUNT`: programs, 600 unless set;
//! * `DUNLIN_SEQUENCE_SEED`: the first one's seed, fixed unless set;
//! * `DUNLIN_SEQUENCE_LIST`: tells each program.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[expect(dead_code, reason = "the test of forms uses the rest")]
#[path = "../differential/compare.rs"]
mod compare;
#[expect(dead_code, reason = "the test of forms uses the rest")]
#[path = "../differential/forms.rs"]
mod forms;
#[expect(dead_code, reason = "the test of forms uses the rest")]
#[path = "../differential/layout.rs"]
mod layout;
#[path = "../differential/native.rs"]
mod native;
#[path = "../differential/random.rs"]
mod random;
#[expect(dead_code, reason = "the test of forms uses the rest")]
#[path = "../differential/software.rs"]
mod software;
#[path = "../differential/vendors.rs"]
mod vendors;

mod bench;
mod catalog;
mod generator;
mod operands;
mod program;
mod steps;

use bench::{Bench, listing};
use generator::{MOST_STEPS, sequence};
use random::Random;

const SEED: u64 = 0x5e0_0001;

fn variable(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(value) => value.parse().expect("a decimal number"),
        Err(_) => default,
    }
}

#[test]
#[ignore = "not yet compared with AMD's processors; `cargo test -p dunlin-x86 --test sequence -- --ignored`"]
fn programs_do_what_they_do_on_the_host() {
    for feature in ["avx2", "fma", "bmi2", "f16c"] {
        let has = match feature {
            "avx2" => is_x86_feature_detected!("avx2"),
            "fma" => is_x86_feature_detected!("fma"),
            "bmi2" => is_x86_feature_detected!("bmi2"),
            _ => is_x86_feature_detected!("f16c"),
        };
        if !has {
            eprintln!("SKIP: instructions of {feature}: the host's processor lacks it");
        }
    }
    let first = variable("DUNLIN_SEQUENCE_SEED", SEED);
    let count = variable("DUNLIN_SEQUENCE_COUNT", 600);
    let list = std::env::var_os("DUNLIN_SEQUENCE_LIST").is_some();
    let mut bench = Bench::new();
    let mut failed = Vec::new();
    for seed in first..first + count {
        let mut random = Random::new(seed);
        let length = 1 + random.below(MOST_STEPS as u64) as usize;
        let steps: Vec<u32> = (0..length).map(|_| random.next() as u32).collect();
        let sequence = sequence(random.next(), &steps);
        if list {
            eprintln!("program {seed}:\n{}", listing(&sequence));
        }
        if let Some(difference) = bench.compare(&sequence, random.next()) {
            eprintln!("program {seed}: {difference}\n{}", listing(&sequence));
            failed.push(seed);
            bench.renew();
        }
    }
    assert!(
        failed.is_empty(),
        "{} of {count} programs differ: {failed:?}",
        failed.len()
    );
}
