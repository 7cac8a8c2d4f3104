//! Does ring-0 code run natively under this host's KVM?
//!
//! Some hosts offer `/dev/kvm` and emulate every kernel instruction: a guest's kernel is then slower
//! than on the software CPU. A loop of [`ITERATIONS`] decrements runs here and in ring 0 of a tiny
//! guest; natively both take a fraction of a millisecond, emulated the guest takes thousands of times
//! as long. The CPU time of the thread counts, not the clock on the wall, so that a busy host
//! does not look like an emulating one.

use std::io;
use std::sync::mpsc;
use std::time::Duration;

use dunlin_guest::Memory;
use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::kick::{Kick, install_handler};
use super::{host_error, open};
use crate::probe::Ring0Speed;
use crate::{EngineError, VcpuHandle};

/// Decrements of the loop.
const ITERATIONS: u32 = 2_000_000;
/// How often the loop of the guest may take the host's time. Entering and leaving the guest is in
/// it, which takes microseconds, also when nested; emulation takes a thousandfold.
const THRESHOLD: f64 = 20.0;
/// When the guest is interrupted.
const LIMIT: Duration = Duration::from_millis(200);

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;

/// Runs the loop on both. Takes a millisecond where ring 0 is native, and at most about 200.
///
/// # Errors
/// [`EngineError`] when KVM cannot be used, or does not finish the loop in any way.
pub fn measure_ring0() -> Result<Ring0Speed, EngineError> {
    install_handler()?;
    let kvm = open()?;
    let memory = Memory::new(1 << 20)
        .map_err(|error| host_error("reserve memory for a probe")(io::Error::other(error)))?;
    let mut vcpu = prepare(&kvm, &memory)?;
    let host = best_of_3(native_loop);
    let (guest, done) = run(&mut vcpu)?;
    drop(vcpu);
    let per_iteration = |time: Duration, count: u32| time.as_secs_f64() / f64::from(count.max(1));
    let slowdown =
        per_iteration(guest, done) / per_iteration(host, ITERATIONS).max(f64::MIN_POSITIVE);
    Ok(Ring0Speed {
        slowdown,
        native: slowdown < THRESHOLD,
    })
}

/// A vCPU about to execute `mov ecx, ITERATIONS; dec ecx; jnz; hlt` in ring 0 of long mode.
fn prepare(kvm: &Kvm, memory: &Memory) -> Result<VcpuFd, EngineError> {
    let write = |address: u64, bytes: &[u8]| {
        let written = memory.mapping().write_slice(bytes, GuestAddress(address));
        written.map_err(|error| host_error("write a probe's memory")(io::Error::other(error)))
    };
    write(PML4, &(PDPT | 0x23).to_le_bytes())?;
    write(PDPT, &(PD | 0x23).to_le_bytes())?;
    write(PD, &0xe3u64.to_le_bytes())?;
    let mut code = vec![0xb9];
    code.extend_from_slice(&ITERATIONS.to_le_bytes());
    code.extend_from_slice(&[0xff, 0xc9, 0x75, 0xfc, 0xf4]);
    write(CODE, &code)?;

    let vm = kvm.create_vm().map_err(host_error("create a VM"))?;
    let host = memory
        .host_page(dunlin_guest::PageIndex(0))
        .map_or(0, |page| page.as_ptr() as u64);
    let region = kvm_userspace_memory_region {
        memory_size: memory.size(),
        userspace_addr: host,
        ..Default::default()
    };
    // SAFETY: the caller keeps `memory` for as long as the vCPU, and with it the VM, lives.
    #[expect(unsafe_code, reason = "the kernel maps the memory into the guest")]
    unsafe { vm.set_user_memory_region(region) }.map_err(host_error("map guest memory"))?;
    let vcpu = vm.create_vcpu(0).map_err(host_error("create a vCPU"))?;
    let mut sregs = vcpu
        .get_sregs()
        .map_err(host_error("read system registers"))?;
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        type_: 3,
        selector: 0x10,
        db: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        type_: 11,
        selector: 8,
        db: 0,
        l: 1,
        ..flat
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = flat;
    }
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20;
    sregs.cr0 = 0x8000_0011;
    sregs.efer = 0x500;
    // Without CPUID the kernel refuses long mode.
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(host_error("read which CPU features it supports"))?;
    vcpu.set_cpuid2(&cpuid).map_err(host_error("set CPUID"))?;
    vcpu.set_sregs(&sregs)
        .map_err(host_error("write the system registers"))?;
    let regs = kvm_bindings::kvm_regs {
        rip: CODE,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .map_err(host_error("write the registers"))?;
    Ok(vcpu)
}

/// CPU time until the guest halts, or is interrupted at the limit, and how many rounds it did.
fn run(vcpu: &mut VcpuFd) -> Result<(Duration, u32), EngineError> {
    let kick = std::sync::Arc::new(Kick::new(&raw mut vcpu.get_kvm_run().immediate_exit));
    kick.enter();
    let (done, until_done) = mpsc::channel::<()>();
    let watchdog = {
        let kick = std::sync::Arc::clone(&kick);
        std::thread::spawn(move || {
            if until_done.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                kick.kick();
            }
        })
    };
    let start = thread_time();
    let result = loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => break Ok(()),
            Ok(VcpuExit::Intr) => {}
            Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => {}
            Ok(other) => break Err(format!("a loop in ring 0 ended in {other:?}")),
            Err(errno) => break Err(format!("a loop in ring 0 failed: {errno}")),
        }
        if kick.take() {
            break Ok(());
        }
    };
    let took = thread_time().saturating_sub(start);
    drop(done);
    // A watchdog that panicked has nothing to tell: it only kicks.
    let _ = watchdog.join();
    kick.forget();
    result.map_err(|reason| EngineError::Unavailable {
        engine: "kvm",
        reason,
    })?;
    let regs = vcpu.get_regs().map_err(host_error("read registers"))?;
    Ok((took, ITERATIONS.saturating_sub(regs.rcx as u32)))
}

fn best_of_3(run: impl Fn()) -> Duration {
    (0..3)
        .map(|_| {
            let start = thread_time();
            run();
            thread_time().saturating_sub(start)
        })
        .min()
        .unwrap_or_default()
}

/// The same loop here.
fn native_loop() {
    #[expect(
        unsafe_code,
        reason = "the loop must be the guest's, instruction by instruction"
    )]
    // SAFETY: the block changes a register that it declares, and flags.
    unsafe {
        std::arch::asm!(
            "2: dec {count:e}",
            "jnz 2b",
            count = inout(reg) ITERATIONS => _,
            options(nomem, nostack),
        );
    }
}

/// CPU time of this thread.
fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes the structure that is passed.
    #[expect(unsafe_code, reason = "std does not read this clock")]
    unsafe {
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time);
    }
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn the_answer_comes_in_time() {
        if let Err(error) = open() {
            eprintln!("SKIP: {error}");
            return;
        }
        let start = Instant::now();
        let speed = measure_ring0().unwrap();
        eprintln!("{speed:?} after {:?}", start.elapsed());
        assert!(start.elapsed() < LIMIT * 5);
        assert!(speed.slowdown > 0.1);
        // Neither answer lies near the threshold, or it would be a guess.
        assert!(
            speed.slowdown < THRESHOLD / 4.0 || speed.slowdown > THRESHOLD * 4.0,
            "{speed:?}"
        );
    }
}
