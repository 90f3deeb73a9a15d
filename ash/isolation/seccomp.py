"""Which system calls a sandbox may make: one table, and the program for the kernel that is made of it.

Every call of `syscalls.NUMBERS` stands in RULES, allowed or refused, with the reason; what does not stand there, such as the calls of a
kernel newer than this table, is answered as if the kernel did not have it. Pure functions: nothing in here changes a process.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from ash.errors import IsolationUnavailable
from ash.isolation.syscalls import NUMBERS

# What the kernel does with a call: linux/seccomp.h.
ALLOW = 0x7FFF0000
KILL = 0x80000000
_ERRNO = 0x00050000


def _refuse(code: int) -> int:
    return _ERRNO | code


EPERM = _refuse(errno.EPERM)
ENOSYS = _refuse(errno.ENOSYS)
EAFNOSUPPORT = _refuse(errno.EAFNOSUPPORT)
EPROTONOSUPPORT = _refuse(errno.EPROTONOSUPPORT)
ENOPROTOOPT = _refuse(errno.ENOPROTOOPT)
EOPNOTSUPP = _refuse(errno.EOPNOTSUPP)
UNKNOWN = ENOSYS
"""For a number that is not in the table. Programs take ENOSYS as the word to go another way."""


class Check(NamedTuple):
    """A condition on one argument. Only its low 32 bits count: the kernel reads all arguments checked here as 32-bit numbers."""

    argument: int
    kind: Literal["in", "not in", "any bit of"]
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


class Rule(NamedTuple):
    """What happens to some calls, if all of `when` holds; `condition` says that in words. The first rule that fits decides."""

    calls: str
    action: int
    why: str
    when: tuple[Check, ...] = ()
    condition: str = ""
    debugging: bool = False
    """Allowed by the setting `sandbox_ptrace`."""


_NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""
_NEW_TIME = 0x80
"""CLONE_NEWTIME; in `clone` these bits are the exit signal, so that only `unshare` knows it."""
_TIOCSTI, _TIOCLINUX, _TIOCSETD, _FS_IOC_FSSETXATTR = 0x5412, 0x541C, 0x5423, 0x401C5820
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _DGRAM = 1, 2
_ANY, _ICMP, _TCP, _UDP, _ICMPV6 = 0, 1, 6, 17, 58
_TCP_ULP = 31
_RESERVING = (0x40305828, 0x4030582A, 0x40305839)
"""FS_IOC_RESVSP, FS_IOC_RESVSP64 and FS_IOC_ZERO_RANGE."""
_GIVING_BACK = (0x3, 0x8)
"""FALLOC_FL_PUNCH_HOLE, with which FALLOC_FL_KEEP_SIZE has to come, and FALLOC_FL_COLLAPSE_RANGE."""
_PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)
_IS_INET = Check(0, "in", (_INET, _INET6))

RULES = (
    # Refused
    Rule("clone", EPERM, "user namespaces open much of the kernel to whoever makes one; no other namespace is of use without",
         (Check(0, "any bit of", (_NEW_NAMESPACES,)),), "a new namespace is asked for"),
    Rule("unshare", EPERM, "as clone", (Check(0, "any bit of", (_NEW_NAMESPACES | _NEW_TIME,)),), "a new namespace is asked for"),
    Rule("setns", EPERM, "entering another namespace"),
    Rule("clone3", ENOSYS, "its flags lie in memory, where a filter cannot see them; C libraries then use clone"),
    Rule("ioctl", EPERM, "typing into a terminal as if its user did (TIOCSTI, TIOCLINUX)",
         (Check(1, "in", (_TIOCSTI, _TIOCLINUX)),), "the request is TIOCSTI or TIOCLINUX"),
    Rule("ioctl", EPERM, "line disciplines load drivers nobody here needs, with a history of holes",
         (Check(1, "in", (_TIOCSETD,)),), "the request is TIOCSETD"),
    Rule("ioctl", EPERM, "changes the project number that a disk quota counts by",
         (Check(1, "in", (_FS_IOC_FSSETXATTR,)),), "the request is FS_IOC_FSSETXATTR"),
    Rule("ioctl", EOPNOTSUPP, "as fallocate, which these call",
         (Check(1, "in", _RESERVING),), "the request is FS_IOC_RESVSP, FS_IOC_RESVSP64 or FS_IOC_ZERO_RANGE"),
    Rule("socket", EAFNOSUPPORT, "AF_VSOCK reaches the hypervisor from any network namespace; AF_ALG, AF_PACKET, AF_KEY, AF_RDS, AF_TIPC, "
         "AF_CAN, AF_BLUETOOTH and the rest load protocols with a history of holes",
         (Check(0, "not in", (_UNIX, _INET, _INET6, _NETLINK)),), "the family is not AF_UNIX, AF_INET, AF_INET6 or AF_NETLINK"),
    Rule("socket", EPROTONOSUPPORT, "netfilter, audit, crypto and others; by NETLINK_ROUTE C libraries, Node and Go list interfaces",
         (Check(0, "in", (_NETLINK,)), Check(2, "not in", (_ANY,))), "AF_NETLINK with a protocol other than NETLINK_ROUTE"),
    Rule("socket", EPROTONOSUPPORT, "raw packets, DCCP, SCTP", (_IS_INET, Check(1, "not in", (_STREAM, _DGRAM), 0xF)),
         "AF_INET or AF_INET6 with a type other than SOCK_STREAM and SOCK_DGRAM"),
    Rule("socket", EPROTONOSUPPORT, "SCTP, DCCP, MPTCP, SMC, L2TP", (_IS_INET, Check(2, "not in", (_ANY, _ICMP, _TCP, _UDP, _ICMPV6))),
         "AF_INET or AF_INET6 with a protocol other than TCP, UDP and ping"),
    Rule("socketpair", EAFNOSUPPORT, "as socket; pairs are of AF_UNIX", (Check(0, "not in", (_UNIX,)),), "the family is not AF_UNIX"),
    Rule("setsockopt", ENOPROTOOPT, "puts kernel TLS, SMC and other protocols on a connection and loads them",
         (Check(1, "in", (_TCP,)), Check(2, "in", (_TCP_ULP,))), "the option is TCP_ULP"),
    Rule("fallocate", EOPNOTSUPP, "takes a whole disk in no time and past the file size limit, where a quota is only watched; C libraries "
         "and programs then write", (Check(1, "not in", _GIVING_BACK),), "the mode is not one that gives space back"),
    Rule("personality", EPERM, "executable stacks, foreign systems' calls and odd memory layouts",
         (Check(0, "not in", _PERSONALITIES),), "not one of Linux, 32-bit `uname`, 2.6 `uname`, fixed addresses, or asking"),
    Rule("io_uring_setup io_uring_enter io_uring_register", ENOSYS,
         "does work past this filter, with a history of holes; libraries go on without"),
    Rule("keyctl add_key request_key", EPERM, "keys belong to a user, not to a namespace: those of an ordinary user's server are near"),
    Rule("bpf perf_event_open userfaultfd", EPERM, "favourites for attacking the kernel, of use to nobody without rights"),
    Rule("ptrace process_vm_readv process_vm_writev", EPERM, "looking into and steering other processes; debuggers do", debugging=True),
    Rule("pidfd_getfd kcmp process_madvise process_mrelease", EPERM, "taking descriptors of other processes, comparing and changing them"),
    Rule("mount umount2 pivot_root move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick mount_setattr chroot", EPERM,
         "building another view of the file system"),
    Rule("statmount listmount listns", ENOSYS, "new ways to what /proc says; tools then read /proc"),
    Rule("name_to_handle_at open_by_handle_at", EPERM, "opening files by number, past the folders above them"),
    Rule("fanotify_init fanotify_mark", EPERM, "watching what others do with files; inotify stays"),
    Rule("swapon swapoff reboot kexec_load kexec_file_load init_module finit_module delete_module acct quotactl quotactl_fd syslog vhangup",
         EPERM, "administration of the machine"),
    Rule("settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname", EPERM, "the machine's clock and name"),
    Rule("iopl ioperm modify_ldt", EPERM, "hardware ports and segments of old programs (x86-64 only)"),
    Rule("migrate_pages move_pages set_mempolicy_home_node", EPERM, "placing other processes' memory; tells where memory lies"),
    Rule("memfd_secret cachestat lsm_get_self_attr lsm_set_self_attr lsm_list_modules file_setattr", ENOSYS,
         "new, hardly used, not reviewed by many yet; programs go on without"),
    Rule("uselib ustat sysfs _sysctl nfsservctl lookup_dcookie", ENOSYS, "obsolete; most kernels have them no more"),
    Rule("create_module get_kernel_syms query_module getpmsg putpmsg afs_syscall tuxcall security vserver epoll_ctl_old epoll_wait_old "
         "set_thread_area get_thread_area", ENOSYS, "numbers without a call behind them (x86-64 only)"),
    # Allowed
    Rule("read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek sendfile splice tee vmsplice copy_file_range "
         "readahead fadvise64 sync_file_range fallocate truncate ftruncate fsync fdatasync sync syncfs close close_range dup dup2 dup3 "
         "fcntl flock ioctl pipe pipe2", ALLOW, "open files"),
    Rule("open openat openat2 creat access faccessat faccessat2 stat fstat lstat newfstatat statx statfs fstatfs getdents getdents64 "
         "getcwd chdir fchdir rename renameat renameat2 mkdir mkdirat rmdir link linkat unlink unlinkat symlink symlinkat readlink "
         "readlinkat mknod mknodat umask", ALLOW, "names of files; devices take a capability"),
    Rule("chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat setxattr lsetxattr fsetxattr "
         "getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr setxattrat getxattrat "
         "listxattrat removexattrat file_getattr", ALLOW, "attributes of files"),
    Rule("poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2 signalfd "
         "signalfd4 timerfd_create timerfd_settime timerfd_gettime inotify_init inotify_init1 inotify_add_watch inotify_rm_watch io_setup "
         "io_destroy io_submit io_cancel io_getevents io_pgetevents", ALLOW, "waiting for events"),
    Rule("mmap munmap mprotect mremap msync mincore madvise brk mlock mlock2 munlock mlockall munlockall remap_file_pages memfd_create "
         "mseal pkey_mprotect pkey_alloc pkey_free map_shadow_stack membarrier mbind set_mempolicy get_mempolicy", ALLOW,
         "memory of its own"),
    Rule("clone fork vfork execve execveat exit exit_group wait4 waitid unshare set_tid_address set_robust_list get_robust_list rseq prctl "
         "arch_prctl personality restart_syscall pidfd_open pidfd_send_signal seccomp landlock_create_ruleset landlock_add_rule "
         "landlock_restrict_self", ALLOW, "processes and threads; seccomp and landlock only ever take rights away"),
    Rule("kill tkill tgkill rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_tgsigqueueinfo "
         "rt_sigsuspend sigaltstack pause", ALLOW, "signals, within the pid namespace"),
    Rule("futex futex_waitv futex_wake futex_wait futex_requeue shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd "
         "msgrcv msgctl mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr",
         ALLOW, "locks and queues, within the IPC namespace"),
    Rule("socket socketpair bind listen accept accept4 connect shutdown sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg getsockname "
         "getpeername setsockopt getsockopt", ALLOW, "sockets, within the network namespace"),
    Rule("time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep alarm getitimer setitimer timer_create timer_settime "
         "timer_gettime timer_getoverrun timer_delete times getrandom", ALLOW, "time and chance"),
    Rule("getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgid getpgrp getsid setpgid setsid setuid "
         "setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capget capset", ALLOW,
         "who it is; there is one uid and no capability to have"),
    Rule("getrlimit setrlimit prlimit64 getrusage getpriority setpriority ioprio_get ioprio_set getcpu sysinfo uname sched_yield "
         "sched_setparam sched_getparam sched_setscheduler sched_getscheduler sched_setattr sched_getattr sched_setaffinity "
         "sched_getaffinity sched_get_priority_max sched_get_priority_min sched_rr_get_interval",
         ALLOW, "its share; hard limits only go down"),
    Rule("uprobe uretprobe", ALLOW, "made by the kernel itself where an administrator traces a program; of no use otherwise"),
)  # fmt: skip

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""How the kernel names the calling convention of each machine: linux/audit.h."""
_X32 = 0x40000000
"""The bit of x86-64's second calling convention, whose calls have numbers of their own."""


