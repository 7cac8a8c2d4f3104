//! What a saved guest's file may say.
//!
//! An input is a recipe for a file. Its first byte says what it starts from, the rest is read as
//! steps:
//!
//! | starts from | steps |
//! |---|---|
//! | 0, 1: a good file of the present format, of the first one | change of a byte: offset (2 bytes), what to flip (1) |
//! | 2: nothing but the head of the first format | a frame: kind, length, content |
//! | others: nothing | bytes, as they are |
//!
//! Checksums and sequence numbers are put right afterwards, since a file that means harm has them
//! right. Shared by the
//! fuzz target and the test that runs its regression corpus.

use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock};

use dunlin_guest::{Memory, PageIndex, SavedState};
use dunlin_migration::file::{self, LazyRestore};
use dunlin_migration::protocol::message::{Configuration, FileHeader, Region, RoundBegin};
use dunlin_migration::protocol::{Header, Kind, Message, Preamble, Purpose, Token};
use dunlin_migration::{DestinationMachine, MachineError, Slowdown, SourceMachine, Userfaultfd};

/// RAM of the guest in good files, and the most that a file's guest gets.
pub const RAM: u64 = 1 << 20;
const HEAD: usize = 64;
const FRAME: usize = 24;

/// A machine that is memory alone.
#[derive(Debug)]
pub struct Machine(pub Memory);

