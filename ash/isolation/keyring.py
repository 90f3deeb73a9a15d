"""Parts this server from the key ring of whoever started it: sandboxes inherit a session keyring, and could read what is in it.

Never reads, adds or removes a key.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

# The system call's number; no library that is always there wraps it.
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280, "armv7l": 311, "i686": 288}
_JOIN_SESSION_KEYRING = 1


def leave_session_keyring() -> str:
    """Give the calling thread, and each process it starts from now on, an empty session keyring. Returns why it could not.

    Credentials belong to threads in Linux: call it in the thread that starts the sandboxes.
    """
    number = KEYCTL.get(platform.machine())
    if number is None:
        return f"the keyring's system call is not known for {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), ctypes.c_long(_JOIN_SESSION_KEYRING), None) >= 0:
        return ""
    code = ctypes.get_errno()
    # A kernel without keyrings, or a container whose filter forbids them: sandboxes, which inherit the filter, have none either.
    return "" if code in (errno.ENOSYS, errno.EPERM) else os.strerror(code)
