//! The system calls that a VM's process needs.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Compare,
    SeccompCondition as Condition, SeccompFilter, SeccompRule as Rule, TargetArch,
};

/// Calls that are allowed whatever their arguments.
const ALLOWED: &[i64] = &[
    // Files: disks, kernels, saved guests, the log, the folder of sockets.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_readlink,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_memfd_create,
    libc::SYS_membarrier,
    // Threads. `clone3` hides its arguments from a filter: another filter answers it, and the C
    // library falls back to `clone`, which is in RESTRICTED.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    // Without capabilities a thread can only be made to come later.
    libc::SYS_setpriority,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_prlimit64,
    libc::SYS_getrusage,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_getegid,
    libc::SYS_getgid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    // Time.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    // Waiting.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_restart_syscall,
    // Sockets; their families are in RESTRICTED.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    // Signals to ourselves; whose, is in RESTRICTED.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    // Entropy for the guest and for hash tables.
    libc::SYS_getrandom,
    // To watch, not to signal, the other side of a move.
    libc::SYS_pidfd_open,
];

/// ioctl requests of KVM carry this type in their second byte.
const KVM_TYPE: u64 = 0xae;
/// Those of userfaultfd, whose descriptor was opened before.
const USERFAULTFD_TYPE: u64 = 0xaa;

fn equals(argument: u8, value: u64) -> Result<Rule, seccompiler::BackendError> {
    Rule::new(vec![Condition::new(
        argument,
        Width::Dword,
        Compare::Eq,
        value,
    )?])
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<Rule, seccompiler::BackendError> {
    Rule::new(vec![Condition::new(
        argument,
        Width::Qword,
        Compare::MaskedEq(mask),
        value,
    )?])
}

/// Calls that are allowed with certain arguments.
fn restricted() -> Result<Vec<(i64, Vec<Rule>)>, seccompiler::BackendError> {
    let thread = (libc::CLONE_VM | libc::CLONE_THREAD) as u64;
    let own = u64::from(std::process::id());
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
    let families = || families.iter().map(|&family| equals(0, family as u64));
    let requests = [libc::FIONBIO, libc::FIONREAD, libc::FIOCLEX, libc::TCGETS];
    let mut requests: Vec<Rule> = (requests.iter())
        .map(|&request| equals(1, request))
        .collect::<Result<_, _>>()?;
    for kind in [KVM_TYPE, USERFAULTFD_TYPE] {
        requests.push(masked(1, 0xff00, kind << 8)?);
    }
    Ok(vec![
        (libc::SYS_clone, vec![masked(0, thread, thread)?]),
        (libc::SYS_tgkill, vec![equals(0, own)?]),
        (libc::SYS_socket, families().collect::<Result<_, _>>()?),
        (libc::SYS_socketpair, families().collect::<Result<_, _>>()?),
        (libc::SYS_ioctl, requests),
        (
            libc::SYS_prctl,
            vec![
                equals(0, libc::PR_SET_NAME as u64)?,
                equals(0, libc::PR_SET_VMA as u64)?,
                equals(0, libc::PR_GET_NO_NEW_PRIVS as u64)?,
            ],
        ),
        (libc::SYS_capget, Vec::new()),
    ])
}

/// The filters, in the order in which to install them.
pub(super) fn programs() -> Result<[BpfProgram; 2], seccompiler::Error> {
    let no_clone3 = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        TargetArch::x86_64,
    )?;
    let mut rules: BTreeMap<i64, Vec<Rule>> =
        ALLOWED.iter().map(|&call| (call, Vec::new())).collect();
    rules.extend(restricted()?);
    let needed = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok([no_clone3.try_into()?, needed.try_into()?])
}
