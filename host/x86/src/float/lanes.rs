//! A 128-bit register as lanes of integers.

/// An integer that a register holds several of; the lowest lane is first.
pub(crate) trait Lane: Copy + Default {
    /// All lanes of a 128-bit register.
    type All: AsRef<[Self]> + AsMut<[Self]> + Copy;

    /// Takes a register apart.
    fn split(register: u128) -> Self::All;

    /// Puts a register together.
    fn join(lanes: Self::All) -> u128;
}

macro_rules! lane {
    ($($name:ty, $count:literal;)*) => {$(
        impl Lane for $name {
            type All = [Self; $count];

            #[inline(always)]
            fn split(register: u128) -> Self::All {
                let bytes = register.to_le_bytes();
                let (lanes, _) = bytes.as_chunks::<{ size_of::<$name>() }>();
                std::array::from_fn(|lane| <$name>::from_le_bytes(lanes[lane]))
            }

            #[inline(always)]
            fn join(lanes: Self::All) -> u128 {
                let mut bytes = [0; 16];
                let (slots, _) = bytes.as_chunks_mut::<{ size_of::<$name>() }>();
                for (slot, lane) in slots.iter_mut().zip(lanes) {
                    *slot = lane.to_le_bytes();
                }
                u128::from_le_bytes(bytes)
            }
        }
    )*};
}

lane! {
    u8, 16;
    i8, 16;
    u16, 8;
    i16, 8;
    u32, 4;
    i32, 4;
    u64, 2;
    i64, 2;
}

/// Applies `f` to each lane.
#[inline(always)]
pub(crate) fn map<T: Lane>(register: u128, f: impl Fn(T) -> T) -> u128 {
    let mut lanes = T::split(register);
    for lane in lanes.as_mut() {
        *lane = f(*lane);
    }
    T::join(lanes)
}

/// Applies `f` to each pair of lanes.
#[inline(always)]
pub(crate) fn zip<T: Lane>(a: u128, b: u128, f: impl Fn(T, T) -> T) -> u128 {
    let mut lanes = T::split(a);
    let others = T::split(b);
    for (lane, other) in lanes.as_mut().iter_mut().zip(others.as_ref()) {
        *lane = f(*lane, *other);
    }
    T::join(lanes)
}

/// Makes each lane from its index.
#[inline(always)]
pub(crate) fn from_index<T: Lane>(f: impl Fn(usize) -> T) -> u128 {
    let mut lanes = T::split(0);
    for (index, lane) in lanes.as_mut().iter_mut().enumerate() {
        *lane = f(index);
    }
    T::join(lanes)
}
