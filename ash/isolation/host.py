"""What this host lacks for isolating agents, in words, with the command that changes it. Reads files; changes nothing."""

from __future__ import annotations

import contextlib
import os

_INSTALL = {
    "debian": "apt-get install -y bubblewrap",
    "ubuntu": "apt-get install -y bubblewrap",
    "fedora": "dnf install -y bubblewrap",
    "rhel": "dnf install -y bubblewrap",
    "centos": "dnf install -y bubblewrap",
    "arch": "pacman -S --noconfirm bubblewrap",
    "alpine": "apk add bubblewrap",
    "suse": "zypper install -y bubblewrap",
    "opensuse": "zypper install -y bubblewrap",
    "nixos": "nix-env -iA nixos.bubblewrap",
}
_CONTAINER_PROC = "start a container with `--security-opt systempaths=unconfined`."
_SAID = {
    "Unknown option": "bubblewrap 0.8 or newer is needed.",
    "max_user_namespaces: Read-only": f"/proc/sys is read-only: take ProtectKernelTunables= out of the systemd unit, or {_CONTAINER_PROC}",
    "uid map: Read-only": f"/proc is read-only: take ReadOnlyPaths= for it out of the systemd unit, or {_CONTAINER_PROC}",
    "Can't mount proc": "Something is mounted over a part of /proc: take ProtectKernelTunables=, ProtectKernelLogs= and whatever names "
    f"a path below /proc out of the systemd unit, or {_CONTAINER_PROC}",
    "overflowuid": "/proc shows processes only: take ProcSubset= out of the systemd unit.",
    "Can't set hostname": "A filter refuses sethostname: take ProtectHostname= out of the systemd unit, and name sethostname in its "
    "SystemCallFilter=.",
    "NETLINK_ROUTE": "Netlink sockets are refused: name AF_NETLINK in RestrictAddressFamilies= of the systemd unit.",
    "make / slave": "A filter refuses mounts: name @mount in SystemCallFilter= of the systemd unit.",
}
"""What bubblewrap says where a systemd unit or a container takes away what it needs, and what to change."""
_KILLED = "A filter of system calls may have ended it: with SystemCallErrorNumber=EPERM in the systemd unit it says which call it was."
_INSIST = "Or start the server with `--sandbox none`, which runs agents unprotected."


def install_command(os_release: str, *, is_root: bool) -> str:
    """The command that installs bubblewrap, for the distribution that the text of /etc/os-release names."""
    fields = dict(line.partition("=")[::2] for line in os_release.splitlines() if "=" in line)
    names = [fields.get("ID", ""), *fields.get("ID_LIKE", "").strip("\"'").split()]
    command = next((_INSTALL[name.strip("\"'")] for name in names if name.strip("\"'") in _INSTALL), None)
    if command is None:
        return "install the package `bubblewrap` with this system's package manager"
    return f"run `{command if is_root else 'sudo ' + command}`"


def install_hint() -> str:
    return install_command(_read("/etc/os-release"), is_root=os.geteuid() == 0)


def explain_missing() -> str:
    return f"Agents cannot be isolated: bubblewrap is not installed. To install it, {install_hint()}. {_INSIST}"


def explain_failure(output: str) -> str:
    """Why bubblewrap does not work here: the kernel setting that forbids it where one is found, and what it said."""
    said = " ".join(output.split())[-400:].rstrip(".")
    cause = next((cause for words, cause in _SAID.items() if words in said), find_cause() if said else _KILLED)
    return f"Agents cannot be isolated: bubblewrap does not work here ({said or 'it gave no reason'}). {cause} {_INSIST}"


def find_cause() -> str:
    sudo = "" if os.geteuid() == 0 else "sudo "
    if _read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").strip() == "1":
        return f"AppArmor restricts user namespaces; run `{sudo}sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`."
    if _read("/proc/sys/kernel/unprivileged_userns_clone").strip() == "0":
        return f"The kernel refuses user namespaces to ordinary users; run `{sudo}sysctl -w kernel.unprivileged_userns_clone=1`."
    if _read("/proc/sys/user/max_user_namespaces").strip() == "0":
        return f"The kernel allows no user namespaces; run `{sudo}sysctl -w user.max_user_namespaces=15000`."
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"):
        options = " ".join(f"--security-opt {name}=unconfined" for name in ("seccomp", "apparmor", "systempaths"))
        return f"In a container, start it with `{options} --cap-add SYS_ADMIN`."
    return (
        "Check that user namespaces work: run `unshare --user --map-root-user true`; "
        "RestrictNamespaces= and SystemCallFilter= of a systemd unit can forbid them."
    )


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""
