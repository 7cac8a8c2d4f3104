//! Inputs of the fuzz targets that are kept: each once found a fault, or leads far into the code.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]
#![expect(
    unreachable_pub,
    reason = "two modules are those of the fuzz targets, which use them from outside"
)]

#[path = "../../../fuzz/src/saved.rs"]
mod saved;
#[path = "../../../fuzz/src/session.rs"]
mod session;

use std::path::Path;

/// Runs every input that is kept for a target; there is one at least.
fn each_of(target: &str, mut run: impl FnMut(&str, &[u8], &Path)) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    let folder = tempfile::tempdir().unwrap();
    let mut count = 0;
    for entry in std::fs::read_dir(root.join(target)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        run(name, &std::fs::read(&path).unwrap(), folder.path());
        count += 1;
    }
    assert!(count > 0, "no input is kept for {target}");
}

#[test]
fn files_that_were_strange_once_are_refused_or_understood() {
    each_of("saved_guest", |name, input, folder| {
        let understood = saved::read(input, &folder.join("saved"));
        assert!(understood || name != "good", "a good file is refused");
    });
}

#[test]
fn peers_that_were_strange_once_are_refused_or_understood() {
    const STORED: u16 = 7;
    each_of("migration_session", |name, script, folder| {
        let stores = name == "round" || name.starts_with("post-copy");
        // A busy machine may not keep the short times that scripts are played with.
        for attempt in 0..20 {
            let heard = session::play(script, folder);
            let stored = frames(&heard).contains(&STORED);
            let said = String::from_utf8_lossy(&heard);
            assert!(!stored || stores, "{name}: {said}");
            if stored == stores {
                break;
            }
            assert!(attempt < 19, "{name}: {said}");
        }
    });
}

/// The kinds of the frames in what a destination said.
fn frames(mut heard: &[u8]) -> Vec<u16> {
    let mut kinds = Vec::new();
    while let Some((header, rest)) = heard.split_first_chunk::<24>() {
        let length = u32::from_le_bytes(header[..4].try_into().unwrap()) as usize;
        kinds.push(u16::from_le_bytes(header[4..6].try_into().unwrap()));
        heard = rest.get(length..).unwrap_or_default();
    }
    kinds
}