def decide(call: str, *, ptrace: bool) -> list[Rule]:
    """The rules of a call, in their order; with `ptrace` the refusals that debuggers cannot live with are none."""
    found = [rule for rule in RULES if call in rule.calls.split()]
    return [rule._replace(action=ALLOW) if rule.debugging and ptrace else rule for rule in found]


def compile_filter(machine: str, *, ptrace: bool = False) -> bytes:
    """The filter as the kernel and bubblewrap take it. Raises IsolationUnavailable for a machine that the table does not know."""
    if machine not in ARCHITECTURES:
        raise IsolationUnavailable(
            f"Agents cannot be isolated: the filter of system calls is made for {' and '.join(ARCHITECTURES)}, and this machine is "
            f"{machine}. Use one of those, or start the server with `--sandbox none`, which runs agents unprotected."
        )
    wrong_machine = [_jump(_JEQ, ARCHITECTURES[machine], 1, 0), _answer(KILL)]
    program = [_load(_ARCHITECTURE), *wrong_machine, _load(_NUMBER), *_search(_intervals(machine, ptrace))]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


# The assembler: linux/filter.h. A jump's offset counts from the instruction after it.

Instruction = tuple[int, int, int, int]
Code = list[Instruction]

_LOAD, _AND, _RETURN, _JA, _JEQ, _JGE, _JSET = 0x20, 0x54, 0x06, 0x05, 0x15, 0x35, 0x45
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data; an argument has eight bytes, the low ones first on both machines."""
_FARTHEST = 255


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _answer(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


def _jump(code: int, value: int, if_true: int, if_false: int) -> Instruction:
    return (code, if_true, if_false, value)


def _intervals(machine: str, ptrace: bool) -> list[tuple[int, Code]]:
    """From each number on, what happens; as few as possible."""
    wanted: Mapping[int, Code] = {number: _call([*decide(call, ptrace=ptrace)]) for call, number in NUMBERS[machine].items()}
    unknown = [_answer(UNKNOWN)]
    found: list[tuple[int, Code]] = [(0, wanted.get(0, unknown))]
    for number in range(1, max(wanted) + 2):
        code = wanted.get(number, unknown)
        if code != found[-1][1]:
            found.append((number, code))
    # A program of the other convention ends at once, as one for a 32-bit machine does; -1 is a common way to ask for no call at all.
    return found + ([(_X32, [_answer(KILL)]), (0xFFFFFFFF, unknown)] if machine == "x86_64" else [])


def _search(intervals: Sequence[tuple[int, Code]]) -> Code:
    """A balanced tree of comparisons: some seven of them find any call."""
    if len(intervals) == 1:
        return intervals[0][1]
    middle = len(intervals) // 2
    below, above = _search(intervals[:middle]), _search(intervals[middle:])
    start = intervals[middle][0]
    if len(below) <= _FARTHEST:
        return [_jump(_JGE, start, len(below), 0), *below, *above]
    return [_jump(_JGE, start, 0, 1), (_JA, 0, 0, len(below)), *below, *above]


def _call(rules: Sequence[Rule]) -> Code:
    """The rules of one call, one behind the other."""
    code: Code = []
    for rule in reversed(rules):
        code = [*_rule(rule), *code]
    return code


def _rule(rule: Rule) -> Code:
    """Checks that jump behind the rule when they do not hold, then its answer."""
    code = [_answer(rule.action)]
    for check in reversed(rule.when):
        code = [*_check(check, len(code)), *code]
    return code


def _check(check: Check, rest: int) -> Code:
    """Goes on if the condition holds, else `rest` instructions further."""
    code = [_load(_ARGUMENTS + 8 * check.argument)]
    if check.mask != 0xFFFFFFFF:
        code.append((_AND, 0, 0, check.mask))
    if check.kind == "any bit of":
        return [*code, _jump(_JSET, check.values[0], 0, rest)]
    wanted = check.kind == "in"
    for left in range(len(check.values) - 1, -1, -1):
        on_match = left if wanted else left + rest
        at_end = 0 if left or not wanted else rest
        code.append(_jump(_JEQ, check.values[-1 - left], on_match, at_end))
    return code


# The page

_WORDS = {
    ALLOW: "allowed", KILL: "killed", EPERM: "`EPERM`", ENOSYS: "`ENOSYS`", EAFNOSUPPORT: "`EAFNOSUPPORT`",
    EPROTONOSUPPORT: "`EPROTONOSUPPORT`", ENOPROTOOPT: "`ENOPROTOOPT`",
    EOPNOTSUPP: "`EOPNOTSUPP`",
}  # fmt: skip


def markdown() -> str:
    """The table of docs/threat-model.md, row by row what the filter does."""
    lines = ["| system calls | when | answer | why |", "|---|---|---|---|"]
    lines.append("| any | another calling convention than the machine's own: 32-bit programs, x32 | killed | other numbers, other holes |")
    for rule in RULES:
        calls = ", ".join(f"`{call}`" for call in rule.calls.split())
        answer = _WORDS[rule.action] + (", allowed by `--sandbox-ptrace`" if rule.debugging else "")
        lines.append(f"| {calls} | {rule.condition} | {answer} | {rule.why} |")
    lines.append(f"| all others | not in this table, such as calls newer than Linux 6.19 | {_WORDS[UNKNOWN]} | nobody has looked at them |")
    return "\n".join(lines)
