//! The proof of the software CPU, second part: how it behaves as a system. Each case is a small
//! machine with page tables, descriptors and handlers of its own; it runs a few instructions some
//! times over and reports each exception that comes of them. What is expected stands in the
//! manuals, whose section each case names.
//!
//! The same images run on QEMU's TCG and on KVM (by QEMU), which proves the expectations; where
//! those differ from the manual, the case says so. Each case is a machine of its own there, so these
//! two take a minute: `cargo test -p dunlin-x86 --test system -- --ignored`.
//!
//! `DUNLIN_SYSTEM_ONLY`: only cases whose name contains this.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![expect(
    clippy::unwrap_used,
    reason = "a case that cannot be assembled is a fault of the case"
)]

mod guest;
mod layout;
mod legacy;
mod peers;
mod run;
mod software;

mod control;
mod debug;
mod flags;
mod gates;
mod paging;
mod segments;
mod tasks;

use std::num::NonZeroU32;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use dunlin_x86::Translation;

use guest::{Case, Peer};

fn cases() -> Vec<Case> {
    let only = std::env::var("DUNLIN_SYSTEM_ONLY").unwrap_or_default();
    [
        paging::cases(),
        segments::cases(),
        control::cases(),
        gates::cases(),
        debug::cases(),
        flags::cases(),
        tasks::cases(),
    ]
    .into_iter()
    .flatten()
    .filter(|case| case.name.contains(&only))
    .collect()
}

fn check_software(translation: Translation) {
    let cases = cases();
    let wrong: Vec<_> = (cases.iter())
        .filter_map(|case| software::run(&case.image, translation).compare(case))
        .collect();
    assert!(
        wrong.is_empty(),
        "{} of {} cases differ:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

#[test]
fn the_interpreter_behaves_as_the_manuals_say() {
    check_software(Translation::Never);
}

#[test]
fn translated_code_behaves_as_the_manuals_say() {
    check_software(Translation::After(NonZeroU32::MIN));
}

#[test]
fn translated_code_and_the_interpreter_come_to_the_same_end() {
    check_software(Translation::Verified(NonZeroU32::MIN));
}

/// Runs all cases on `peer`; a difference must be known.
fn check_peer(peer: Peer) {
    if let Some(why) = peers::missing(peer) {
        eprintln!("skipped: {why}");
        return;
    }
    let cases = cases();
    let bench = peers::Bench::new(peer);
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((number, case)) = {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    cases.get(number).map(|case| (number, case))
                } {
                    let differs = bench.run(peer, number, &case.image).compare(case);
                    let known = case.differs.iter().find(|(who, _)| *who == peer);
                    if let (Some(how), None) = (differs, known) {
                        wrong.lock().unwrap().push(how);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(
        wrong.is_empty(),
        "{} of {} cases differ on {peer:?}:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

#[test]
#[ignore = "starts a QEMU for each of 866 cases: longer than a run of all tests may take"]
fn tcg_behaves_as_the_manuals_say() {
    check_peer(Peer::Tcg);
}

#[test]
#[ignore = "starts a QEMU for each of 866 cases, and needs a KVM that runs ring 0 natively"]
fn kvm_behaves_as_the_manuals_say() {
    check_peer(Peer::Kvm);
}
