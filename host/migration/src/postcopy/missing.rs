//! Which pages are missing, as it travels.

use dunlin_guest::PageSet;

use crate::protocol::message::Missing;
use crate::protocol::{Kind, ProtocolError};

/// Says which pages are missing; the numbers are left open.
pub(crate) fn tell(missing: &PageSet) -> Missing {
    let bitmap = missing.to_bytes();
    let packed = lz4_flex::block::compress(&bitmap);
    let smaller = packed.len() < bitmap.len();
    Missing {
        count: missing.len(),
        bitmap: if smaller { packed } else { bitmap },
        packed: smaller,
        ..Missing::default()
    }
}

/// Hears it, about RAM of `pages` pages. Memory for the answer is bounded by that, not by what the
/// peer says.
///
/// # Errors
/// [`ProtocolError::Invalid`] when it is no set of pages of that RAM.
pub fn hear(message: &Missing, pages: u64) -> Result<PageSet, ProtocolError> {
    let invalid = |reason: &str| ProtocolError::invalid(Kind::Missing, reason);
    let length = pages.div_ceil(64) as usize * 8;
    let set = if message.packed {
        let mut bitmap = vec![0; length];
        match lz4_flex::block::decompress_into(&message.bitmap, &mut bitmap) {
            Ok(unpacked) if unpacked == length => PageSet::from_bytes(pages, &bitmap),
            Ok(_) => None,
            Err(error) => return Err(invalid(&format!("its bitmap does not unpack: {error}"))),
        }
    } else {
        PageSet::from_bytes(pages, &message.bitmap)
    };
    let set = set.ok_or_else(|| invalid("its bitmap is not one of this RAM"))?;
    if set.len() == message.count {
        Ok(set)
    } else {
        Err(invalid(
            "its bitmap has another number of pages than it says",
        ))
    }
}

#[cfg(test)]
mod tests {
    use dunlin_guest::PageIndex;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn few_missing_pages_of_much_ram_take_few_bytes() {
        let mut set = PageSet::new(1 << 20);
        set.insert_run(1000..3000);
        let message = tell(&set);
        assert!(message.bitmap.len() < 4096, "{}", message.bitmap.len());
        assert_eq!(hear(&message, 1 << 20).unwrap(), set);
        assert!(hear(&message, 1 << 19).is_err());
        assert!(hear(&message, 1 << 30).is_err());
    }

    proptest! {
        #[test]
        fn every_set_survives_the_round_trip(
            ram in 1u64..5000,
            members in proptest::collection::vec(0u64..5000, 0..200),
        ) {
            let mut set = PageSet::new(ram);
            for page in members {
                set.insert(PageIndex(page));
            }
            prop_assert_eq!(hear(&tell(&set), ram).unwrap(), set);
        }

        #[test]
        fn whatever_arrives_is_a_set_of_this_ram_or_refused(
            count in 0u64..70,
            bitmap in proptest::collection::vec(any::<u8>(), 0..40),
            packed in any::<bool>(),
        ) {
            let message = Missing { count, bitmap, packed, ..Missing::default() };
            if let Ok(set) = hear(&message, 65) {
                prop_assert_eq!(set.len(), count);
                prop_assert!(set.iter().all(|page| page.0 < 65));
            }
        }
    }
}
