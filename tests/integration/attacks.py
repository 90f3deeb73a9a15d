"""What somebody hostile tries from inside a sandbox. Each attack is a shell command that exits 0 if it worked. Pure data.

Names in braces are filled in by `commands`: they stand for things of the host that the test has really put there.
"""

from __future__ import annotations

_PYTHON = "/usr/bin/python3 -I -c"

# -3 is the session keyring; 10 searches it, 11 reads a key.
_FIND_KEY = """
import ctypes, sys
libc = ctypes.CDLL(None)
key = libc.syscall({keyctl}, 10, -3, b"user", b"{key_name}", 0)
buffer = ctypes.create_string_buffer(64)
sys.exit(not (key > 0 and libc.syscall({keyctl}, 11, key, buffer, 64) > 0))
"""
# 438 is pidfd_getfd.
_TAKE_SOCKETS = """
import ctypes, os, stat, sys
libc = ctypes.CDLL(None)
for pid in filter(str.isdigit, os.listdir("/proc")):
    if b"--listen-fd" in open(f"/proc/{pid}/cmdline", "rb").read().split(b"\\0"):
        fd = os.pidfd_open(int(pid))
        taken = [libc.syscall(438, fd, number, 0) for number in range(3, 30)]
        if any(own >= 0 and stat.S_ISSOCK(os.fstat(own).st_mode) for own in taken):
            sys.exit(0)
sys.exit(1)
"""

ATTACKS = {
    # files of the host
    "read root's home": "ls /root",
    "list the homes of others": "ls -A /home | grep -v '^agent$'",
    "read the host's passwords": "cat /etc/shadow",
    "see the host's users": "grep -v -e '^root:' -e '^agent:' -e '^nobody:' /etc/passwd",
    "read a file of the data folder": "cat {data_dir}/canary",
    "list the data folder": "ls {data_dir}",
    "read another session's file": "cat {other}/workspace/secret",
    "read another session's file through the workspace": "cat /workspace/../../other/workspace/secret /workspace/../secret",
    "follow a link out of the workspace": "ln -sf {data_dir}/canary /workspace/link && cat /workspace/link",
    "read the server's program": "ls {project}",
    "look into /sys": "ls /sys/kernel /sys/fs",
    "look into /run and /var": "ls /var; ls -A /run | grep -v '^ash$'",
    "see the disks": "ls /dev | grep -E '^(sd|vd|nvme|xvd|loop|kmsg|mem|kvm|fuse)'",
    # files that must not change
    "write into the agent": "touch /agent/x || echo x >> /agent/CLAUDE.md || rm -f /agent/CLAUDE.md || chmod 777 /agent",
    "write into the system": "touch /x || touch /usr/x || touch /etc/x || touch /opt/ash/x || touch /home/x || touch /dev/x",
    "change the bridge": "echo x >> /opt/ash/bridge.zip",
    "put something in place of the gateway's socket": "touch /run/ash/x || mv /run/ash /run/ash2 || ln -s /tmp/x /run/ash/gateway.sock",
    "make the agent writable": "mount -o remount,rw /agent || mount -o remount,bind,rw /agent",
    # the kernel
    "change the core pattern": "echo '|/tmp/x' > /proc/sys/kernel/core_pattern",
    "change any setting": "find /proc/sys -type f -writable 2>/dev/null | head -50 | while read f; do cat $f >$f && echo $f; done | grep .",
    "trigger sysrq": "echo h > /proc/sysrq-trigger",
    "mount something": "mount -t tmpfs none /tmp || mount --bind /tmp /workspace || umount /proc/sys",
    "make a device": "mknod /tmp/disk b 254 0 || mknod /workspace/disk b 254 0",
    "make a user namespace": "unshare --user true || unshare --user --map-root-user true",
    "make any other namespace": "unshare --mount true || unshare --net true || unshare --pid --fork true || unshare --uts true",
    "hold a capability": "grep -E '^Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status | grep -v '0000000000000000'",
    "gain privileges by executing": "grep '^NoNewPrivs:.*0' /proc/self/status",
    "become root": "test $(id -u) = 0 || su -c true || setpriv --reuid 0 true",
    "keep groups of the server": "id -G | grep -v '^1000$'",
    "dump core": "test $(ulimit -c) != 0",
    # processes of the host
    "see processes of the host": "test $(ls -d /proc/[0-9]* | wc -l) -gt 12",
    "signal the server": "kill -0 {server_pid}",
    "find a secret in an environment": "cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep -a canary",
    "find a secret in a command line": "cat /proc/1/cmdline /proc/2/cmdline | tr '\\0' '\\n' | grep -a -e canary -e secret -e {data_dir}",
    "find an open file of the server": "ls -l /proc/[0-9]*/fd 2>/dev/null | grep -e ash.db -e canary -e mnt:",
    "find a key in the server's session keyring": _PYTHON + f" '{_FIND_KEY}'",
    "take the bridge's sockets": _PYTHON + f" '{_TAKE_SOCKETS}'",
    # network and sockets
    "reach the internet": _PYTHON + " 'import socket; socket.create_connection((\"1.1.1.1\", 53), 2)'",
    "reach the metadata service": _PYTHON + " 'import socket; socket.create_connection((\"169.254.169.254\", 80), 2)'",
    "reach a port of the host": _PYTHON + " 'import socket; socket.create_connection((\"127.0.0.1\", {port}), 2)'",
    "resolve a name": _PYTHON + " 'import socket; socket.getaddrinfo(\"example.com\", 80)'",
    "have a network card": "grep -v -e lo: -e Inter -e face /proc/net/dev",
    "connect to a socket of the host": _PYTHON + " 'import socket; socket.socket(socket.AF_UNIX).connect(\"{host_socket}\")'",
    "connect to an abstract socket of the host": _PYTHON + " 'import socket; socket.socket(socket.AF_UNIX).connect(\"\\0{abstract}\")'",
    "reach its own bridge's socket": "find / -xdev -type s 2>/dev/null | grep -v '^/run/ash/gateway.sock$'",
    "reach another session's gateway": _PYTHON + " 'import socket; socket.socket(socket.AF_UNIX).connect(\"{other_gateway}\")'",
    # limits
    "write a file beyond the limit": "head -c 20000000 /dev/zero > /workspace/big",
    "fill /tmp beyond the limit": "for i in 1 2 3 4 5 6 7 8; do head -c 9000000 /dev/zero > /tmp/$i || exit 1; done",
    "fill /dev/shm beyond the limit": "for i in 1 2 3 4 5 6 7 8; do head -c 9000000 /dev/zero > /dev/shm/$i || exit 1; done",
    "take memory beyond the limit": _PYTHON + " 'x = bytearray(600 << 20)'",
    "lift a limit": "ulimit -H -n 1000000 || ulimit -H -f unlimited || prlimit --nproc=100000 true",
}  # fmt: skip


def commands(**facts: object) -> dict[str, str]:
    """The attacks with the facts of a host filled in."""
    filled = {}
    for name, command in ATTACKS.items():
        for fact, value in facts.items():
            command = command.replace("{" + fact + "}", str(value))
        filled[name] = command
    return filled
