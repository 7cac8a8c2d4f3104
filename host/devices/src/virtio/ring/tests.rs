//! Tests of the ring with no device around it: what a driver may and may not say.

use dunlin_guest::{GuestAddress, Memory, PAGE_SIZE, PageIndex};
use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;

const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const RAM: u64 = 1 << 20;

struct Rings {
    memory: Memory,
    queue: Queue,
    available: u16,
}

impl Rings {
    fn new(suppression: Suppression) -> Self {
        let memory = Memory::new(RAM).unwrap();
        let position = QueuePosition::default();
        let queue = Queue::new(memory.clone(), layout(), position, suppression).unwrap();
        Self {
            memory,
            queue,
            available: 0,
        }
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .mapping()
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    fn descriptor_at(&self, table: u64, index: u16, (address, length, flags, next): Raw) {
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    fn descriptor(&self, index: u16, raw: Raw) {
        self.descriptor_at(TABLE, index, raw);
    }

    fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.put(slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.available.to_le_bytes());
    }

    fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let mut chain = Chain::default();
        let some = self.queue.pop(&mut chain)?;
        Ok(some.then_some(chain))
    }

    /// What popping head 0 says.
    fn refusal(&mut self) -> RingError {
        self.offer(0);
        self.pop().unwrap_err()
    }
}

/// Address, length, flags, next.
type Raw = (u64, u32, u16, u16);

const NEXT: u16 = DESCRIPTOR_NEXT;
const WRITE: u16 = DESCRIPTOR_WRITE;
const INDIRECT: u16 = DESCRIPTOR_INDIRECT;

fn layout() -> QueueLayout {
    QueueLayout {
        size: SIZE,
        descriptors: TABLE,
        available: AVAILABLE,
        used: USED,
    }
}

#[test]
fn a_chain_holds_its_buffers_in_order() {
    let mut rings = Rings::new(Suppression::EventIndex);
    rings.descriptor(3, (0x8000, 4, NEXT, 1));
    rings.descriptor(1, (0x9000, 0, NEXT, 7));
    rings.descriptor(7, (0xa000, 6, WRITE, 0));
    rings.offer(3);
    let chain = rings.pop().unwrap().unwrap();
    assert_eq!(chain.head(), 3);
    assert_eq!((chain.readable_length(), chain.writable_length()), (4, 6));
    assert!(rings.pop().unwrap().is_none());
}

#[test]
fn an_indirect_table_stands_for_its_descriptors() {
    let mut rings = Rings::new(Suppression::EventIndex);
    rings.descriptor(0, (0x100, 1, NEXT, 1));
    rings.descriptor(1, (0x8000, 32, INDIRECT, 0));
    rings.descriptor_at(0x8000, 0, (0x200, 2, NEXT, 1));
    rings.descriptor_at(0x8000, 1, (0x300, 3, WRITE, 0));
    rings.offer(0);
    let chain = rings.pop().unwrap().unwrap();
    assert_eq!((chain.readable_length(), chain.writable_length()), (3, 3));
}

#[test]
fn a_loop_is_refused() {
    let mut rings = Rings::new(Suppression::EventIndex);
    rings.descriptor(0, (0x100, 1, NEXT, 1));
    rings.descriptor(1, (0x100, 1, NEXT, 0));
    assert_eq!(rings.refusal(), RingError::Endless);
}

#[test]
fn a_chain_of_more_than_four_gib_is_refused() {
    let memory = Memory::new(3 << 30).unwrap();
    let mut queue = Queue::new(
        memory.clone(),
        layout(),
        QueuePosition::default(),
        Suppression::EventIndex,
    )
    .unwrap();
    let mut table = Vec::new();
    for next in [1u16, 0] {
        table.extend(0u64.to_le_bytes());
        table.extend((5u32 << 29).to_le_bytes());
        table.extend(next.to_le_bytes());
        table.extend(next.to_le_bytes());
    }
    table.resize(16 * usize::from(SIZE), 0);
    let mapping = memory.mapping();
    mapping.write_slice(&table, GuestAddress(TABLE)).unwrap();
    mapping
        .write_obj(1u16, GuestAddress(AVAILABLE + 2))
        .unwrap();
    // Two buffers of 2.5 GiB each.
    assert_eq!(queue.pop(&mut Chain::default()), Err(RingError::Endless));
}

