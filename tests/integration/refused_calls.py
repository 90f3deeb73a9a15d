"""System calls as somebody hostile would make them, each with the answer that the filter has to give. Run inside a sandbox as a program.

Prints as JSON what came of each: the error's name, or `done`. The arguments are such that a call that went through would do no harm.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
from typing import Any

ANYWHERE = -100
BAD = -1
"""A descriptor that is none, a pointer to nowhere."""
NEWUSER, NEWNS, NEWPID, NEWTIME = 0x10000000, 0x20000, 0x20000000, 0x80
X32 = 0x40000000

# name: call, arguments, the filter's answer
CALLS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "clone into a user namespace": ("clone", (NEWUSER | NEWPID, 0, 0, 0, 0), "EPERM"),
    "clone with flags above 32 bits": ("clone", (1 << 40 | NEWUSER, 0, 0, 0, 0), "EPERM"),
    "unshare a user namespace": ("unshare", (NEWUSER,), "EPERM"),
    "unshare a mount namespace": ("unshare", (NEWNS,), "EPERM"),
    "unshare a time namespace": ("unshare", (NEWTIME,), "EPERM"),
    "enter a namespace": ("setns", (BAD, 0), "EPERM"),
    "clone3": ("clone3", (0, 0), "ENOSYS"),
    "type into a terminal (TIOCSTI)": ("ioctl", (BAD, 0x5412, 0), "EPERM"),
    "TIOCSTI behind bits that the kernel ignores": ("ioctl", (BAD, 0xABCD00005412, 0), "EPERM"),
    "TIOCLINUX": ("ioctl", (BAD, 0x541C, 0), "EPERM"),
    "set a line discipline (TIOCSETD)": ("ioctl", (BAD, 0x5423, 0), "EPERM"),
    "change the project of a quota": ("ioctl", (BAD, 0x401C5820, 0), "EPERM"),
    "AF_VSOCK": ("socket", (40, 1, 0), "EAFNOSUPPORT"),
    "AF_VSOCK behind bits that the kernel ignores": ("socket", (1 << 32 | 40, 1, 0), "EAFNOSUPPORT"),
    "AF_ALG": ("socket", (38, 5, 0), "EAFNOSUPPORT"),
    "AF_PACKET": ("socket", (17, 3, 0), "EAFNOSUPPORT"),
    "AF_KEY": ("socket", (15, 3, 2), "EAFNOSUPPORT"),
    "AF_RDS": ("socket", (21, 5, 0), "EAFNOSUPPORT"),
    "AF_CAN": ("socket", (29, 3, 1), "EAFNOSUPPORT"),
    "AF_TIPC": ("socket", (30, 1, 0), "EAFNOSUPPORT"),
    "AF_BLUETOOTH": ("socket", (31, 3, 1), "EAFNOSUPPORT"),
    "AF_XDP": ("socket", (44, 3, 0), "EAFNOSUPPORT"),
    "a family that nobody has": ("socket", (999, 1, 0), "EAFNOSUPPORT"),
    "netfilter by netlink": ("socket", (16, 3, 12), "EPROTONOSUPPORT"),
    "crypto by netlink": ("socket", (16, 3, 21), "EPROTONOSUPPORT"),
    "a raw socket": ("socket", (2, 3, 1), "EPROTONOSUPPORT"),
    "DCCP": ("socket", (2, 6, 33), "EPROTONOSUPPORT"),
    "SCTP": ("socket", (10, 1, 132), "EPROTONOSUPPORT"),
    "MPTCP": ("socket", (2, 1, 262), "EPROTONOSUPPORT"),
    "a pair of TIPC sockets": ("socketpair", (30, 1, 0, 0), "EAFNOSUPPORT"),
    "kernel TLS on a connection": ("setsockopt", (BAD, 6, 31, 0, 0), "ENOPROTOOPT"),
    "take disk without writing": ("fallocate", (BAD, 0, 0, 1), "ENOTSUP"),
    "take disk without making a file longer": ("fallocate", (BAD, 1, 0, 1), "ENOTSUP"),
    "take disk by a request of XFS": ("ioctl", (BAD, 0x4030582A, 0), "ENOTSUP"),
    "executable memory wherever it can be read": ("personality", (0x400000,), "EPERM"),
    "io_uring": ("io_uring_setup", (1, BAD), "ENOSYS"),
    "io_uring, a ring of somebody's": ("io_uring_enter", (BAD, 0, 0, 0, 0, 0), "ENOSYS"),
    "io_uring, registering": ("io_uring_register", (BAD, 0, 0, 0), "ENOSYS"),
    "find the user's keyring": ("keyctl", (0, -4, 1), "EPERM"),
    "list the user's keys": ("keyctl", (11, -4, 0, 0), "EPERM"),
    "add a key": ("add_key", (BAD, BAD, 0, 0, -4), "EPERM"),
    "request a key": ("request_key", (BAD, BAD, 0, 0), "EPERM"),
    "bpf": ("bpf", (0, 0, 0), "EPERM"),
    "perf events": ("perf_event_open", (BAD, 0, -1, -1, 0), "EPERM"),
    "userfaultfd": ("userfaultfd", (1,), "EPERM"),
    "trace a process": ("ptrace", (1, 999999, 0, 0), "EPERM"),
    "read a process's memory": ("process_vm_readv", (os.getpid(), 0, 0, 0, 0, 0), "EPERM"),
    "write a process's memory": ("process_vm_writev", (os.getpid(), 0, 0, 0, 0, 0), "EPERM"),
    "take a process's descriptor": ("pidfd_getfd", (BAD, 0, 0), "EPERM"),
    "compare processes": ("kcmp", (os.getpid(), os.getpid(), 1, 0, 0), "EPERM"),
    "advise about a process's memory": ("process_madvise", (BAD, 0, 0, 0, 0), "EPERM"),
    "reap a process's memory": ("process_mrelease", (BAD, 0), "EPERM"),
    "mount": ("mount", (BAD, BAD, BAD, 0, 0), "EPERM"),
    "unmount": ("umount2", (BAD, 0x1000), "EPERM"),
    "change the root": ("pivot_root", (BAD, BAD), "EPERM"),
    "chroot": ("chroot", (BAD,), "EPERM"),
    "move_mount": ("move_mount", (BAD, 0, BAD, 0, 0x1000000), "EPERM"),
    "open_tree": ("open_tree", (BAD, 0, 0x40000000), "EPERM"),
    "open_tree_attr": ("open_tree_attr", (BAD, 0, 0x40000000, 0, 0), "EPERM"),
    "fsopen": ("fsopen", (BAD, 0), "EPERM"),
    "fsconfig": ("fsconfig", (BAD, 0, 0, 0, 0), "EPERM"),
    "fsmount": ("fsmount", (BAD, 0, 0), "EPERM"),
    "fspick": ("fspick", (BAD, 0, 0), "EPERM"),
    "mount_setattr": ("mount_setattr", (BAD, 0, 0, 0, 0), "EPERM"),
    "statmount": ("statmount", (0, 0, 0, 0), "ENOSYS"),
    "listmount": ("listmount", (0, 0, 0, 0), "ENOSYS"),
    "listns": ("listns", (0, 0, 0, 0), "ENOSYS"),
    "a file's handle": ("name_to_handle_at", (ANYWHERE, 0, 0, 0, 0), "EPERM"),
    "open by handle": ("open_by_handle_at", (BAD, 0, 0), "EPERM"),
    "fanotify": ("fanotify_init", (BAD, 0), "EPERM"),
    "fanotify, watching": ("fanotify_mark", (BAD, 0, 0, 0, 0), "EPERM"),
    "swap on": ("swapon", (BAD, 0), "EPERM"),
    "swap off": ("swapoff", (BAD,), "EPERM"),
    "reboot": ("reboot", (0, 0, 0, 0), "EPERM"),
    "kexec": ("kexec_load", (0, 0, 0, 0), "EPERM"),
    "kexec from files": ("kexec_file_load", (BAD, BAD, 0, 0, 0), "EPERM"),
    "load a module": ("init_module", (0, 0, 0), "EPERM"),
    "load a module from a file": ("finit_module", (BAD, 0, 0), "EPERM"),
    "unload a module": ("delete_module", (BAD, 0), "EPERM"),
    "process accounting": ("acct", (BAD,), "EPERM"),
    "quotas": ("quotactl", (BAD, 0, 0, 0), "EPERM"),
    "quotas by descriptor": ("quotactl_fd", (BAD, BAD, 0, 0), "EPERM"),
    "the kernel's log": ("syslog", (99, 0, 0), "EPERM"),
    "hang up the terminal": ("vhangup", (), "EPERM"),
    "set the time": ("settimeofday", (BAD, BAD), "EPERM"),
    "set a clock": ("clock_settime", (999, BAD), "EPERM"),
    "adjust a clock": ("clock_adjtime", (999, BAD), "EPERM"),
    "adjust the clock": ("adjtimex", (BAD,), "EPERM"),
    "name the host": ("sethostname", (BAD, 1 << 20), "EPERM"),
    "name the domain": ("setdomainname", (BAD, 1 << 20), "EPERM"),
    "hardware ports": ("iopl", (9,), "EPERM"),
    "a hardware port": ("ioperm", (1 << 40, 1, 1), "EPERM"),
    "segments": ("modify_ldt", (0, 0, 0), "EPERM"),
    "migrate pages": ("migrate_pages", (os.getpid(), 0, 0, 0), "EPERM"),
    "move pages": ("move_pages", (0, 0, 0, 0, 0, 0), "EPERM"),
    "home node": ("set_mempolicy_home_node", (1, 0, 0, 1), "EPERM"),
    "secret memory": ("memfd_secret", (BAD,), "ENOSYS"),
    "the state of the page cache": ("cachestat", (BAD, 0, 0, 0), "ENOSYS"),
    "security attributes": ("lsm_get_self_attr", (0, 0, 0, 0), "ENOSYS"),
    "set security attributes": ("lsm_set_self_attr", (0, 0, 0, 0), "ENOSYS"),
    "list security modules": ("lsm_list_modules", (0, 0, 0), "ENOSYS"),
    "set a file's attributes the new way": ("file_setattr", (BAD, 0, 0, 0, 0x1000000), "ENOSYS"),
    "uselib": ("uselib", (BAD,), "ENOSYS"),
    "ustat": ("ustat", (0, 0), "ENOSYS"),
    "sysfs": ("sysfs", (3, 0, 0), "ENOSYS"),
    "sysctl": ("_sysctl", (0,), "ENOSYS"),
    "nfsservctl": ("nfsservctl", (0, 0, 0), "ENOSYS"),
    "a directory cookie": ("lookup_dcookie", (0, 0, 0), "ENOSYS"),
}
TELLING = {
    "TIOCSTI behind bits that the kernel ignores", "a file's handle", "a raw socket", "adjust the clock",
    "change the project of a quota", "clone3", "enter a namespace", "executable memory wherever it can be read",
    "kernel TLS on a connection", "mount", "mount_setattr", "open_tree", "read a process's memory", "set a clock",
    "set a line discipline (TIOCSETD)", "take a process's descriptor", "take disk without writing",
    "take disk without making a file longer", "take disk by a request of XFS", "trace a process", "type into a terminal (TIOCSTI)",
    "unmount", "unshare a user namespace", "write a process's memory",
}  # fmt: skip
"""Calls that any kernel answers otherwise when nothing stands before it."""


def attempt(numbers: dict[str, int]) -> dict[str, str]:
    """What comes of each call that this machine has."""
    libc = ctypes.CDLL(None, use_errno=True)
    return {name: _try(libc, numbers[call], arguments) for name, (call, arguments, _) in CALLS.items() if call in numbers}


def _try(libc: Any, number: int, arguments: tuple[int, ...]) -> str:
    ctypes.set_errno(0)
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    done = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(_signed(value)) for value in padded))
    return "done" if done != -1 else errno.errorcode[ctypes.get_errno()]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def end_of_child(deed: Any) -> str:
    """How a child ended that did something it may not survive."""
    child = os.fork()
    if child == 0:
        os._exit(deed())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return signal.Signals(-code).name if code < 0 else str(code)


def call_x32(number: int) -> int:
    """0 if the second calling convention answers."""
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(ctypes.c_long(X32 | number)) < 0)


def call_i386() -> int:
    """0 if a 32-bit `getpid` answers: mov eax, 20; int 0x80; ret."""
    import mmap

    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    return int(function() != os.getpid())


def main() -> None:
    numbers = json.loads(sys.argv[1])
    found: dict[str, Any] = {"calls": attempt(numbers), "uid": os.getuid()}
    if os.uname().machine == "x86_64":
        found |= {"x32": end_of_child(lambda: call_x32(numbers["getpid"])), "i386": end_of_child(call_i386)}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
