//! Looks at a vCPU's thread from outside: a signal whose handler notes what it interrupted.
//!
//! The handler only reads where the thread is and writes that into the ring of its own probe, which
//! it finds in a thread-local pointer. A thread without one, or one that has ended, is no error: late
//! signals do nothing.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use dunlin_x86::profile::Probe;

use crate::{EngineError, Sampled};

/// Signals that a thread may not have heard yet, at most: one that waits for its turn on a host's
/// processor gets them all at once, and so counts what it has waited.
const UNHEARD: u64 = 4096;

thread_local! {
    /// The probe of the vCPU that this thread runs, while a profile is taken. Without a destructor, and
    /// so safe to be read by a handler at any time.
    static PROBE: Cell<*const Probe> = const { Cell::new(ptr::null()) };
}

/// Samples one thread.
#[derive(Debug)]
pub(super) struct ThreadSampler {
    probe: Arc<Probe>,
    thread: libc::pid_t,
    sent: AtomicU64,
}

impl ThreadSampler {
    /// Samples the calling thread, which runs the processor of `probe`, until [`ThreadSampler::detach`].
    pub(super) fn attach(probe: Arc<Probe>) -> Result<Arc<Self>, EngineError> {
        install_handler()?;
        // SAFETY: gettid has no preconditions.
        #[expect(unsafe_code, reason = "a call without preconditions")]
        let thread = unsafe { libc::gettid() };
        PROBE.set(Arc::as_ptr(&probe));
        Ok(Arc::new(Self {
            probe,
            thread,
            sent: AtomicU64::new(0),
        }))
    }

    /// The calling thread, the same as at [`ThreadSampler::attach`], is sampled no more.
    pub(super) fn detach(&self) {
        if ptr::eq(PROBE.get(), Arc::as_ptr(&self.probe)) {
            PROBE.set(ptr::null());
        }
    }
}

impl Sampled for ThreadSampler {
    fn sample(&self) -> bool {
        let sent = self.sent.load(Ordering::Relaxed);
        if sent.saturating_sub(self.probe.seen()) >= UNHEARD {
            return false;
        }
        // SAFETY: a signal to a thread of this process, whose handler touches only what the thread says
        // is its own. If the thread has ended meanwhile, the call fails or, where its ID was taken by
        // another thread of this process, the handler finds no probe there.
        #[expect(unsafe_code, reason = "tgkill has no safe wrapper in std")]
        let result =
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread, signal()) };
        if result == 0 {
            self.sent.store(sent + 1, Ordering::Relaxed);
        }
        result == 0
    }
}

/// The third real-time signal: those queue, so that none is lost on the way. The second calls
/// KVM_RUN.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 2
}

extern "C" fn note(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let probe = PROBE.get();
    if probe.is_null() {
        return;
    }
    // SAFETY: with SA_SIGINFO the kernel passes the interrupted context. The probe lives until this
    // thread has detached it, and this thread runs its processor.
    #[expect(unsafe_code, reason = "the handler of a signal")]
    unsafe {
        (*probe).sample(program_counter(context.cast()));
    }
}

/// # Safety
/// `context` is what the kernel passed to a handler.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the handler of a signal")]
unsafe fn program_counter(context: *const libc::ucontext_t) -> usize {
    // SAFETY: as the caller says.
    unsafe { (*context).uc_mcontext.gregs[libc::REG_RIP as usize] as usize }
}

/// Elsewhere nothing is translated, so that nobody asks.
#[cfg(not(target_arch = "x86_64"))]
#[expect(unsafe_code, reason = "alike on all hosts")]
unsafe fn program_counter(_context: *const libc::ucontext_t) -> usize {
    0
}

/// Installs the handler, once a process. It stays: signals may be on their way when a profile ends.
fn install_handler() -> Result<(), EngineError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: the structure is zeroed, which is valid, and its handler is a function of the form that
        // SA_SIGINFO asks for, which does what handlers may. SA_RESTART lets the system calls that it
        // interrupts go on.
        #[expect(unsafe_code, reason = "sigaction has no safe wrapper in std")]
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigaction(signal(), &action, ptr::null_mut())
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        }
    });
    installed.map_err(|errno| EngineError::Host {
        engine: "soft",
        action: "install the handler of its sampling signal",
        source: io::Error::from_raw_os_error(errno),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_has_ended_is_no_error_and_one_without_a_probe_hears_nothing() {
        install_handler().unwrap();
        let ended = std::thread::spawn(|| {
            // SAFETY: gettid has no preconditions.
            #[expect(unsafe_code, reason = "a call without preconditions")]
            unsafe {
                libc::gettid()
            }
        });
        let thread = ended.join().unwrap();
        // SAFETY: as above.
        #[expect(unsafe_code, reason = "a call without preconditions")]
        let own = unsafe { libc::gettid() };
        // SAFETY: an ended thread or this one, which has no probe.
        #[expect(unsafe_code, reason = "tgkill has no safe wrapper in std")]
        let sent = |thread: libc::pid_t| unsafe {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) == 0
        };
        assert!(sent(own));
        let _nobody_hears = sent(thread);
        assert!(PROBE.get().is_null());
    }
}
