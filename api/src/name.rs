//! Names of virtual machines.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name, in bytes: it becomes part of a socket path, which has 108 bytes in all.
pub const MAX_NAME: usize = 48;

/// A VM's name: letters, digits, `-`, `_` and `.`, beginning with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// A text that cannot name a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{name}\" cannot name a VM: use 1 to {MAX_NAME} letters, digits, '-', '_' or '.', beginning with a letter or digit"
)]
pub struct NameError {
    /// What was given, shortened.
    pub name: String,
}

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let first = text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric());
        let rest = text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        if first && rest && text.len() <= MAX_NAME {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError {
                name: text.chars().take(MAX_NAME + 1).collect(),
            })
        }
    }
}

impl TryFrom<String> for VmName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> String {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_are_accepted() {
        for name in ["a", "web-1", "0", "db_2.example"] {
            assert_eq!(name.parse::<VmName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "a/b", "../x", "-x", "a b", "ü", "a\0"] {
            assert!(name.parse::<VmName>().is_err(), "{name:?}");
        }
        assert!("a".repeat(MAX_NAME + 1).parse::<VmName>().is_err());
    }

    #[test]
    fn a_bad_name_on_the_wire_is_refused() {
        assert!(serde_json::from_str::<VmName>("\"../etc\"").is_err());
    }
}
