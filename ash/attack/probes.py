"""What somebody hostile tries from inside a sandbox: one table of shell commands. Pure data; runs nothing.

Each command exits 0 if the attack worked, with a proof on stdout that gives nothing away, and 77 if it cannot be tried. Names in
braces are facts: things that whoever attacks has really put there, or that are true of this host. A probe takes away again what
it made. `is_harmless` says that nothing comes to harm even where nothing stops it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import NamedTuple

from ash.attack import scripts

CANNOT = 77
"""Exit code of a probe that cannot be tried here; its output says why."""

# The layers that the probes attack: each is the beginning of a row of docs/threat-model.md.
NEVER_ROOT = "never root on the host"
NAMESPACES = "namespaces"
NO_CAPABILITY = "no capability"
SECCOMP = "a filter of system calls"
MOUNTS = "deny-by-default mounts"
READ_ONLY = "read-only"
NO_NETWORK = "no network but loopback"
SOCKETS = "three sockets only"
ENVIRONMENT = "an environment built from nothing"
CGROUPS = "cgroup v2"
RLIMITS = "rlimits"
DISK = "a quota on the session's files"
KEYRING = "the server leaves the session keyring"
DUMPABLE = "the bridge is not dumpable"
GATEWAY = "the model gateway"
ADDRESSES = "a name is resolved once"

ATTACKER, LIMITED = "attacker", "limited"
"""The sessions that probes run in. The second one has small limits, and may die of its probes."""


class Probe(NamedTuple):
    """One attack from inside. `layer` is what should stop it."""

    name: str
    layer: str
    command: str
    is_harmless: bool = True
    session: str = ATTACKER
    needs: tuple[str, ...] = ()
    """Facts that have to hold, besides those in the command."""

    @property
    def id(self) -> str:
        return identify(self.name)

    @property
    def facts(self) -> tuple[str, ...]:
        """The facts without which it cannot be tried."""
        return tuple(name for name in FACTS if "{" + name + "}" in self.command or name in self.needs)

    def fill(self, facts: Mapping[str, object]) -> str:
        """The command with the facts filled in."""
        command = self.command
        for name in self.facts:
            command = command.replace("{" + name + "}", shlex.quote(str(facts[name])))
        return command


FACTS = (
    "python",  # an interpreter inside
    "gateway",  # the socket to the models inside
    "data_dir", "canary_file",  # the server's data folder, a file in it that every user of the host may read
    "other",  # another session's folder on the host, with the files workspace/secret and home/secret
    "other_gateway",  # the socket on which another session's gateway listens, on the host
    "project",  # the folder of the server's program
    "server_pid", "server_start",  # the process of the server, or another one that a sandbox must not reach, and its start time
    "marker",  # a text in the environment and in the arguments of a process of the host
    "port",  # a TCP port on the host's loopback whose service answers HTTP with the word "canary"
    "host_socket", "abstract",  # sockets of the host that every user may connect to
    "key_name",  # a key in the session keyring that the server was started with
    "key_head", "key_tail",  # the two halves of a valid API key: a command that held the whole would find itself
    "file_bytes", "memory_bytes", "tmp_bytes", "processes",  # the limits in force
    "group_memory_bytes", "cpu_percent", "disk_bytes", "files",  # the limits in force that a cgroup or a quota has to hold
    "no_ptrace",  # debuggers are not allowed here (`--sandbox-ptrace`)
    "egress",  # where the proxy for everything but models is found inside
    "provider",  # the name of a model provider that wants a key
)  # fmt: skip


def identify(name: str) -> str:
    """`read root's home` as `read-roots-home`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("'", "")).strip("-")


def _python(script: str, *arguments: str) -> str:
    return " ".join(["{python} -I -c", shlex.quote(script), *arguments])


def _connect(family: str, address: str, *arguments: str) -> str:
    script = f"import socket, sys\ns = socket.socket(socket.{family})\ns.settimeout(2)\ns.connect({address})\nprint('connected')"
    return _python(script, *arguments)


def _kernel(group: str) -> str:
    return _python(scripts.SYSTEM_CALLS, shlex.quote(repr(scripts.CALLS[group])))


