//! Profiles of the running guest.

use dunlin_api::profile::{MAX_DURATION_MS, MAX_RATE, ProfileReport, ProfileRequest};
use dunlin_api::{ApiError, ErrorCode};

use super::Lifecycle;
use super::requests::host;

impl Lifecycle {
    /// Begins a profile.
    pub(super) fn begin_profile(&mut self, request: &ProfileRequest) -> Result<(), ApiError> {
        check(request)?;
        let name = &self.machine.config().name;
        if self.following.is_some() {
            // A processor may wait for a page of another host without an answer.
            return Err(ApiError::new(
                ErrorCode::Busy,
                format!(
                    "cannot profile VM \"{name}\": its memory is still arriving from the host that \
                     it came from"
                ),
            )
            .with_hint("try again in a moment"));
        }
        if self.profiling.is_some() {
            return Err(ApiError::new(
                ErrorCode::Busy,
                format!("somebody else takes a profile of VM \"{name}\""),
            )
            .with_hint("try again when it has ended"));
        }
        let begun = self.machine.begin_profile(request);
        self.profiling = Some(begun.map_err(|error| host(&error))?);
        Ok(())
    }

    /// Makes room for more samples.
    pub(super) fn collect_profile(&mut self) -> Result<(), ApiError> {
        if self.profiling.is_none() {
            return Err(interrupted());
        }
        self.machine.collect_profile().map_err(|error| host(&error))
    }

    /// Ends it; what came of it.
    pub(super) fn end_profile(&mut self) -> Result<ProfileReport, ApiError> {
        let profiling = self.profiling.take().ok_or_else(interrupted)?;
        self.machine
            .end_profile(profiling)
            .map_err(|error| host(&error))
    }
}

fn check(request: &ProfileRequest) -> Result<(), ApiError> {
    let invalid = |text: String| Err(ApiError::new(ErrorCode::InvalidRequest, text));
    if !(1..=MAX_DURATION_MS).contains(&request.duration_ms) {
        return invalid(format!(
            "a profile of {} ms cannot be: it takes 1 to {MAX_DURATION_MS} ms",
            request.duration_ms
        ));
    }
    if !(1..=MAX_RATE).contains(&request.rate_hz) {
        return invalid(format!(
            "{} samples a second cannot be: 1 to {MAX_RATE} can",
            request.rate_hz
        ));
    }
    Ok(())
}

fn interrupted() -> ApiError {
    ApiError::new(
        ErrorCode::WrongState,
        "the profile was interrupted: the guest rebooted meanwhile",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_profile_can_be_is_refused() {
        let request = |duration_ms, rate_hz| ProfileRequest {
            duration_ms,
            rate_hz,
        };
        assert!(check(&request(5000, 997)).is_ok());
        for wrong in [
            (0, 997),
            (MAX_DURATION_MS + 1, 997),
            (1, 0),
            (1, MAX_RATE + 1),
        ] {
            let error = check(&request(wrong.0, wrong.1)).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidRequest, "{wrong:?}");
        }
    }
}
