"""The systemd unit of an installed Ash, as pure functions: what it says, and what an installed one was asked to be. Runs nothing.

Which directives stand here and which must not, and why, is docs/decisions/0012-test-guest.md; each kind is tried in the guest.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

KINDS = ("root", "user", "dynamic")
STATE_ROOT = "/var/lib"
CACHE_ROOT = "/var/cache"
_SECTION = "[X-Ash]"
"""systemd passes over sections that begin with X-; what `install` was asked stands here, for the next `install`."""

_ROOT_CAPABILITIES = (
    "CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_KILL CAP_NET_BIND_SERVICE CAP_SETGID CAP_SETUID "
    "CAP_SYS_ADMIN CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_RESOURCE"
)
# bubblewrap needs a /proc with nothing mounted over its parts, every kind of namespace, sethostname and a netlink socket.
_HARDENING = """\
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome={protect_home}
PrivateTmp=yes
ProtectKernelModules=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=~@clock @cpu-emulation @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
LimitCORE=0
"""
_UNPRIVILEGED = """\
CapabilityBoundingSet=
PrivateDevices=yes
ProtectClock=yes
ProtectProc=invisible
RemoveIPC=yes
UMask=0077
"""


class Plan(NamedTuple):
    """What is to be installed. `port` 0: whatever the environment file or the default says."""

    name: str
    kind: str
    user: str
    data_dir: str
    port: int
    env_file: str
    python: str
    made_user: bool = False

    @property
    def unit(self) -> str:
        return f"{self.name}.service"

    @property
    def has_state_folder(self) -> bool:
        """Whether systemd itself makes and owns the data folder."""
        return self.data_dir == os.path.join(STATE_ROOT, self.name)


def unit_text(plan: Plan, program: str) -> str:
    """The whole unit file. `program`: where the installed ash.pyz lies."""
    return "\n".join(
        [
            "# Written by `ash service install`, which also replaces it. Your own changes: `systemctl edit " + plan.name + "`.",
            *_about(plan),
            *_process(plan, program),
            *_places(plan),
            *_rights(plan),
            *_memory(plan),
        ]
    )


def _about(plan: Plan) -> list[str]:
    return [
        "[Unit]",
        "Description=Ash" + ("" if plan.name == "ash" else f" ({plan.name})"),
        "After=network.target",
        "StartLimitIntervalSec=120",
        "StartLimitBurst=5",
        "",
    ]


def _process(plan: Plan, program: str) -> list[str]:
    port = f" --port {plan.port}" if plan.port else ""
    return [
        "[Service]",
        "Type=notify",
        f"ExecStart={_quoted(plan.python)} -P {_quoted(program)} start --data-dir {_quoted(plan.data_dir)}{port}",
        "ExecReload=kill -HUP $MAINPID",
        "EnvironmentFile=-" + plan.env_file.replace("%", "%%"),
        f"Environment={_quoted(f'ASH_CACHE_DIR={CACHE_ROOT}/{plan.name}')}",
        # A wrong setting (exit code 2) does not become right by another try.
        "Restart=on-failure",
        "RestartSec=1",
        "RestartPreventExitStatus=2",
        # The first start of a new file unpacks it; a stop lets turns end first.
        "TimeoutStartSec=600",
        "TimeoutStopSec=60",
        # The server ends its sandboxes itself; what is left after it is killed.
        "KillMode=mixed",
        # A sandbox that runs out of memory is no failure of the service.
        "OOMPolicy=continue",
        # Sandboxes get cgroups of their own below the service's.
        "Delegate=yes",
        "TasksMax=infinity",
        "LimitNOFILE=65536",
        "",
    ]


def _places(plan: Plan) -> list[str]:
    lines = [f"CacheDirectory={plan.name}", "CacheDirectoryMode=0700"]
    if plan.has_state_folder:
        lines += [f"StateDirectory={plan.name}", "StateDirectoryMode=0700"]
    else:
        lines.append(f"ReadWritePaths={_quoted(plan.data_dir)}")
    return [*lines, ""]


def _rights(plan: Plan) -> list[str]:
    text = _HARDENING.format(protect_home="no" if _needs_homes(plan) else "yes")
    if plan.kind == "root":
        return [*text.splitlines(), f"CapabilityBoundingSet={_ROOT_CAPABILITIES}", "", *_install()]
    user = ["DynamicUser=yes"] if plan.kind == "dynamic" else [f"User={plan.user}"]
    return [*user, *text.splitlines(), *_UNPRIVILEGED.splitlines(), "", *_install()]


def _needs_homes(plan: Plan) -> bool:
    return any(path.startswith(("/home/", "/root/", "/run/user/")) for path in (plan.data_dir, plan.python))


def _install() -> list[str]:
    return ["[Install]", "WantedBy=multi-user.target", ""]


def _memory(plan: Plan) -> list[str]:
    return [_SECTION, f"Options={json.dumps(plan._asdict())}", ""]


def _quoted(path: str) -> str:
    """A word of a unit file: % and $ mean something there, and quotes keep blanks together."""
    text = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if text != path or any(sign in path for sign in " \t;'") else path


def parse_unit(text: str) -> Plan | None:
    """What the unit was installed as; None for one that `ash service install` did not write."""
    _, found, rest = text.partition(_SECTION + "\n")
    line = rest.partition("\n")[0]
    if not found or not line.startswith("Options="):
        return None
    try:
        return Plan(**json.loads(line.removeprefix("Options=")))
    except (ValueError, TypeError):
        return None
