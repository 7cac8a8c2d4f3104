//! `migbench FILE` writes the guest to a file.

use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: migbench FILE");
        return ExitCode::FAILURE;
    };
    if let Err(error) = std::fs::write(&path, dunlin_guest_migbench::elf()) {
        eprintln!("failed to write {}: {error}", path.display());
        return ExitCode::FAILURE;
    }
    println!("{}", dunlin_guest_migbench::Parameters::default());
    ExitCode::SUCCESS
}
