//! What this process may not do: no capabilities, no new privileges, and a filter on system calls.
//!
//! The filter is in force before anything foreign is read (a kernel, a saved file, a peer's words)
//! and so before any vCPU or request is served. It allows what the process's threads need over the
//! whole life of a VM, building a machine anew at a reboot included, and answers everything
//! else with EPERM: programs cannot be executed, processes neither traced nor signalled, nothing
//! mounted, no namespace entered.

mod filter;

use rustix::thread::{CapabilitySet, CapabilitySets};

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IsolationError {
    /// The kernel refused a change of rights.
    #[error("failed to {action}")]
    Rights {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The filter cannot be made or installed.
    #[error("failed to install the filter on system calls")]
    Filter(#[from] seccompiler::Error),
}

/// Gives up all capabilities, for this thread and those that it starts. A process of root then
/// opens what the permission bits let root open, and nothing else.
pub(crate) fn drop_capabilities() -> Result<(), IsolationError> {
    let rights = |action| {
        move |errno: rustix::io::Errno| IsolationError::Rights {
            action,
            source: errno.into(),
        }
    };
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(rights("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(rights("renounce new privileges"))
}

/// Filters the system calls of all threads, from now on and for ever.
pub(crate) fn confine() -> Result<(), IsolationError> {
    for program in filter::programs()? {
        seccompiler::apply_filter_all_threads(&program)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::process::Command;

    /// Runs `test` on a thread of its own that is confined as a VM's process is.
    fn confined<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(|| {
            drop_capabilities().unwrap();
            for program in filter::programs().unwrap() {
                seccompiler::apply_filter(&program).unwrap();
            }
            test()
        })
        .join()
        .unwrap()
    }

    #[test]
    fn no_program_can_be_executed() {
        let error = confined(|| Command::new("/bin/true").status().unwrap_err());
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn no_process_can_be_signalled_and_what_nobody_needs_is_refused() {
        confined(|| {
            let own = rustix::process::getpid();
            let signalled = rustix::process::kill_process(own, rustix::process::Signal::CONT);
            assert_eq!(signalled, Err(rustix::io::Errno::PERM));
            // Nothing that needs a right: it is the filter that refuses.
            let watch = rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::CLOEXEC);
            assert_eq!(watch.unwrap_err(), rustix::io::Errno::PERM);
        });
    }

    #[test]
    fn sockets_of_other_families_are_refused() {
        confined(|| {
            use rustix::net::{AddressFamily, SocketType, socket};
            let raw = socket(AddressFamily::PACKET, SocketType::RAW, None);
            assert_eq!(raw.unwrap_err(), rustix::io::Errno::PERM);
            socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        });
    }

    #[test]
    fn threads_files_and_memory_still_work() {
        confined(|| {
            let memory = dunlin_guest::Memory::new(1 << 20).unwrap();
            let sum = std::thread::spawn(move || memory.pages()).join().unwrap();
            assert_eq!(sum, 256);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("x");
            std::fs::write(&path, "text").unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"text");
        });
    }

    #[test]
    fn rights_do_not_come_back() {
        confined(|| {
            assert!(rustix::thread::no_new_privs().unwrap());
            let sets = rustix::thread::capabilities(None).unwrap();
            assert!(sets.permitted.is_empty());
        });
    }
}
