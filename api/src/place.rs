//! Where VM processes are found: one folder per VM in the runtime directory.

use std::env;
use std::path::{Path, PathBuf};

use crate::name::VmName;

/// The runtime directory: `$DUNLIN_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/dunlin`, else
/// `/tmp/dunlin-UID`. Mode 0700.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeDirectory {
    path: PathBuf,
}

impl RuntimeDirectory {
    /// A runtime directory at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The one that the environment names, for the user with id `uid`.
    pub fn from_environment(uid: u32) -> Self {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        if let Some(path) = set("DUNLIN_RUNTIME_DIR") {
            return Self::at(path);
        }
        match set("XDG_RUNTIME_DIR") {
            Some(path) => Self::at(PathBuf::from(path).join("dunlin")),
            None => Self::at(format!("/tmp/dunlin-{uid}")),
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of a VM.
    pub fn vm(&self, name: &VmName) -> VmPlace {
        VmPlace {
            directory: self.path.join(name.as_str()),
        }
    }
}

/// The files of one VM's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPlace {
    directory: PathBuf,
}

impl VmPlace {
    /// The folder.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its HTTP interface, a unix stream socket.
    pub fn api_socket(&self) -> PathBuf {
        self.directory.join("api.sock")
    }

    /// The guest's serial console, a unix stream socket: history first, then both ways.
    pub fn console_socket(&self) -> PathBuf {
        self.directory.join("console.sock")
    }

    /// Process id as text; locked (`flock`) for as long as the process lives.
    pub fn pid_file(&self) -> PathBuf {
        self.directory.join("pid")
    }

    /// What the process logged.
    pub fn log_file(&self) -> PathBuf {
        self.directory.join("log")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_a_vm_is_in_its_folder() {
        let place = RuntimeDirectory::at("/run/d").vm(&"a".parse().unwrap());
        for file in [
            place.api_socket(),
            place.console_socket(),
            place.pid_file(),
            place.log_file(),
        ] {
            assert!(file.starts_with("/run/d/a"));
        }
    }
}
