//! Random inputs: numbers that make instructions show their corners.

/// SplitMix64: small, and good enough to pick inputs.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    /// Below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    /// True in `percent` of cases.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// An integer: often near a border of some width, or small.
    pub(crate) fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(256).wrapping_sub(128),
            1 => {
                let border = 1_u64 << self.below(64);
                border.wrapping_add(self.below(3)).wrapping_sub(1)
            }
            2 => !(1_u64 << self.below(64)),
            3 => self.next() >> self.below(64),
            4 => self.pick(&[0, 1, u64::MAX, 1 << 63, u64::MAX >> 1, 1 << 31, 0x7fff_ffff]),
            _ => self.next(),
        }
    }

    /// The bits of a single-precision number.
    pub(crate) fn single(&mut self) -> u32 {
        let sign = (self.next() as u32) & 1 << 31;
        let mantissa = self.next() as u32 & 0x7f_ffff;
        sign | match self.below(12) {
            0 => 0,
            1 => mantissa >> self.below(23),
            2 => 0x7f80_0000,
            3 => 0x7fc0_0000 | mantissa,
            4 => 0x7f80_0001 | mantissa & 0x3f_ffff,
            5 => (0x7e + self.below(4) as u32) << 23 | mantissa,
            6 => (self.below(40) as f32).to_bits(),
            7 => (0x7f + self.below(66) as u32) << 23 | mantissa,
            8 => (1 + self.below(3) as u32) << 23 | mantissa,
            9 => (0xfe - self.below(3) as u32) << 23 | mantissa,
            _ => self.next() as u32 & 0x7fff_ffff,
        }
    }

    /// The bits of a double-precision number.
    pub(crate) fn double(&mut self) -> u64 {
        let sign = self.next() & 1 << 63;
        let mantissa = self.next() & ((1 << 52) - 1);
        sign | match self.below(13) {
            0 => 0,
            1 => mantissa >> self.below(52),
            2 => 0x7ff << 52,
            3 => 0xfff << 51 | mantissa,
            4 => 0x7ff << 52 | 1 | mantissa >> 2,
            5 => (0x3fe + self.below(4)) << 52 | mantissa,
            6 => (self.below(40) as f64).to_bits(),
            7 => (0x3ff + self.below(66)) << 52 | mantissa,
            8 => (1 + self.below(3)) << 52 | mantissa,
            9 => (0x7fe - self.below(3)) << 52 | mantissa,
            // Near the borders of single precision.
            10 => (0x3ff - 150 + self.below(30)) << 52 | mantissa,
            11 => (0x3ff + 120 + self.below(12)) << 52 | mantissa,
            _ => self.next() & !(1 << 63),
        }
    }

    /// The bits of a double-extended number, well formed or not.
    pub(crate) fn extended(&mut self) -> u128 {
        let sign = u128::from(self.next() & 1) << 79;
        let one = 1_u64 << 63;
        let fraction = self.next() >> 1;
        let make = |exponent: u64, mantissa: u64| u128::from(exponent) << 64 | u128::from(mantissa);
        sign | match self.below(14) {
            0 => 0,
            1 => make(0, fraction >> self.below(63)),
            2 => make(0x7fff, one),
            3 => make(0x7fff, one | 1 << 62 | fraction),
            4 => make(0x7fff, one | fraction >> 2 | 1),
            5 | 6 => make(0x3ffd + self.below(5), one | fraction),
            7 => {
                let integer = self.below(1000) + 1;
                let shift = integer.leading_zeros();
                make(0x3fff + 63 - u64::from(shift), integer << shift)
            }
            8 => make(0x3fff + self.below(70), one | fraction),
            9 => make(1 + self.below(3), one | fraction),
            10 => make(0x7ffe - self.below(3), one | fraction),
            // Near the borders of single and double precision.
            11 => {
                let around = self.pick(&[-150_i64, -127, 127, -1075, -1023, 1023]);
                let exponent = 0x3fff + around + self.below(8) as i64 - 4;
                make(exponent as u64, one | fraction)
            }
            // Unnormals, pseudo-infinities and the like.
            12 => make(self.below(0x8000), self.next()),
            _ => make(self.below(0x7fff), one | fraction),
        }
    }

    /// A 128-bit operand: integers, numbers of either precision, or text.
    pub(crate) fn vector(&mut self) -> u128 {
        let pair = |low: u64, high: u64| u128::from(low) | u128::from(high) << 64;
        match self.below(10) {
            0..=2 => (0..4).fold(0, |value, _| value << 32 | u128::from(self.single())),
            3..=5 => pair(self.double(), self.double()),
            6 => {
                let alphabet = self.pick(&[2, 4, 26]);
                let text =
                    (0..16).fold(0, |value, _| value << 8 | u128::from(self.below(alphabet)));
                text << self.pick(&[0, 0, 8, 40]) >> self.pick(&[0, 0, 16, 64])
            }
            7 => (0..8).fold(0, |value, _| {
                value << 16 | u128::from(self.integer() as u16)
            }),
            8 => pair(self.integer(), self.integer()),
            _ => pair(self.next(), self.next()),
        }
    }

    /// An x87 and SSE state in FXSAVE64's layout; only its fixed parts if `used` is false.
    pub(crate) fn float_image(&mut self, used: bool) -> [u8; 512] {
        let random = self;
        let mut image = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &0x037f_u16.to_le_bytes());
        put(24, &0x1f80_u32.to_le_bytes());
        if !used {
            return image;
        }
        let all_masked = random.chance(75);
        let mut control = random.next() as u16 & 0x0f3f | 0x40;
        let mut status = random.next() as u16 & 0x7f7f;
        if all_masked {
            control |= 0x3f;
        } else if random.chance(90) {
            // No exception pending.
            status &= !0x3f | control;
        }
        if status & !control & 0x3f != 0 {
            status |= 0x8080;
        }
        let tags = if random.chance(60) {
            0xff
        } else {
            random.next() as u8
        };
        put(0, &control.to_le_bytes());
        put(2, &status.to_le_bytes());
        put(4, &[tags]);
        if status & 0x80 != 0 {
            // Only then do all processors restore them.
            put(6, &(random.next() as u16 & 0x7ff).to_le_bytes());
            put(8, &(random.next() >> 17).to_le_bytes());
            put(16, &(random.next() >> 17).to_le_bytes());
        }
        let mut mxcsr = random.next() as u32 & 0xffff;
        if random.chance(75) {
            mxcsr |= 0x1f80;
        }
        if random.chance(50) {
            mxcsr &= 0x1fbf;
        }
        put(24, &mxcsr.to_le_bytes());
        for index in 0..8 {
            let value = if random.chance(10) {
                0xffff << 64 | u128::from(random.integer())
            } else {
                random.extended()
            };
            put(32 + index * 16, &value.to_le_bytes());
        }
        for index in 0..16 {
            put(160 + index * 16, &random.vector().to_le_bytes());
        }
        image
    }
}
