//! A case's machine: its memory, its code, and what is to come of it.

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;

use crate::layout::*;
use crate::legacy;

/// Which mode a case's body begins in, at privilege 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// 64-bit mode, four-level paging.
    Long,
    /// Flat 32-bit protected mode without paging.
    Legacy,
}

/// A place in a case's code.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place(usize);

/// An instruction pointer that is expected.
#[derive(Debug, Clone, Copy)]
enum Pointer {
    Any,
    Fixed(u64),
    Place(Place),
    /// What ends a round in peace.
    End,
}

/// One event that reaches the handler. What is not said is not compared.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub vector: u64,
    pub error: u64,
    rip: Pointer,
    pub fields: Vec<(Field, u64, u64)>,
    /// Fields that hold the address of a place.
    pointers: Vec<(Field, Place)>,
}

/// A field of a record; its value is its place there.
#[expect(dead_code, reason = "named as they are reported")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    Dr6 = 0,
    Cr2 = 1,
    Rsi = 2,
    Rdx = 3,
    Rcx = 4,
    Rax = 5,
    Vector = 6,
    Error = 7,
    Rip = 8,
    Cs = 9,
    Rflags = 10,
    Rsp = 11,
    Ss = 12,
    Es = 13,
    Ds = 14,
    Fs = 15,
    Gs = 16,
}

/// Fields of a record in 64-bit mode, and in protected mode.
pub(crate) const LONG_FIELDS: usize = 13;
pub(crate) const LEGACY_FIELDS: usize = 17;

/// An exception or interrupt with its error code, 0 where it has none.
pub(crate) fn event(vector: u64, error: u64) -> Event {
    Event {
        vector,
        error,
        rip: Pointer::Any,
        fields: Vec::new(),
        pointers: Vec::new(),
    }
}

/// The round ends in peace.
pub(crate) fn end() -> Event {
    Event {
        rip: Pointer::End,
        ..event(6, 0)
    }
}

impl Event {
    pub(crate) fn at(mut self, place: Place) -> Self {
        self.rip = Pointer::Place(place);
        self
    }

    pub(crate) fn rip(mut self, address: u64) -> Self {
        self.rip = Pointer::Fixed(address);
        self
    }

    pub(crate) fn is(mut self, field: Field, value: u64) -> Self {
        self.fields.push((field, u64::MAX, value));
        self
    }

    /// The field holds the address of a place.
    pub(crate) fn points(mut self, field: Field, place: Place) -> Self {
        self.pointers.push((field, place));
        self
    }

    /// Of the field's bits in `mask`, those of `value` are set.
    pub(crate) fn bits(mut self, field: Field, mask: u64, value: u64) -> Self {
        self.fields.push((field, mask, value));
        self
    }

    pub(crate) fn cr2(self, address: u64) -> Self {
        self.is(Field::Cr2, address)
    }

    pub(crate) fn rax(self, value: u64) -> Self {
        self.is(Field::Rax, value)
    }

    pub(crate) fn flags(self, mask: u64, value: u64) -> Self {
        self.bits(Field::Rflags, mask, value)
    }
}

/// A processor that is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    Tcg,
    Kvm,
}

/// One case, assembled.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub name: String,
    /// The section that says so: Intel SDM (SDM) or AMD APM.
    pub manual: &'static str,
    pub image: Vec<u8>,
    pub mode: Mode,
    /// What each round reports.
    pub events: Vec<Event>,
    /// Behind the last event of the first round the processor shuts down.
    pub shuts_down: bool,
    /// Who does something else, and what.
    pub differs: Vec<(Peer, &'static str)>,
}

/// Code that runs after each round.
type Cleanup = Box<dyn FnOnce(&mut CodeAssembler)>;