# Tries to make a file in each folder, and says where it could.
_TOUCH = 'for d in {folders}; do f="$d/.ash-attack-$$"; (: > "$f") 2> /dev/null && rm -f "$f" && echo "$d"; done | grep .'


def _touch(*folders: str) -> str:
    return _TOUCH.replace("{folders}", " ".join(folders))


_FILES = (
    Probe("read root's home", MOUNTS, "ls -A /root > /dev/null && echo listed"),
    Probe("list the homes of others", MOUNTS, "ls -A /home | grep -v '^agent$'"),
    Probe("read the host's passwords", MOUNTS, "wc -c < /etc/shadow"),
    Probe("see the host's users", MOUNTS, "grep -c -v -e '^root:' -e '^agent:' -e '^nobody:' /etc/passwd"),
    Probe("read a file of the data folder", MOUNTS, "wc -c < {canary_file}"),
    Probe("list the data folder", MOUNTS, "ls {data_dir} | wc -l | grep -v '^0$'"),
    Probe("read another session's file", MOUNTS, "wc -c < {other}/workspace/secret"),
    Probe("read another session's file through the workspace", MOUNTS, "wc -c < ../../$(basename {other})/workspace/secret"),
    Probe("follow a link out of the workspace", MOUNTS, "ln -sfn {canary_file} link && wc -c < link; code=$?; rm -f link; exit $code"),
    Probe("read the server's program", MOUNTS, "ls {project} | wc -l | grep -v '^0$'"),
    Probe("look into /sys", MOUNTS, "ls -d /sys/kernel /sys/fs"),
    Probe("look into /run and /var", MOUNTS, "(ls -A /var; ls -A /run | grep -v '^ash$') 2> /dev/null | grep ."),
    Probe("see the disks", MOUNTS, "ls /dev | grep -E '^(sd|vd|nvme|xvd|loop|kmsg|mem|kvm|fuse)'"),
    Probe("write into the agent", READ_ONLY, _touch("/agent", "/agent/.claude") + " || (: >> /agent/CLAUDE.md && echo opened)"
          " || (chmod 777 /agent && echo changed)"),
    Probe("write into the system", READ_ONLY,
          _touch("/", "/usr", "/usr/bin", "/etc", "/opt", "/opt/ash", "/home", "/dev", "/proc", "/run")),
    Probe("change the bridge", READ_ONLY, ": >> /opt/ash/bridge.zip && echo opened"),
    Probe("put something in place of the gateway's socket", READ_ONLY, _touch("/run/ash") + " || mv /run/ash /run/ash2"
          " || ln -s /tmp/x /run/ash/gateway.sock"),
    Probe("make the agent writable", READ_ONLY, "mount -o remount,rw /agent || mount -o remount,bind,rw /agent"),
)  # fmt: skip

_CORE_PATTERN = "/proc/sys/kernel/core_pattern"
_KERNEL = (
    Probe("change the core pattern", NEVER_ROOT,
          f'v=$(cat {_CORE_PATTERN}) && (printf "%s" "$v" > {_CORE_PATTERN}) && echo "written, with the same value"'),
    Probe("become root", NEVER_ROOT, "test $(id -u) = 0 || su -c true || setpriv --reuid 0 true || false"),
    Probe("keep groups of the server", NEVER_ROOT, "id -G | grep -v '^1000$'"),
    Probe("change any setting", NAMESPACES,
          "find /proc/sys -type f -writable 2> /dev/null | head -50"
          " | while read -r f; do (: >> $f) 2> /dev/null && echo $f; done | grep ."),
    Probe("trigger sysrq", NAMESPACES, "echo h > /proc/sysrq-trigger", is_harmless=False),
    Probe("mount something", NO_CAPABILITY,
          "d=$(mktemp -d) && (mount -t tmpfs none $d || mount --bind /tmp $d) && umount $d; code=$?; rmdir $d; exit $code",
          is_harmless=False),
    Probe("uncover what is mounted over", NO_CAPABILITY, "umount /proc/sys || umount -l /agent || umount -l /etc",
          is_harmless=False),
    Probe("make a device", NO_CAPABILITY,
          "for f in /tmp/.ash-attack-$$ ./.ash-attack-$$; do mknod $f b 254 0 && rm -f $f && echo $f; done | grep .",
          is_harmless=False),
    Probe("make a user namespace", NO_CAPABILITY, "unshare --user true || unshare --user --map-root-user true"),
    Probe("make any other namespace", NO_CAPABILITY,
          "unshare --mount true || unshare --net true || unshare --pid --fork true || unshare --uts true"),
    Probe("hold a capability", NO_CAPABILITY, "grep -E '^Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status | grep -v '0000000000000000'"),
    Probe("gain privileges by executing", NO_CAPABILITY, "grep '^NoNewPrivs:.*0' /proc/self/status"),
    Probe("dump core", RLIMITS, "test $(ulimit -H -c) != 0 && ulimit -H -c"),
    Probe("run without a filter", SECCOMP, "grep '^Seccomp:.*0' /proc/self/status"),
)  # fmt: skip

