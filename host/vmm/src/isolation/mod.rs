//! What this process may not do: fewer rights, and a filter on system calls.

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IsolationError {}

/// Gives up all capabilities.
pub(crate) fn drop_capabilities() -> Result<(), IsolationError> {
    Ok(())
}

/// Confines this process, all of its threads, from now on.
pub(crate) fn confine() -> Result<(), IsolationError> {
    Ok(())
}