/// A case in the making.
pub(crate) struct Guest {
    pub a: CodeAssembler,
    memory: Vec<u8>,
    places: Vec<CodeLabel>,
    /// Instructions that load the address of a place.
    addresses: Vec<(Place, Place)>,
    mode: Mode,
    events: Vec<Event>,
    cleanup: Option<Cleanup>,
    chain: u64,
    shuts_down: bool,
    differs: Vec<(Peer, &'static str)>,
    own: u16,
}

/// A case that begins in 64-bit mode.
pub(crate) fn long(
    name: impl Into<String>,
    manual: &'static str,
    build: impl FnOnce(&mut Guest),
) -> Case {
    make(Mode::Long, name, manual, build)
}

/// A case that begins in flat 32-bit protected mode.
pub(crate) fn protected(
    name: impl Into<String>,
    manual: &'static str,
    build: impl FnOnce(&mut Guest),
) -> Case {
    make(Mode::Legacy, name, manual, build)
}

/// Stands in code for what is known when it is assembled.
const UNKNOWN: u32 = 0x7777_7777;

/// A case that begins in `mode`.
pub(crate) fn make(
    mode: Mode,
    name: impl Into<String>,
    manual: &'static str,
    build: impl FnOnce(&mut Guest),
) -> Case {
    let name = name.into();
    let mut guest = Guest::new(mode);
    let (top, after) = (guest.mark(), guest.place());
    guest.address_of(after);
    guest.a.mov(dword_ptr(RESUME), eax).unwrap();
    // How many events are returned from.
    let chain = guest.mark();
    guest.a.mov(eax, UNKNOWN).unwrap();
    guest.a.mov(dword_ptr(CHAIN), eax).unwrap();
    build(&mut guest);
    let end = guest.mark();
    guest.a.ud2().unwrap();
    guest.set_place(after);
    if let Some(cleanup) = guest.cleanup.take() {
        cleanup(&mut guest.a);
    }
    let top = guest.label(top);
    let a = &mut guest.a;
    a.inc(dword_ptr(ROUND)).unwrap();
    a.cmp(dword_ptr(ROUND), ROUNDS as i32).unwrap();
    a.jb(top).unwrap();
    a.mov(al, 0).unwrap();
    a.out(i32::from(EXIT_PORT), al).unwrap();
    a.hlt().unwrap();
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let assembled = guest.a.assemble_options(CODE, options).unwrap();
    let at = |place: Place| assembled.label_ip(&guest.places[place.0]).unwrap();
    let code = &assembled.inner.code_buffer;
    assert!(
        code.len() as u64 <= MORE_CODE - CODE,
        "{name}: code is too long"
    );
    guest.memory[CODE as usize..][..code.len()].copy_from_slice(code);
    let mut patches = vec![(at(chain), guest.chain)];
    patches.extend(guest.addresses.iter().map(|&(from, to)| (at(from), at(to))));
    for (instruction, value) in patches {
        let immediate = &mut guest.memory[instruction as usize + 1..][..4];
        assert_eq!(immediate, UNKNOWN.to_le_bytes());
        immediate.copy_from_slice(&(value as u32).to_le_bytes());
    }
    let mut events = std::mem::take(&mut guest.events);
    for event in &mut events {
        match event.rip {
            Pointer::Place(place) => event.rip = Pointer::Fixed(at(place)),
            Pointer::End => event.rip = Pointer::Fixed(at(end)),
            _ => {}
        }
        for (field, place) in std::mem::take(&mut event.pointers) {
            event.fields.push((field, u64::MAX, at(place)));
        }
        if let Pointer::Fixed(address) = event.rip {
            event.fields.push((Field::Rip, u64::MAX, address));
        }
    }
    Case {
        name,
        manual,
        image: guest.memory.split_off(IMAGE as usize),
        mode,
        events,
        shuts_down: guest.shuts_down,
        differs: guest.differs,
    }
}

impl Guest {
    fn new(mode: Mode) -> Self {
        let mut guest = Self {
            a: CodeAssembler::new(if mode == Mode::Long { 64 } else { 32 }).unwrap(),
            memory: vec![0; RAM as usize],
            places: Vec::new(),
            addresses: Vec::new(),
            mode,
            events: Vec::new(),
            cleanup: None,
            chain: 0,
            shuts_down: false,
            differs: Vec::new(),
            own: OWN,
        };
        guest.lay_descriptors();
        match mode {
            Mode::Long => guest.lay_long(),
            Mode::Legacy => legacy::lay(&mut guest),
        }
        guest
    }

    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        self.memory[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn set(&mut self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    pub(crate) fn set_32(&mut self, at: u64, value: u32) {
        self.write(at, &value.to_le_bytes());
    }

    pub(crate) fn set_16(&mut self, at: u64, value: u16) {
        self.write(at, &value.to_le_bytes());
    }

    /// Code of another width at `at`.
    pub(crate) fn code(&mut self, bits: u32, at: u64, build: impl FnOnce(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(bits).unwrap();
        build(&mut a);
        let bytes = a.assemble(at).unwrap();
        self.write(at, &bytes);
    }

    /// The place of the next instruction.
    pub(crate) fn mark(&mut self) -> Place {
        let place = self.place();
        self.set_place(place);
        place
    }

    /// A place that comes later.
    pub(crate) fn place(&mut self) -> Place {
        self.places.push(self.a.create_label());
        Place(self.places.len() - 1)
    }

    pub(crate) fn set_place(&mut self, place: Place) {
        self.a.set_label(&mut self.places[place.0]).unwrap();
        self.a.zero_bytes().unwrap();
    }

    pub(crate) fn label(&self, place: Place) -> CodeLabel {
        self.places[place.0]
    }

    /// Loads the address of a place into EAX.
    pub(crate) fn address_of(&mut self, place: Place) {
        let instruction = self.mark();
        self.a.mov(eax, UNKNOWN).unwrap();
        self.addresses.push((instruction, place));
    }

    /// Adds a descriptor of the case's own; returns its selector.
    pub(crate) fn descriptor(&mut self, raw: u64) -> u16 {
        let selector = self.own;
        self.own += 8;
        self.set(GDT + u64::from(selector), raw);
        selector
    }

    /// The next event of each round.
    pub(crate) fn expect(&mut self, event: Event) {
        self.events.push(event);
    }

    /// The round ends in peace.
    pub(crate) fn expect_end(&mut self) {
        self.expect(end());
    }

    /// The first so many events of a round are returned from; the next one ends it.
    pub(crate) fn returns(&mut self, events: u64) {
        self.chain = events;
    }

    /// The same, and each goes on so many bytes further.
    pub(crate) fn returns_behind(&mut self, events: u64, bytes: u64) {
        self.returns(events);
        self.set(SKIP, bytes);
    }

    /// Runs after each round.
    pub(crate) fn cleanup(&mut self, build: impl FnOnce(&mut CodeAssembler) + 'static) {
        self.cleanup = Some(Box::new(build));
    }

    /// The case ends in a triple fault.
    pub(crate) fn expect_shutdown(&mut self) {
        self.shuts_down = true;
    }

    /// `peer` does otherwise.
    pub(crate) fn differs(&mut self, peer: Peer, how: &'static str) {
        self.differs.push((peer, how));
    }

    /// The same, where it is so.
    pub(crate) fn differs_if(&mut self, so: bool, peer: Peer, how: &'static str) {
        if so {
            self.differs(peer, how);
        }
    }

    /// An interrupt gate of the current mode.
    #[expect(clippy::too_many_arguments, reason = "the fields of a gate")]
    pub(crate) fn gate(&mut self, vector: u64, selector: u16, offset: u64, access: u8, ist: u64) {
        let low = offset & 0xffff
            | u64::from(selector) << 16
            | ist << 32
            | u64::from(access) << 40
            | (offset >> 16 & 0xffff) << 48;
        if self.mode == Mode::Long {
            self.set(IDT + vector * 16, low);
            self.set(IDT + vector * 16 + 8, offset >> 32);
        } else {
            self.set(IDT + vector * 8, low);
        }
    }

    fn lay_descriptors(&mut self) {
        let long = self.mode == Mode::Long;
        for (selector, raw) in [
            (
                KERNEL_CS,
                if long {
                    0x00af_9b00_0000_ffff
                } else {
                    0x00cf_9b00_0000_ffff
                },
            ),
            (KERNEL_SS, 0x00cf_9300_0000_ffff),
            (USER_CS_32, 0x00cf_fb00_0000_ffff),
            (USER_SS, 0x00cf_f300_0000_ffff),
            (
                USER_CS,
                if long {
                    0x00af_fb00_0000_ffff
                } else {
                    0x00cf_fb00_0000_ffff
                },
            ),
            (TASK, 0x0000_8900_0000_0000 | 0x1fff | TSS << 16),
            (KERNEL_CS_32, 0x00cf_9b00_0000_ffff),
            (KERNEL_SS_32, 0x00cf_9300_0000_ffff),
        ] {
            self.set(GDT + u64::from(selector & !7), raw);
        }
        self.set_16(GDTR, 0x7ff);
        self.set(GDTR + 2, GDT);
        self.set_16(IDTR, if long { 0xfff } else { 0x7ff });
        self.set(IDTR + 2, IDT);
        for vector in 0..256 {
            let access = if matches!(vector, 3 | 4 | OPEN) {
                0xee
            } else {
                0x8e
            };
            self.gate(vector, KERNEL_CS, HANDLERS + vector * 16, access, 0);
            let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
            let mut stub = if has_error { vec![] } else { vec![0x6a, 0] };
            stub.push(0x68);
            stub.extend((vector as u32).to_le_bytes());
            stub.push(0xe9);
            let next = HANDLERS + vector * 16 + stub.len() as u64 + 4;
            stub.extend((HANDLER.wrapping_sub(next) as u32).to_le_bytes());
            self.write(HANDLERS + vector * 16, &stub);
        }
    }

    fn lay_long(&mut self) {
        self.set(PML4, PDPT | 7);
        self.set(PDPT, PD | 7);
        self.set(PD, PT | 7);
        for page in 0..512 {
            self.set(PT + page * 8, page << 12 | 7);
        }
        self.set(PD + 16, TEST_PT | 7);
        self.set(TEST_PT, FRAME | 7);
        self.set(TEST_PT + 8, (FRAME + 0x1000) | 7);
        self.set(TSS + 4, INNER_STACK);
        self.set(TSS + 36, IST_STACK);
        self.set_16(TSS + 102, 104);
        self.code(32, ENTRY, |a| {
            let mut next = a.create_label();
            a.lgdt(fword_ptr(GDTR)).unwrap();
            a.mov(eax, u32::from(KERNEL_SS)).unwrap();
            a.mov(ds, eax).unwrap();
            a.mov(es, eax).unwrap();
            a.mov(ss, eax).unwrap();
            a.mov(eax, CR4 as u32).unwrap();
            a.mov(cr4, eax).unwrap();
            a.mov(eax, PML4 as u32).unwrap();
            a.mov(cr3, eax).unwrap();
            a.mov(ecx, 0xc000_0080u32).unwrap();
            a.xor(edx, edx).unwrap();
            a.mov(eax, (EFER & !0x400) as u32).unwrap();
            a.wrmsr().unwrap();
            a.mov(eax, CR0 as u32).unwrap();
            a.mov(cr0, eax).unwrap();
            a.jmp(next).unwrap();
            a.set_label(&mut next).unwrap();
            // JMP 8:ENTRY + 0x80
            a.db(&[0xea]).unwrap();
            a.dd(&[ENTRY as u32 + 0x80]).unwrap();
            a.dw(&[KERNEL_CS]).unwrap();
        });
        self.code(64, ENTRY + 0x80, |a| {
            a.lidt(tbyte_ptr(IDTR)).unwrap();
            a.mov(eax, u32::from(TASK)).unwrap();
            a.ltr(ax).unwrap();
            a.mov(rax, CODE).unwrap();
            a.mov(qword_ptr(RESUME), rax).unwrap();
            a.mov(rax, HANDLER + RESET).unwrap();
            a.jmp(rax).unwrap();
        });
        self.code(64, HANDLER, long_handler);
        self.code(64, HANDLER + RESET, long_reset);
    }
}

/// From [`HANDLER`] to what brings the processor back to its beginnings and goes on at [`RESUME`].
pub(crate) const RESET: u64 = 0x100;

/// Reports the frame and what else is of interest; goes back, or on with the next round.
fn long_handler(a: &mut CodeAssembler) {
    let mut reset = a.create_label();
    for register in [rax, rcx, rdx, rsi] {
        a.push(register).unwrap();
    }
    a.cld().unwrap();
    a.mov(rax, cr2).unwrap();
    a.push(rax).unwrap();
    a.mov(rax, dr6).unwrap();
    a.push(rax).unwrap();
    a.mov(rsi, rsp).unwrap();
    a.mov(ecx, LONG_FIELDS as u32 * 8).unwrap();
    a.mov(edx, u32::from(REPORT_PORT)).unwrap();
    a.rep().outsb().unwrap();
    a.cmp(dword_ptr(CHAIN), 0).unwrap();
    a.je(reset).unwrap();
    a.dec(dword_ptr(CHAIN)).unwrap();
    a.mov(eax, 0xffff_0ff0u32).unwrap();
    a.mov(dr6, rax).unwrap();
    a.mov(rax, qword_ptr(SKIP)).unwrap();
    a.add(qword_ptr(rsp + 64), rax).unwrap();
    a.add(rsp, 16).unwrap();
    for register in [rsi, rdx, rcx, rax] {
        a.pop(register).unwrap();
    }
    a.add(rsp, 16).unwrap();
    a.iretq().unwrap();
    a.set_label(&mut reset).unwrap();
    a.mov(rax, HANDLER + RESET).unwrap();
    a.jmp(rax).unwrap();
}

fn long_reset(a: &mut CodeAssembler) {
    a.cli().unwrap();
    a.mov(eax, u32::from(KERNEL_SS)).unwrap();
    for segment in [ds, es, ss] {
        a.mov(segment, eax).unwrap();
    }
    a.xor(eax, eax).unwrap();
    a.mov(fs, eax).unwrap();
    a.mov(gs, eax).unwrap();
    a.mov(rsp, KERNEL_STACK).unwrap();
    a.push(2).unwrap();
    a.popfq().unwrap();
    a.mov(eax, 0x400).unwrap();
    a.mov(dr7, rax).unwrap();
    a.mov(eax, 0xffff_0ff0u32).unwrap();
    a.mov(dr6, rax).unwrap();
    a.mov(eax, CR0 as u32).unwrap();
    a.mov(cr0, rax).unwrap();
    a.mov(eax, CR4 as u32).unwrap();
    a.mov(cr4, rax).unwrap();
    a.mov(ecx, 0xc000_0080u32).unwrap();
    a.xor(edx, edx).unwrap();
    a.mov(eax, EFER as u32).unwrap();
    a.wrmsr().unwrap();
    for register in [rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11] {
        a.xor(register, register).unwrap();
    }
    a.mov(rax, qword_ptr(RESUME)).unwrap();
    a.jmp(rax).unwrap();
}

/// Goes to user mode; what follows runs there, at `USER_STACK`, with IOPL as in `rflags`.
pub(crate) fn to_user(guest: &mut Guest, rflags: u64) {
    let next = guest.place();
    let a = &mut guest.a;
    if a.bitness() == 32 {
        // Segments of the kernel would not outlive the return.
        a.mov(eax, u32::from(USER_SS)).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(es, eax).unwrap();
    }
    a.push(i32::from(USER_SS)).unwrap();
    a.push(USER_STACK as i32).unwrap();
    a.push(rflags as i32).unwrap();
    a.push(i32::from(USER_CS)).unwrap();
    guest.address_of(next);
    if guest.a.bitness() == 64 {
        guest.a.push(rax).unwrap();
        guest.a.iretq().unwrap();
    } else {
        guest.a.push(eax).unwrap();
        guest.a.iretd().unwrap();
    }
    guest.set_place(next);
}
