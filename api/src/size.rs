//! Sizes and durations as people write them.

use std::time::Duration;

/// A text that is no size or duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a number with a known unit.
    #[error("\"{text}\" is not a size: write a number with K, M, G or T, such as 512M")]
    Size {
        /// What was given.
        text: String,
    },
    /// More than 64 bits of bytes.
    #[error("\"{text}\" is too large")]
    TooLarge {
        /// What was given.
        text: String,
    },
    /// Not a duration.
    #[error("\"{text}\" is not a duration: write a number with us, ms or s, such as 50ms")]
    Duration {
        /// What was given.
        text: String,
    },
}

/// Reads a size in bytes: `512M`, `2G`, `4096`; units are powers of 1024.
///
/// # Errors
/// [`QuantityError`] when it is none.
pub fn parse_size(text: &str) -> Result<u64, QuantityError> {
    let bad = || QuantityError::Size {
        text: text.to_owned(),
    };
    let body = text.strip_suffix(['b', 'B']).unwrap_or(text);
    let body = body.strip_suffix('i').unwrap_or(body);
    let (digits, shift) = match body.bytes().last().map(|b| b.to_ascii_lowercase()) {
        Some(b'k') => (&body[..body.len() - 1], 10),
        Some(b'm') => (&body[..body.len() - 1], 20),
        Some(b'g') => (&body[..body.len() - 1], 30),
        Some(b't') => (&body[..body.len() - 1], 40),
        _ => (body, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let too_large = || QuantityError::TooLarge {
        text: text.to_owned(),
    };
    let number: u64 = digits.parse().ok().ok_or_else(too_large)?;
    number.checked_mul(1 << shift).ok_or_else(too_large)
}

/// Reads a duration: `50ms`, `2s`, `500us`; a bare number is milliseconds.
///
/// # Errors
/// [`QuantityError`] when it is none.
pub fn parse_duration(text: &str) -> Result<Duration, QuantityError> {
    let (digits, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "ms"),
    };
    let number = digits.parse::<u64>().ok();
    match (number, unit) {
        (Some(n), "us") => Ok(Duration::from_micros(n)),
        (Some(n), "ms") => Ok(Duration::from_millis(n)),
        (Some(n), "s") => Ok(Duration::from_secs(n)),
        _ => Err(QuantityError::Duration {
            text: text.to_owned(),
        }),
    }
}

/// Writes a size with the largest unit that keeps it readable: `512 MiB`, `1.5 GiB`, `17 B`.
pub fn display_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() == 0.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_unit() {
        for (text, bytes) in [
            ("4096", 4096),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("2g", 2 << 30),
            ("1K", 1024),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "M",
            "-1M",
            "1.5G",
            "12X",
            "99999999999999999999",
            "99999999T",
            "ü",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_read() {
        assert_eq!(parse_duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(parse_duration("50"), Ok(Duration::from_millis(50)));
        assert_eq!(parse_duration("2s"), Ok(Duration::from_secs(2)));
        assert!(parse_duration("ms").is_err());
        assert!(parse_duration("5 weeks").is_err());
    }

    #[test]
    fn sizes_are_written_for_people() {
        assert_eq!(display_size(512 << 20), "512 MiB");
        assert_eq!(display_size(3 << 29), "1.5 GiB");
        assert_eq!(display_size(17), "17 B");
    }
}