#[test]
fn indices_outside_of_the_table_are_refused() {
    let mut rings = Rings::new(Suppression::EventIndex);
    rings.descriptor(0, (0x100, 1, NEXT, SIZE));
    let error = RingError::Index {
        index: SIZE,
        size: SIZE,
    };
    assert_eq!(rings.refusal(), error);
    let mut rings = Rings::new(Suppression::EventIndex);
    rings.offer(u16::MAX);
    assert!(matches!(rings.pop(), Err(RingError::Index { .. })));
}

#[test]
fn buffers_outside_of_ram_are_refused() {
    for (address, length) in [
        (RAM, 1),
        (RAM - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 3, 16),
        (0, u32::MAX),
    ] {
        let mut rings = Rings::new(Suppression::EventIndex);
        rings.descriptor(0, (address, length, 0, 0));
        let error = rings.refusal();
        assert!(matches!(error, RingError::OutsideRam { .. }), "{error}");
    }
}

#[test]
fn a_readable_buffer_after_a_writable_one_is_refused() {
    let mut rings = Rings::new(Suppression::EventIndex);
    rings.descriptor(0, (0x100, 1, NEXT | WRITE, 1));
    rings.descriptor(1, (0x100, 1, 0, 0));
    assert_eq!(rings.refusal(), RingError::Order);
}

#[test]
fn indirect_tables_that_cannot_be_are_refused() {
    let cases = [
        (0x8000, 0, INDIRECT),
        (0x8000, 17, INDIRECT),
        (0x8000, 16 * 1025, INDIRECT),
        (0x8000, 16, INDIRECT | NEXT),
    ];
    for (address, length, flags) in cases {
        let mut rings = Rings::new(Suppression::EventIndex);
        rings.descriptor(0, (address, length, flags, 1));
        assert_eq!(rings.refusal(), RingError::Indirect { length });
    }
    let mut rings = Rings::new(Suppression::EventIndex);
    rings.descriptor(0, (0x8000, 16, INDIRECT, 0));
    rings.descriptor_at(0x8000, 0, (0x8000, 16, INDIRECT, 0));
    assert_eq!(rings.refusal(), RingError::Indirect { length: 16 });
    let mut rings = Rings::new(Suppression::EventIndex);
    rings.descriptor(0, (RAM - 16, 32, INDIRECT, 0));
    assert!(matches!(rings.refusal(), RingError::OutsideRam { .. }));
}

#[test]
fn an_available_index_that_jumps_is_refused() {
    let mut rings = Rings::new(Suppression::EventIndex);
    rings.put(AVAILABLE + 2, &(SIZE + 1).to_le_bytes());
    assert!(matches!(rings.pop(), Err(RingError::Jump { .. })));
    rings.put(AVAILABLE + 2, &u16::MAX.to_le_bytes());
    assert!(matches!(rings.pop(), Err(RingError::Jump { .. })));
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let memory = Memory::new(RAM).unwrap();
    let valid = layout();
    let invalid = [
        QueueLayout { size: 0, ..valid },
        QueueLayout { size: 3, ..valid },
        QueueLayout { size: 16, ..valid },
        QueueLayout {
            descriptors: 8,
            ..valid
        },
        QueueLayout {
            available: 1,
            ..valid
        },
        QueueLayout { used: 2, ..valid },
        QueueLayout {
            descriptors: RAM - 16,
            ..valid
        },
        QueueLayout {
            available: u64::MAX - 1,
            ..valid
        },
        QueueLayout { used: RAM, ..valid },
    ];
    assert_eq!(valid.check(&memory, SIZE), Ok(()));
    for layout in invalid {
        assert!(layout.check(&memory, SIZE).is_err(), "{layout:?}");
    }
}

#[test]
fn a_chain_that_was_given_back_comes_again() {
    let mut rings = Rings::new(Suppression::EventIndex);
    for head in 0..3 {
        rings.descriptor(head, (0x100, 1, 0, 0));
        rings.offer(head);
    }
    let heads: Vec<u16> = (0..3)
        .map(|_| rings.pop().unwrap().unwrap().head())
        .collect();
    assert_eq!(heads, [0, 1, 2]);
    rings.queue.undo_pop();
    rings.queue.undo_pop();
    assert_eq!(rings.pop().unwrap().unwrap().head(), 1);
}

