"""Which Python runs the bridges: the first candidate that works inside a sandbox, as the uid of a sandbox.

A standard-library bridge needs nothing beyond its interpreter, so one under /usr costs no extra mount. One elsewhere
brings its prefix along, read-only.
"""

from __future__ import annotations

import glob
import json
import os
import pwd
import sys
from typing import NamedTuple

from ash.errors import ConfigError, SandboxFailed
from ash.isolation.bwrap import OUTER_ENVIRONMENT
from ash.isolation.launch import run
from ash.isolation.outside import is_inside, is_program, resolve

MINIMUM = (3, 10)
DESCRIBE = (
    "import json, os, sys, importlib.util as u; executable = os.path.realpath(getattr(sys, '_base_executable', sys.executable)); "
    "print(json.dumps([list(sys.version_info[:3]), sys.base_prefix, executable, u.MAGIC_NUMBER.hex()]))"
)


PRIVATE_FOLDERS = (".cache", ".config", ".local", ".local/share", ".local/state", ".ssh")
"""In a home: where programs keep keys and data of all kinds."""


class Interpreter(NamedTuple):
    path: str
    prefix: str | None
    """Folder to mount for it; None under /usr, which is there anyway."""
    version: str
    magic: str
    """Says for which byte code it is; two interpreters with one magic can share compiled files."""


def candidates(rootfs: str = "") -> list[str]:
    """Interpreters worth a try, best first. Those of the system come before our own, which may lie in somebody's home.

    In a root file system only its own count; the paths are as seen inside.
    """
    names = (os.path.basename(path) for path in glob.glob(f"{glob.escape(rootfs)}/usr/bin/python3.[0-9][0-9]"))
    versioned = [f"/usr/bin/{name}" for name in sorted(names, key=lambda name: -int(name.rpartition(".")[2]))]
    found = ["/usr/bin/python3", "/usr/local/bin/python3", *versioned]
    if rootfs:
        return [path for path in found if is_program(resolve(rootfs, path))]
    return [path for path in dict.fromkeys([*found, sys.executable]) if path and os.access(path, os.X_OK)]


def describe_arguments(python: str) -> list[str]:
    return [python, "-I", "-S", "-B", "-c", DESCRIBE]


def parse_description(output: str) -> Interpreter:
    """Raises ConfigError for a Python that is too old, ValueError for output that is none of ours."""
    version, prefix, executable, magic = json.loads(output)
    text = ".".join(str(part) for part in version)
    if tuple(version[:2]) < MINIMUM:
        raise ConfigError(f"Python {text} is too old for a sandbox; {MINIMUM[0]}.{MINIMUM[1]} or newer is needed")
    return Interpreter(executable, None if is_in_usr(prefix) and is_in_usr(executable) else os.path.realpath(prefix), text, magic)


def is_in_usr(path: str) -> bool:
    return os.path.realpath(path).startswith("/usr/") or os.path.realpath(path) == "/usr"


def check_prefix(prefix: str, data_dir: str) -> None:
    """All of an interpreter's prefix is shown to every sandbox. Raises ConfigError for one that is more than an interpreter's."""
    if is_in_usr(prefix):
        return
    homes = {os.path.realpath(home) for home in (os.path.expanduser("~"), *(entry.pw_dir for entry in pwd.getpwall()))}
    private = {os.path.join(home, name) for home in homes for name in PRIVATE_FOLDERS} | homes
    found = sorted(path for path in (os.path.realpath(data_dir), *private) if is_inside(path, os.path.realpath(prefix)))
    if found:
        raise ConfigError(
            f"its prefix {prefix} would be shown to every sandbox, and {found[0]} is in it; "
            "give a Python with a folder of its own, such as one under /usr or /opt, or one that pyenv or uv has installed"
        )


async def describe(path: str) -> Interpreter:
    """What an interpreter says of itself, run outside any sandbox. Raises ConfigError."""
    if not os.path.isabs(path) or not os.access(path, os.X_OK):
        raise ConfigError(f"{path!r} is not an interpreter: give the absolute path of a Python executable")
    try:
        code, output, errors = await run(describe_arguments(path), OUTER_ENVIRONMENT, 10)
        if code == 0:
            return parse_description(output)
    except (OSError, ValueError, SandboxFailed) as error:
        raise ConfigError(f"{path} does not run as Python: {error}") from error
    raise ConfigError(f"{path} does not run as Python: {errors.strip()[-200:]}")
