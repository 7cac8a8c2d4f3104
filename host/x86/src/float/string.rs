//! String comparison and CRC of SSE4.2 (SDM vol. 2B, 4.1).

/// Result of PCMPxSTRx before it becomes a mask or an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Comparison {
    /// IntRes2: one bit an element.
    pub(crate) bits: u16,
    /// The first operand has fewer valid elements than fit.
    pub(crate) first_short: bool,
    /// The second operand has fewer valid elements than fit.
    pub(crate) second_short: bool,
    wide: bool,
}

/// One operand, taken apart as the control byte demands.
struct Elements {
    values: [i32; 16],
    valid: usize,
}

/// Bits of the control byte.
const WORDS: u8 = 1 << 0;
const SIGNED: u8 = 1 << 1;
const MOST_SIGNIFICANT: u8 = 1 << 6;
const EXPAND: u8 = 1 << 6;

fn count(control: u8) -> usize {
    if control & WORDS != 0 { 8 } else { 16 }
}

impl Elements {
    /// `length` is that of the explicit forms; without one the first zero ends the string.
    fn new(register: u128, length: Option<u64>, control: u8) -> Self {
        let count = count(control);
        let mut values = [0; 16];
        for (index, value) in values.iter_mut().take(count).enumerate() {
            *value = match control & (WORDS | SIGNED) {
                0 => i32::from((register >> (index * 8)) as u8),
                WORDS => i32::from((register >> (index * 16)) as u16),
                SIGNED => i32::from((register >> (index * 8)) as i8),
                _ => i32::from((register >> (index * 16)) as i16),
            };
        }
        let valid = match length {
            Some(length) => (length as i64).unsigned_abs().min(count as u64) as usize,
            None => {
                let end = values[..count].iter().position(|value| *value == 0);
                end.unwrap_or(count)
            }
        };
        Self { values, valid }
    }
}

/// The aggregation that bits 2-3 of `control` name: IntRes1.
fn aggregate(first: &Elements, second: &Elements, control: u8) -> u16 {
    let count = count(control);
    let (set, set_valid) = (&first.values, first.valid);
    let (text, text_valid) = (&second.values, second.valid);
    let holds = |index: usize| match control >> 2 & 3 {
        0 => index < text_valid && set[..set_valid].contains(&text[index]),
        1 => {
            let ranges = set[..set_valid & !1].chunks_exact(2);
            index < text_valid
                && ranges
                    .into_iter()
                    .any(|range| range[0] <= text[index] && text[index] <= range[1])
        }
        2 => match (index < set_valid, index < text_valid) {
            (true, true) => set[index] == text[index],
            (first_valid, second_valid) => first_valid == second_valid,
        },
        _ => (0..set_valid.min(count - index))
            .all(|at| index + at < text_valid && set[at] == text[index + at]),
    };
    (0..count).fold(0, |bits, index| bits | u16::from(holds(index)) << index)
}

/// Compares; `lengths` are RAX and RDX of the explicit forms.
pub(crate) fn compare(
    first: u128,
    second: u128,
    lengths: Option<(u64, u64)>,
    control: u8,
) -> Comparison {
    let count = count(control);
    let first = Elements::new(first, lengths.map(|lengths| lengths.0), control);
    let second = Elements::new(second, lengths.map(|lengths| lengths.1), control);
    let mut bits = aggregate(&first, &second, control);
    let all = if count == 8 { 0xff } else { 0xffff };
    match control >> 4 & 3 {
        1 => bits ^= all,
        3 => bits ^= ((1_u32 << second.valid) - 1) as u16,
        _ => {}
    }
    Comparison {
        bits,
        first_short: first.valid < count,
        second_short: second.valid < count,
        wide: count == 8,
    }
}

impl Comparison {
    /// ECX of the index forms.
    pub(crate) fn index(self, control: u8) -> u32 {
        if self.bits == 0 {
            return if self.wide { 8 } else { 16 };
        }
        if control & MOST_SIGNIFICANT != 0 {
            15 - self.bits.leading_zeros()
        } else {
            self.bits.trailing_zeros()
        }
    }

    /// XMM0 of the mask forms.
    pub(crate) fn mask(self, control: u8) -> u128 {
        if control & EXPAND == 0 {
            return u128::from(self.bits);
        }
        let (count, element, width) = if self.wide {
            (8, 0xffff, 16)
        } else {
            (16, 0xff, 8)
        };
        (0..count)
            .filter(|index| self.bits >> index & 1 != 0)
            .fold(0, |mask, index| mask | element << (index * width))
    }
}

/// CRC-32C without inversion over the low `bytes` bytes of `data`.
pub(crate) fn crc32c(seed: u32, data: u64, bytes: usize) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut crc = seed;
    for byte in &data.to_le_bytes()[..bytes] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ POLYNOMIAL & (crc & 1).wrapping_neg();
        }
    }
    crc
}