#[test]
fn the_driver_is_asked_to_notify_only_when_the_ring_was_empty() {
    let mut rings = Rings::new(Suppression::EventIndex);
    let event = |rings: &Rings| -> u16 {
        let at = GuestAddress(USED + 4 + 8 * u64::from(SIZE));
        rings.memory.mapping().read_obj(at).unwrap()
    };
    for head in 0..2 {
        rings.descriptor(head, (0x100, 1, 0, 0));
        rings.offer(head);
    }
    rings.pop().unwrap().unwrap();
    rings.pop().unwrap().unwrap();
    assert_eq!(event(&rings), 0);
    assert!(rings.pop().unwrap().is_none());
    assert_eq!(event(&rings), 2);
}

#[test]
fn the_driver_is_interrupted_when_it_asked() {
    let mut rings = Rings::new(Suppression::EventIndex);
    let wish = |rings: &Rings, index: u16| {
        rings.put(AVAILABLE + 4 + 2 * u64::from(SIZE), &index.to_le_bytes());
    };
    assert!(!rings.queue.needs_interrupt().unwrap());
    wish(&rings, 1);
    rings.queue.push_used(0, 0).unwrap();
    assert!(!rings.queue.needs_interrupt().unwrap());
    rings.queue.push_used(0, 0).unwrap();
    assert!(rings.queue.needs_interrupt().unwrap());
    let mut rings = Rings::new(Suppression::Flags);
    rings.queue.push_used(0, 0).unwrap();
    assert!(rings.queue.needs_interrupt().unwrap());
    rings.put(AVAILABLE, &NO_INTERRUPT.to_le_bytes());
    rings.queue.push_used(0, 0).unwrap();
    assert!(!rings.queue.needs_interrupt().unwrap());
}

#[test]
fn what_the_device_writes_is_in_the_dirty_log() {
    let mut rings = Rings::new(Suppression::EventIndex);
    rings.descriptor(0, (0x8000, 4, WRITE, 0));
    rings.offer(0);
    let mut set = dunlin_guest::PageSet::new(RAM / PAGE_SIZE);
    rings.memory.dirty_log().harvest(&mut set);
    let chain = rings.pop().unwrap().unwrap();
    chain.write(rings.memory.mapping(), 0, b"data");
    rings.queue.push_used(0, 4).unwrap();
    let log = rings.memory.dirty_log();
    assert!(log.is_dirty(PageIndex(0x8000 / PAGE_SIZE)));
    assert!(log.is_dirty(PageIndex(USED / PAGE_SIZE)));
    assert_eq!(log.count(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn garbage_in_the_rings_gives_buffers_in_ram_or_an_error(
        table in proptest::collection::vec(
            (0u64..RAM * 2, 0u32..70_000, 0u16..8, 0u16..SIZE + 1), SIZE as usize),
        indirect in proptest::collection::vec(any::<u8>(), 256),
        ring in proptest::collection::vec(0u16..SIZE + 1, SIZE as usize),
        index in 0u16..SIZE + 2,
    ) {
        let mut rings = Rings::new(Suppression::EventIndex);
        for (at, raw) in table.into_iter().enumerate() {
            rings.descriptor(at as u16, raw);
        }
        rings.put(0x8000, &indirect);
        for (slot, head) in ring.into_iter().enumerate() {
            rings.put(AVAILABLE + 4 + 2 * slot as u64, &head.to_le_bytes());
        }
        rings.put(AVAILABLE + 2, &index.to_le_bytes());
        let mut popped = 0;
        let mut buffer = vec![0; 70_000];
        while let Ok(Some(chain)) = rings.pop() {
            popped += 1;
            prop_assert!(popped <= SIZE);
            for segment in chain.readable.iter().chain(&chain.writable) {
                prop_assert!(segment.address + u64::from(segment.length) <= RAM);
            }
            let length = chain.readable_length();
            let count = chain.read(rings.memory.mapping(), 0, &mut buffer);
            prop_assert_eq!(count as u64, length.min(70_000));
        }
    }
}
