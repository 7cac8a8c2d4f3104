//! The right to run the guest: there is one, and whoever takes it has it.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::transport::Fencing;

/// The right to run a guest that two processes of this host have: a counter in the kernel
/// (eventfd(2)) that both hold and that one of them takes down from one to zero. The new process
/// takes it before it starts the guest, the old one before it resumes it after `Commit`.
#[derive(Debug)]
pub struct Right(OwnedFd);

/// Who has the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claimed {
    /// This process, from now on.
    Here,
    /// The new process, which lives as far as can be known.
    There,
    /// The new process had it when it died.
    Gone,
}

impl Right {
    /// One that nobody has taken.
    pub(super) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(eventfd(1, flags)?))
    }

    /// The one that the other process made.
    pub(super) fn adopt(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// For the other process.
    pub(super) fn copy(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Takes it; false when the other process has.
    pub(super) fn take(&self) -> io::Result<bool> {
        let mut count = [0; 8];
        loop {
            match rustix::io::read(&self.0, &mut count) {
                Ok(8) => return Ok(true),
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives it back: the guest was not started.
    pub(super) fn give_back(&self) -> io::Result<()> {
        rustix::io::write(&self.0, &1u64.to_ne_bytes())?;
        Ok(())
    }

    /// Takes it for the old process if it can be had; who has it now, where `process` tells
    /// whether the new process lives. Once it says [`Claimed::Here`] it must not be asked again.
    pub fn claim(&self, process: &dyn Fencing) -> Claimed {
        // In this order: one that was dead gives nothing back any more.
        let dead = process.peer_is_dead() == Some(true);
        match self.take() {
            Ok(true) => Claimed::Here,
            Ok(false) if dead => Claimed::Gone,
            Ok(false) => Claimed::There,
            Err(error) => {
                tracing::error!(%error, "who may run the guest cannot be told");
                Claimed::There
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Process(Option<bool>);

    impl Fencing for Process {
        fn peer_is_dead(&self) -> Option<bool> {
            self.0
        }
    }

    #[test]
    fn one_of_two_takes_it() {
        let old = Right::new().unwrap();
        let new = Right::adopt(old.copy().unwrap());
        assert!(new.take().unwrap());
        assert!(!old.take().unwrap() && !new.take().unwrap());
        new.give_back().unwrap();
        assert!(old.take().unwrap());
        assert!(!new.take().unwrap());
    }

    #[test]
    fn what_the_new_process_took_is_gone_with_it_and_else_there() {
        let old = Right::new().unwrap();
        let new = Right::adopt(old.copy().unwrap());
        assert!(new.take().unwrap());
        assert_eq!(old.claim(&Process(None)), Claimed::There);
        assert_eq!(old.claim(&Process(Some(false))), Claimed::There);
        assert_eq!(old.claim(&Process(Some(true))), Claimed::Gone);
        new.give_back().unwrap();
        assert_eq!(old.claim(&Process(Some(true))), Claimed::Here);
    }
}
