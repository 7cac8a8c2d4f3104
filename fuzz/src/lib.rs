//! What the fuzz targets share: files in memory, a processor with its RAM, quiet surroundings of
//! devices.
//!
//! A target feeds one input to public interfaces only, the way a guest, a peer or a file would,
//! and finds panics, accesses out of bounds (by the address sanitizer) and endless work.

pub mod lane;
pub mod processor;
pub mod saved;
pub mod session;
pub mod surroundings;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A folder of this process for what an input makes, in memory where the machine has such a place.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() {
            memory.to_owned()
        } else {
            std::env::temp_dir()
        };
        let folder = place.join(format!("dunlin-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("there is a place for temporary files");
        folder
    })
}

/// Makes writing to who has hung up an error, as it is in every program whose `main` is Rust's; the
/// fuzzer's is not.
pub fn survive_hang_ups() {
    // SAFETY: ignoring a signal runs no code of ours.
    #[expect(unsafe_code, reason = "std does so only before a main of its own")]
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
}

/// A file that has a path but no place on disk.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
}

impl MemoryFile {
    /// A file with these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        let descriptor = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC);
        let mut file = File::from(descriptor.expect("the kernel has memfd_create"));
        file.write_all(bytes).expect("there is memory for an input");
        Self { file }
    }

    /// Where it can be opened while it lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}