# One probe for each group of system calls, and what a list of calls does not show.
_SECCOMP = (
    *(Probe(name, SECCOMP, _kernel(group)) for name, group in (
        ("use io_uring", "io_uring"), ("use the kernel's keyrings", "keyctl"), ("load a BPF program", "bpf"),
        ("measure the processor", "perf"), ("handle page faults of the kernel", "userfaultfd"), ("use the new mount API", "mount"),
        ("take descriptors of other processes", "descriptors"), ("change the kernel", "modules"), ("open files by their handle", "handles"),
        ("enter namespaces", "namespaces"), ("use system calls of another ABI", "x32"), ("start a process by clone3", "clone3"),
    )),
    Probe("steer other processes as a debugger does", SECCOMP, _kernel("ptrace"), needs=("no_ptrace",)),
    Probe("talk to the host over vsock and other families", SECCOMP, _python(scripts.FAMILIES)),
    Probe("type into the terminal of another", SECCOMP, _python(scripts.TERMINAL)),
    Probe("make 32-bit system calls", SECCOMP, _python(scripts.INT80)),
)  # fmt: skip

_PROCESSES = (
    Probe("see processes of the host", NAMESPACES, "test $(ls -d /proc/[0-9]* | wc -l) -gt 14 && ls -d /proc/[0-9]* | wc -l"),
    Probe("find a process of the host by its name", NAMESPACES, _python(scripts.FIND_IN_PROC, "cmdline", "{marker}")),
    Probe("signal the server", NAMESPACES,
          "kill -0 {server_pid} && test \"$(sed 's/.*) //' /proc/{server_pid}/stat | cut -d' ' -f20)\" = {server_start} && echo reached"),
    Probe("read the first process's environment", ENVIRONMENT,
          "tr '\\0' '\\n' < /proc/1/environ | grep -a -E -v '^(PATH|LANG|PWD|OLDPWD|SHLVL|_)=' | cut -d= -f1 | grep ."),
    Probe("find a secret in an environment", ENVIRONMENT, _python(scripts.FIND_IN_PROC, "environ", "{marker}")),
    Probe("find a secret in a command line", ENVIRONMENT,
          "for n in 1 2; do tr '\\0' '\\n' < /proc/$n/cmdline | grep -a -o -e canary -e secret -e {data_dir}; done | grep ."),
    Probe("find an open file of the server", ENVIRONMENT, "ls -l /proc/[0-9]*/fd 2> /dev/null | grep -o -e 'ash[.]db' -e canary -e 'mnt:'"),
    Probe("find an API key", ENVIRONMENT, _python(scripts.FIND_KEY_TEXT, "{key_head}", "{key_tail}")),
    Probe("find a key in the server's session keyring", KEYRING, _python(scripts.SEARCH_KEYRING, "{key_name}")),
    Probe("take the bridge's sockets", DUMPABLE, _python(scripts.TAKE_SOCKETS)),
)  # fmt: skip

