//! How a request is refused.

use serde::{Deserialize, Serialize};

/// What kind of refusal: stable words that a program can test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The request itself is malformed or out of range.
    InvalidRequest,
    /// The object does not exist.
    NotFound,
    /// The VM's state does not allow the request now.
    WrongState,
    /// Another request of the kind is under way.
    Busy,
    /// The host refused: a file, a socket, the engine.
    Host,
    /// The other side of a migration refused or vanished.
    Peer,
    /// It was cancelled by request.
    Cancelled,
    /// A code that this version does not know.
    #[serde(other)]
    Unknown,
}

/// A refused request: its kind, what failed with all causes, and what to do next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Kind.
    pub code: ErrorCode,
    /// What failed and why, as one chain from the outside to the cause.
    pub message: String,
    /// What the user can do, when we know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ApiError {
    /// A refusal without hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
        }
    }

    /// A refusal whose message is the error with all its causes.
    pub fn from_chain(code: ErrorCode, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(code, chain(error))
    }

    /// The same with a hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// An error and its causes in one line, without saying a thing twice.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("failed to open \"x\"")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_names_every_cause_once() {
        let error = Outer(std::io::Error::other("no such file"));
        assert_eq!(chain(&error), "failed to open \"x\": no such file");
    }

    #[test]
    fn an_unknown_code_of_a_newer_peer_is_readable() {
        let error: ApiError = serde_json::from_str(r#"{"code":"quota","message":"m"}"#).unwrap();
        assert_eq!(error.code, ErrorCode::Unknown);
    }
}
