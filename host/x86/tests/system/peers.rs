//! Processors that are not ours: QEMU's TCG, and KVM by QEMU. They get the same image and begin by a
//! ROM of 64 KiB that enters protected mode.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;

use crate::guest::Peer;
use crate::layout::*;
use crate::run::{End, Outcome, Quirk};

const QEMU: &str = "qemu-system-x86_64";
const ROM_BYTES: usize = 0x1_0000;
/// What a case takes when it hangs.
const PATIENCE: Duration = Duration::from_secs(3);

/// Why `peer` cannot run here.
pub(crate) fn missing(peer: Peer) -> Option<String> {
    let found = Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if let Err(error) = found {
        return Some(format!("no {QEMU}: {error}"));
    }
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    match (peer, kvm) {
        (Peer::Kvm, Err(error)) => Some(format!("no /dev/kvm: {error}")),
        _ => None,
    }
}

/// The folder of a run, with the ROM in it.
pub(crate) struct Bench {
    folder: PathBuf,
}

impl Bench {
    pub(crate) fn new(peer: Peer) -> Self {
        let name = format!("dunlin-system-{peer:?}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("rom"), rom()).unwrap();
        Self { folder }
    }

    pub(crate) fn run(&self, peer: Peer, number: usize, image: &[u8]) -> Outcome {
        let file = |kind: &str| self.folder.join(format!("{number}.{kind}"));
        let (image_file, report_file) = (file("image"), file("report"));
        std::fs::write(&image_file, image).unwrap();
        let end = start(peer, &self.folder.join("rom"), &image_file, &report_file);
        let report = std::fs::read(&report_file).unwrap_or_default();
        std::fs::remove_file(&image_file).unwrap();
        let _absent = std::fs::remove_file(&report_file);
        let quirk = match peer {
            Peer::Tcg => Quirk::ReservedNotPresent,
            Peer::Kvm => Quirk::None,
        };
        Outcome::new(report, end).with(quirk)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _left = std::fs::remove_dir_all(&self.folder);
    }
}

fn start(peer: Peer, rom: &Path, image: &Path, report: &Path) -> End {
    let accelerator = match peer {
        Peer::Tcg => "tcg",
        Peer::Kvm => "kvm",
    };
    let mut child = Command::new(QEMU)
        .args(["-accel", accelerator, "-M", "pc", "-m", "16", "-nodefaults"])
        .args(["-cpu", "qemu64,-de,-vme,-pse36,-smep,-smap,+x2apic"])
        .args(["-display", "none", "-no-reboot", "-bios"])
        .arg(rom)
        .arg("-device")
        .arg(format!(
            "loader,file={},addr={IMAGE:#x},force-raw=on",
            image.display()
        ))
        .arg("-debugcon")
        .arg(format!("file:{}", report.display()))
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return match status.code() {
                Some(0) => End::Shutdown,
                Some(1) => End::Exit,
                other => End::Stuck(format!("{QEMU} ended with {other:?}")),
            };
        }
        if began.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            return End::Stuck("no end".to_owned());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Enters flat 32-bit protected mode and jumps to [`ENTRY`].
fn rom() -> Vec<u8> {
    const TABLE: u64 = 0xff00;
    let mut rom = vec![0xf4; ROM_BYTES];
    let mut a = CodeAssembler::new(16).unwrap();
    a.cli().unwrap();
    // LGDT CS:[TABLE], 32-bit base.
    a.db(&[
        0x66,
        0x2e,
        0x0f,
        0x01,
        0x16,
        TABLE as u8,
        (TABLE >> 8) as u8,
    ])
    .unwrap();
    a.mov(eax, 0x33).unwrap();
    a.mov(cr0, eax).unwrap();
    // JMP 8:ENTRY, 32-bit offset.
    a.db(&[0x66, 0xea]).unwrap();
    a.dd(&[ENTRY as u32]).unwrap();
    a.dw(&[8]).unwrap();
    let code = a.assemble(0xf000).unwrap();
    rom[0xf000..][..code.len()].copy_from_slice(&code);
    // JMP F000:F000 at the reset vector.
    rom[0xfff0..0xfff5].copy_from_slice(&[0xea, 0x00, 0xf0, 0x00, 0xf0]);
    let table = 0x000f_0000 + TABLE as u32 + 8;
    rom[TABLE as usize..][..2].copy_from_slice(&23u16.to_le_bytes());
    rom[TABLE as usize + 2..][..4].copy_from_slice(&table.to_le_bytes());
    for (index, raw) in [0, 0x00cf_9b00_0000_ffffu64, 0x00cf_9300_0000_ffff]
        .into_iter()
        .enumerate()
    {
        rom[TABLE as usize + 8 + index * 8..][..8].copy_from_slice(&raw.to_le_bytes());
    }
    rom
}
