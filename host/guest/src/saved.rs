//! The form in which a component's state travels: to a file, or to another host.
//!
//! Each component has a state type of its own with numbered fields (`prost`), so that a field can
//! be added without breaking an older reader. Saving destructures the live component, so that a
//! forgotten field fails to compile. Restoring goes through `TryFrom`: what arrives is untrusted.

use prost::Message;

/// One component's state: which component, of which kind and version, and its encoded body.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedState {
    /// Which instance within the machine, e.g. `"cpu0"`, `"serial"`, `"pci/00:02.0"`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What kind of component wrote the body, e.g. `"x86-cpu"`, `"virtio-net"`.
    #[prost(string, tag = "2")]
    pub kind: String,
    /// Version of the body's schema. A reader refuses a version newer than it knows.
    #[prost(uint32, tag = "3")]
    pub version: u32,
    /// The component's state type, encoded.
    #[prost(bytes = "vec", tag = "4")]
    pub body: Vec<u8>,
}

/// Why a saved state was refused.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is of another kind of component.
    #[error("saved state \"{name}\" is of kind \"{found}\", expected \"{expected}\"")]
    WrongKind {
        /// The component instance.
        name: String,
        /// The kind in the saved state.
        found: String,
        /// The kind that the component writes.
        expected: &'static str,
    },
    /// The state was written by a newer schema than this one reads.
    #[error("saved state \"{name}\" has version {found}, newer than the supported {supported}")]
    TooNew {
        /// The component instance.
        name: String,
        /// The version in the saved state.
        found: u32,
        /// The newest version that this build reads.
        supported: u32,
    },
    /// The body does not decode.
    #[error("saved state \"{name}\" does not decode")]
    Malformed {
        /// The component instance.
        name: String,
        /// What the decoder said.
        #[source]
        source: prost::DecodeError,
    },
    /// The body decodes, but a value cannot be.
    #[error("saved state \"{name}\" is invalid: {reason}")]
    Invalid {
        /// The component instance.
        name: String,
        /// Which value, and what would be valid.
        reason: String,
    },
    /// No component of this machine has that name, or a component got no state.
    #[error("saved state \"{name}\" matches no component of this machine")]
    Unmatched {
        /// The component instance.
        name: String,
    },
}

impl SavedState {
    /// Encodes `body` as the state of component `name`.
    pub fn encode<T: Message>(name: &str, kind: &'static str, version: u32, body: &T) -> Self {
        Self {
            name: name.to_owned(),
            kind: kind.to_owned(),
            version,
            body: body.encode_to_vec(),
        }
    }

    /// Decodes the body after checking kind and version.
    ///
    /// # Errors
    /// [`RestoreError`] when kind, version or encoding do not fit.
    pub fn decode<T: Message + Default>(
        &self,
        kind: &'static str,
        newest: u32,
    ) -> Result<T, RestoreError> {
        if self.kind != kind {
            return Err(RestoreError::WrongKind {
                name: self.name.clone(),
                found: self.kind.clone(),
                expected: kind,
            });
        }
        if self.version > newest {
            return Err(RestoreError::TooNew {
                name: self.name.clone(),
                found: self.version,
                supported: newest,
            });
        }
        T::decode(self.body.as_slice()).map_err(|source| RestoreError::Malformed {
            name: self.name.clone(),
            source,
        })
    }

    /// An [`RestoreError::Invalid`] about this state.
    pub fn invalid(&self, reason: impl Into<String>) -> RestoreError {
        RestoreError::Invalid {
            name: self.name.clone(),
            reason: reason.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, PartialEq, Message)]
    struct Body {
        #[prost(uint32, tag = "1")]
        value: u32,
    }

    #[test]
    fn a_body_survives_the_round_trip() {
        let state = SavedState::encode("x", "test", 2, &Body { value: 7 });
        let decoded: Body = state.decode("test", 2).unwrap();
        assert_eq!(decoded.value, 7);
    }

    #[test]
    fn another_kind_is_refused() {
        let state = SavedState::encode("x", "test", 1, &Body { value: 7 });
        assert!(matches!(
            state.decode::<Body>("other", 1),
            Err(RestoreError::WrongKind { .. })
        ));
    }

    #[test]
    fn a_newer_version_is_refused() {
        let state = SavedState::encode("x", "test", 3, &Body { value: 7 });
        assert!(matches!(
            state.decode::<Body>("test", 2),
            Err(RestoreError::TooNew { .. })
        ));
    }

    #[test]
    fn a_damaged_body_is_refused() {
        let mut state = SavedState::encode("x", "test", 1, &Body { value: 7 });
        state.body = vec![0xff; 9];
        assert!(matches!(
            state.decode::<Body>("test", 1),
            Err(RestoreError::Malformed { .. })
        ));
    }
}
