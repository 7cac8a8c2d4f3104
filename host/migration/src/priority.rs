//! Priority of threads whose work nobody waits for.

/// How nice such a thread is: it gets about a tenth of a processor that others want too.
const NICE: libc::c_int = 10;

/// From now on the others come first: guests, and who waits for them. Not to be taken back.
pub fn step_back() {
    // SAFETY: the call takes plain integers; 0 is the calling thread.
    #[expect(unsafe_code, reason = "setpriority has no safe wrapper in std")]
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "a thread that is in no hurry has normal priority");
    }
}
