//! Stock guests with several processors on a host that may have fewer: all come online and compute
//! the same, and the guest is whole after moves and after a rest in a file.
#![expect(
    clippy::unwrap_used,
    reason = "a test may stop at what it cannot do without"
)]

use std::collections::BTreeSet;
use std::time::Duration;

use dunlin_testbed::client::Connection;
use dunlin_testbed::guest;
use dunlin_testbed::hosts::{self, Forward, Host, Testbed, VmSpec};
use dunlin_testbed::process;

const VM: &str = "several";
const LIMIT: Duration = Duration::from_secs(300);
/// Work of one processor, whose result is the same each time, over and over; results by line.
const WORK: &str = "while :; do head -c 4000000 /dev/zero | sha256sum; done";

struct Bed {
    _folder: tempfile::TempDir,
    hosts: [Host; 2],
    guest: Connection,
    saved: std::path::PathBuf,
}

fn boot(series: &str, cpus: u32) -> Option<Bed> {
    let (binary, guest) = (guest::binary()?, guest::stock(series)?);
    let folder = tempfile::tempdir().unwrap();
    let testbed = Testbed::new(&binary, &folder.path().join("bed")).unwrap();
    let forward = Forward::to_guest(7).unwrap();
    let (mut first, second) = testbed.two_hosts(&[forward], Vec::new()).unwrap();
    first
        .run(&VmSpec {
            name: VM.to_owned(),
            kernel: guest.elf,
            initramfs: Some(guest.initramfs),
            cmdline: "console=ttyS0 quiet dunlin.init=agent dunlin.load=16,20".to_owned(),
            memory: "256M".to_owned(),
            cpus,
            engine: "soft".to_owned(),
            disks: Vec::new(),
        })
        .unwrap();
    let address = hosts::outside(&first, forward.outside);
    let mut inside = None;
    process::wait_until("an answer of the guest", LIMIT, || {
        inside = Connection::probe(address).ok();
        Ok(inside.is_some())
    })
    .unwrap_or_else(|error| {
        let text = std::fs::read(first.log(VM)).unwrap_or_default();
        panic!("{error}:\n{}", String::from_utf8_lossy(&text));
    });
    let mut bed = Bed {
        saved: folder.path().join("saved"),
        _folder: folder,
        hosts: [first, second],
        guest: inside.unwrap(),
    };
    assert_eq!(
        bed.run("cat /sys/devices/system/cpu/online").trim(),
        format!("0-{}", cpus - 1)
    );
    for cpu in 0..cpus {
        let command = format!("taskset -p {:x} $$; {WORK}", 1 << cpu);
        bed.run(&format!("({command}) </dev/null >/tmp/{cpu} 2>&1 &"));
    }
    Some(bed)
}

impl Bed {
    fn run(&mut self, command: &str) -> String {
        let (status, output) = self.guest.run(command).unwrap();
        assert_eq!(status, 0, "{command}: {output}");
        output
    }

    /// How many results each processor has.
    fn results(&mut self, cpus: u32) -> Vec<usize> {
        (0..cpus)
            .map(|cpu| {
                let count = self.run(&format!("grep -c -- - /tmp/{cpu} || true"));
                count.trim().parse().unwrap()
            })
            .collect()
    }

    /// Waits until every processor has done more than now.
    fn all_go_on(&mut self, cpus: u32) {
        let before = self.results(cpus);
        process::wait_until("a result of every processor", LIMIT, || {
            let now = self.results(cpus);
            Ok(now.iter().zip(&before).all(|(now, before)| now > before))
        })
        .unwrap();
    }

    /// All results are one, nobody lost memory, and the kernel saw nobody hang.
    fn is_whole(&mut self) {
        let results = self.run("grep -h -- '  -' /tmp/[0-9]");
        let different: BTreeSet<_> = results.lines().collect();
        assert_eq!(different.len(), 1, "{different:?}");
        assert_eq!(self.guest.stats().unwrap().memory_errors, 0);
        let trouble = self.run("dmesg | grep -iE 'lockup|rcu.*stall|BUG:|TSC warp' || true");
        assert_eq!(trouble, "");
    }

    fn moves(&mut self, from: usize, to: usize) {
        let target = self.hosts[to].receive(VM).unwrap();
        let command = ["migrate", VM, "--to", &target, "--verify"];
        let report = self.hosts[from].query(&command).unwrap();
        assert_eq!(report["outcome"], "moved", "{report}");
        assert_eq!(report["verified"], true, "{report}");
    }
}

#[test]
fn a_guest_with_four_processors_is_whole_after_pause_move_save_and_restore() {
    const CPUS: u32 = 4;
    let Some(mut bed) = boot("6.1", CPUS) else {
        return;
    };
    bed.all_go_on(CPUS);
    bed.hosts[0].query(&["pause", VM]).unwrap();
    bed.hosts[0].query(&["resume", VM]).unwrap();
    bed.moves(0, 1);
    bed.all_go_on(CPUS);
    let file = bed.saved.to_string_lossy().into_owned();
    let command = ["save", VM, "--to", &file, "--stop"];
    bed.hosts[1].query(&command).unwrap();
    bed.hosts[1].restore(VM, &bed.saved).unwrap();
    bed.all_go_on(CPUS);
    bed.moves(1, 0);
    bed.all_go_on(CPUS);
    bed.is_whole();
}

#[test]
fn eight_processors_on_6_12_compute_the_same() {
    const CPUS: u32 = 8;
    let Some(mut bed) = boot("6.12", CPUS) else {
        return;
    };
    bed.all_go_on(CPUS);
    bed.is_whole();
}