impl Machine {
    /// With memory of its own.
    pub fn new() -> Self {
        Self(Memory::new(RAM).expect("there is memory for a guest"))
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl DestinationMachine for Machine {
    fn memory(&self) -> &Memory {
        &self.0
    }

    fn restore(&mut self, _states: Vec<SavedState>) -> Result<(), MachineError> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}

impl SourceMachine for Machine {
    fn memory(&self) -> &Memory {
        &self.0
    }

    fn configuration(&self) -> Vec<u8> {
        b"machine".to_vec()
    }

    fn start_dirty_tracking(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn collect_dirty(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn stop_dirty_tracking(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn throttle(&mut self, _slowdown: Slowdown) -> Result<(), MachineError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<SavedState>, MachineError> {
        Ok(Vec::new())
    }
}

/// Makes the file of an input at `path`, and reads it in every way there is; was it understood?
pub fn read(input: &[u8], path: &Path) -> bool {
    let Some((&start, steps)) = input.split_first() else {
        return false;
    };
    let bytes = match start {
        0 => changed(&good_file(path), steps),
        1 => changed(&good_first_version(), steps),
        2 => framed(steps),
        _ => steps.to_vec(),
    };
    std::fs::write(path, bytes).expect("there is room for an input");
    let _refused = file::inspect(path);
    let whole = file::restore(path, |_| Ok(Machine::new()));
    if let Some(faults) = faults() {
        let behind = read_behind(path, faults);
        assert_eq!(
            behind.as_ref().map(content),
            whole.as_ref().ok().map(content),
            "a guest is another one when it runs before its pages are read"
        );
    }
    whole.is_ok()
}

/// Where the host permits it; said once where not.
fn faults() -> Option<Arc<Userfaultfd>> {
    static FAULTS: OnceLock<Option<Arc<Userfaultfd>>> = OnceLock::new();
    let open = || match Userfaultfd::open() {
        Ok(faults) => Some(Arc::new(faults)),
        Err(error) => {
            eprintln!("SKIP: pages are not read behind the guest: {error}");
            None
        }
    };
    FAULTS.get_or_init(open).clone()
}

/// Reads the file behind the machine; the machine when all pages came.
fn read_behind(path: &Path, faults: Arc<Userfaultfd>) -> Option<Machine> {
    // One descriptor serves one guest at a time.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    let (sender, ends) = channel();
    let lazy = LazyRestore {
        faults,
        on_end: Box::new(move |end| {
            let _nobody_waits = sender.send(end.is_ok());
        }),
    };
    let restored = file::restore_lazily(path, lazy, |_| Ok(Machine::new())).ok()?;
    let came = restored.rest.is_none() || ends.recv().unwrap_or(false);
    drop(restored.rest);
    came.then_some(restored.machine)
}

fn content(machine: &Machine) -> Vec<[u8; 4096]> {
    let pages = (0..machine.0.pages()).map(|page| {
        let mut content = [0; 4096];
        machine.0.read_page(PageIndex(page), &mut content);
        content
    });
    pages.collect()
}

/// A file of the present format: pages with and without content.
fn good_file(path: &Path) -> Vec<u8> {
    let mut machine = Machine::new();
    for page in [1u64, 2, 3, 40, 254] {
        let content = [page as u8 + 1; 4096];
        assert!(machine.0.write_page(PageIndex(page), &content));
    }
    let place = path.with_extension("good");
    file::save(&mut machine, &place).expect("a machine of memory alone can be saved");
    let bytes = std::fs::read(&place).expect("what was saved is there");
    std::fs::remove_file(&place).expect("what was saved can be removed");
    bytes
}

/// The first messages of a file of the first format.
fn good_first_version() -> Vec<u8> {
    let region = Region {
        start: 0,
        size: RAM,
        offset: 0,
    };
    let messages = [
        Message::FileHeader(FileHeader {
            created: 1,
            ram_bytes: RAM,
            components: Vec::new(),
        }),
        Message::Configuration(Configuration {
            machine: Vec::new(),
            ram_bytes: RAM,
            regions: vec![region],
            verification: 1,
            ..Configuration::default()
        }),
        Message::RoundBegin(RoundBegin {
            round: 0,
            pages: RAM / 4096,
        }),
    ];
    let mut bytes = head();
    for message in messages {
        frame(&mut bytes, message.kind(), &message.encode());
    }
    bytes
}

fn head() -> Vec<u8> {
    let start = Preamble {
        body_length: 0,
        ..Preamble::connection(Purpose::File, Token::from_bytes([0; 16]))
    };
    let mut bytes = start.encode().to_vec();
    bytes[8..10].copy_from_slice(&1u16.to_le_bytes());
    bytes
}

fn frame(bytes: &mut Vec<u8>, kind: Kind, payload: &[u8]) {
    let header = Header {
        length: payload.len() as u32,
        kind,
        sequence: 0,
        payload_crc: 0,
    };
    bytes.extend_from_slice(&header.encode());
    bytes.extend_from_slice(payload);
}

fn changed(good: &[u8], steps: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for step in steps.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([step[0], step[1]]));
        match (step[2], bytes.get_mut(at)) {
            // Nothing to flip: the file ends there.
            (0, Some(_)) => bytes.truncate(at),
            (flip, Some(byte)) => *byte ^= flip,
            // Beyond the end: what the table lies behind grows.
            (_, None) => bytes.push(step[2]),
        }
    }
    repair(&mut bytes);
    bytes
}

fn framed(mut steps: &[u8]) -> Vec<u8> {
    let mut bytes = head();
    while let [kind, length, rest @ ..] = steps {
        let (payload, next) = rest.split_at(rest.len().min(usize::from(*length)));
        let kind = Kind::ALL[usize::from(*kind) % Kind::ALL.len()];
        if let Ok(message) = Message::decode(kind, payload) {
            let again = Message::decode(kind, &message.encode());
            assert_eq!(again.ok(), Some(message), "a message changed on its way");
        }
        frame(&mut bytes, kind, payload);
        steps = next;
    }
    repair(&mut bytes);
    bytes
}

/// Puts right what is computed from the rest.
fn repair(bytes: &mut [u8]) {
    if bytes.len() < HEAD {
        return;
    }
    let body = (bytes.len() - HEAD) as u64;
    bytes[40..48].copy_from_slice(&body.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..60]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    let sequence = repair_frames(bytes, HEAD, 0);
    let table = u64::from_le_bytes(bytes[24..32].try_into().expect("eight bytes are eight"));
    if let Ok(table) = usize::try_from(table)
        && (HEAD + 1..bytes.len()).contains(&table)
    {
        repair_frames(bytes, table, sequence);
    }
}

/// Numbers and checks the frames from `at` on, as far as they look like some; returns the next
/// number.
fn repair_frames(bytes: &mut [u8], mut at: usize, mut sequence: u64) -> u64 {
    while let Some(length) = bytes.get(at..at + 4) {
        let length = u32::from_le_bytes(length.try_into().expect("four bytes are four"));
        let Some(end) = (at + FRAME).checked_add(length as usize) else {
            break;
        };
        let kind = bytes.get(at + 4..at + 6);
        if end > bytes.len() || kind.is_none_or(|kind| kind == [0, 0]) {
            break;
        }
        let crc = crc32fast::hash(&bytes[at + FRAME..end]);
        bytes[at + 8..at + 16].copy_from_slice(&sequence.to_le_bytes());
        bytes[at + 16..at + 20].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[at..at + 20]);
        bytes[at + 20..at + 24].copy_from_slice(&crc.to_le_bytes());
        (at, sequence) = (end, sequence + 1);
    }
    sequence
}