_HOSTS = ("127.0.0.1", "localhost", "'[::1]'", "'[::ffff:127.0.0.1]'", "0.0.0.0", "2130706433", "0x7f.1", "127.1")
_METADATA = (
    "169.254.169.254:80", "'[::ffff:169.254.169.254]:80'", "'[fd00:ec2::254]:80'", "2852039166:80", "metadata.google.internal:80",
    "100.100.100.200:80",
)  # fmt: skip
_NETWORK = (
    Probe("reach the internet", NO_NETWORK, _connect("AF_INET", "('1.1.1.1', 53)")),
    Probe("reach the metadata service", NO_NETWORK, _connect("AF_INET", "('169.254.169.254', 80)")),
    Probe("reach a port of the host", NO_NETWORK, _connect("AF_INET", "('127.0.0.1', int(sys.argv[1]))", "{port}")),
    Probe("resolve a name", NO_NETWORK, _python("import socket; print(socket.getaddrinfo('example.com', 80)[0][4][0])")),
    Probe("have a network card", NO_NETWORK, "grep -o -E '^ *[a-z0-9]+:' /proc/net/dev | grep -v ' lo:'"),
    Probe("connect to a socket of the host", SOCKETS, _connect("AF_UNIX", "sys.argv[1]", "{host_socket}")),
    Probe("connect to an abstract socket of the host", NO_NETWORK, _connect("AF_UNIX", "'\\0' + sys.argv[1]", "{abstract}")),
    Probe("reach its own bridge's socket", SOCKETS, "find / -xdev -type s 2> /dev/null | grep -v -E '^/run/ash/(gateway|egress)[.]sock$'"),
    Probe("reach another session's gateway", SOCKETS, _connect("AF_UNIX", "sys.argv[1]", "{other_gateway}")),
    Probe("reach the host through the gateway with a forged Host", GATEWAY,
          _python(scripts.THROUGH_GATEWAY, "{gateway}", "{port}", *_HOSTS)),
    Probe("reach other paths of the provider", GATEWAY, _python(scripts.OTHER_PATHS, "{gateway}")),
    Probe("use a key of its own at the provider", GATEWAY, _python(scripts.OWN_KEY, "{gateway}", "{provider}")),
    Probe("reach metadata addresses through the proxy", ADDRESSES, _python(scripts.THROUGH_PROXY, "{egress}", "''", *_METADATA)),
    Probe("reach the host through the proxy", ADDRESSES,
          _python(scripts.THROUGH_PROXY, "{egress}", "canary", *(f"{host}:{{port}}" for host in _HOSTS))),
)  # fmt: skip

_LIMITS = (
    Probe("write a file beyond the limit", RLIMITS, _python(scripts.LARGE_FILE, "{file_bytes}"), session=LIMITED),
    Probe("fill /tmp beyond the limit", RLIMITS, _python(scripts.FILL, "/tmp", "{tmp_bytes}", "{file_bytes}"), session=LIMITED),
    Probe("fill /dev/shm beyond the limit", RLIMITS, _python(scripts.FILL, "/dev/shm", "{tmp_bytes}", "{file_bytes}"), session=LIMITED),
    Probe("take memory beyond the limit", RLIMITS,
          _python("import sys; bytearray(int(sys.argv[1]) * 2 + (64 << 20))", "{memory_bytes}"), session=LIMITED),
    Probe("start processes beyond the limit", RLIMITS, _python(scripts.FORK, "{processes}"), session=LIMITED),
    Probe("lift a limit", RLIMITS, "ulimit -H -n 1000000 || ulimit -H -f unlimited || prlimit --nproc=100000 true || false",
          session=LIMITED),
    Probe("take memory beyond the limit with many processes", CGROUPS,
          _python(scripts.MANY_PROCESSES, "{group_memory_bytes}"), session=LIMITED),
    Probe("take more of the processor than the limit", CGROUPS, _python(scripts.SPIN, "{cpu_percent}"), session=LIMITED),
    Probe("fill the disk beyond the limit", DISK, _python(scripts.FILL_DISK, "{disk_bytes}", "{file_bytes}"), session=LIMITED),
    Probe("make files beyond the limit", DISK, _python(scripts.MAKE_FILES, "{files}"), session=LIMITED),
)  # fmt: skip

PROBES = (*_FILES, *_KERNEL, *_SECCOMP, *_PROCESSES, *_NETWORK, *_LIMITS)
