//! `baremetal FILE` writes the program to a file.

use std::process::ExitCode;

#[cfg(target_arch = "x86_64")]
fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: baremetal FILE");
        return ExitCode::FAILURE;
    };
    if let Err(error) = std::fs::write(&path, dunlin_guest_baremetal::elf()) {
        eprintln!("failed to write {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

#[cfg(not(target_arch = "x86_64"))]
fn main() -> ExitCode {
    eprintln!("the program is made by the assembler of an x86-64 host");
    ExitCode::FAILURE
}
