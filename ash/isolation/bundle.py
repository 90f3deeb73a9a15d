"""What the sandboxes share as files: the zip with the bridge's modules and the folder that becomes /etc.

Both are named by their content and written once, atomically. Neither holds a secret; both are mounted read-only.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.resources.abc import Traversable

from ash.isolation.bwrap import BUNDLE, OUTER_ENVIRONMENT, etc_folders
from ash.isolation.outside import resolve

log = logging.getLogger(__name__)

LEAVES = ("__init__.py", "errors.py", "protocol.py", "sse.py")

# Unchecked hash-based .pyc: zipimport takes them without comparing times, and no start compiles anything.
_COMPILE = """
import base64, importlib.util, json, marshal, sys
out = {}
for name, text in json.load(sys.stdin).items():
    source = text.encode()
    code = compile(source, sys.argv[1] + "/" + name, "exec", dont_inherit=True)
    head = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    out[name + "c"] = base64.b64encode(head + marshal.dumps(code)).decode()
json.dump(out, sys.stdout)
"""

ETC_FILES = {
    "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nagent:x:1000:1000:agent:/home/agent:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nagent:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost\n",
    "hostname": "sandbox\n",
    "host.conf": "multi on\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
    "resolv.conf": "# a sandbox has no network\n",
    "shells": "/bin/sh\n/bin/bash\n",
}
_ETC_COPIES = ("ld.so.cache", "localtime", "timezone", "services", "protocols", "mime.types", "debian_version", "ssl/openssl.cnf")
_ETC_LINKS = {"os-release": "../usr/lib/os-release", "mtab": "../proc/self/mounts"}


def bridge_sources(bridge: str | None = None) -> dict[str, str]:
    """The bridge's modules by their name in the zip. `bridge` is a file that stands in for `ash/bridge.py` (tests)."""
    package = importlib.resources.files("ash")
    found = {f"ash/{name}": package.joinpath(name).read_text("utf-8") for name in LEAVES}
    if bridge is not None:
        with open(bridge, encoding="utf-8") as file:
            return {**found, "ash/bridge.py": file.read()}
    found["ash/bridge.py"] = package.joinpath("bridge.py").read_text("utf-8")
    _collect(package.joinpath("runtime"), "ash/runtime", found)
    return found


def _collect(folder: Traversable, prefix: str, found: dict[str, str]) -> None:
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.is_dir() and entry.name != "__pycache__":
            _collect(entry, f"{prefix}/{entry.name}", found)
        elif entry.name.endswith(".py"):
            found[f"{prefix}/{entry.name}"] = entry.read_text("utf-8")


Box = Callable[[list[str]], AbstractContextManager[tuple[list[str], tuple[int, ...]]]]
"""Gives for a command the one that runs it in a sandbox, and the descriptors that it takes."""


def build_bridge(folder: str, python: str, version: str, sources: dict[str, str], box: Box | None = None) -> str:
    """The path of the zip, written when it is not there. `version` says for which interpreter it is compiled. Blocks.

    With `box` the interpreter runs in a sandbox: it may be one of a root file system that nobody on the host vouches for.
    """
    digest = _digest(json.dumps([version, sources], sort_keys=True))
    path = os.path.join(folder, f"bridge-{digest}.zip")
    if not os.path.exists(path):
        members = {name: text.encode() for name, text in sources.items()}
        _write_file(path, _pack({**members, **_compile(python, sources, box or _unboxed)}), 0o644)
    return path


def _unboxed(command: list[str]) -> AbstractContextManager[tuple[list[str], tuple[int, ...]]]:
    return nullcontext((command, ()))


def _compile(python: str, sources: dict[str, str], box: Box) -> dict[str, bytes]:
    text = json.dumps(sources)
    with box([python, "-I", "-S", "-B", "-c", _COMPILE, BUNDLE]) as (command, fds):
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=60, env=OUTER_ENVIRONMENT, check=False, pass_fds=fds
        )
    if done.returncode:
        log.warning("the bridge could not be compiled ahead of time, sandboxes will start slower: %s", done.stderr.strip()[-300:])
        return {}
    return {name: base64.b64decode(text) for name, text in json.loads(done.stdout).items()}


def _pack(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name), members[name])
    return buffer.getvalue()


def build_etc(folder: str, root: str = "/") -> str:
    """The path of the folder that becomes /etc, written when it is not there. `root` is where the programs come from. Blocks."""
    files = {name: text.encode() for name, text in ETC_FILES.items()} | _copied_files(root)
    folders = [name for _, name in etc_folders(root)]
    digest = _digest(repr((sorted(files.items()), folders, _ETC_LINKS)))
    path = os.path.join(folder, f"etc-{digest}")
    if os.path.isdir(path):
        return path
    fresh = tempfile.mkdtemp(prefix=".etc-", dir=folder)
    for name in folders:
        os.makedirs(os.path.join(fresh, name))
    for name, content in files.items():
        os.makedirs(os.path.dirname(os.path.join(fresh, name)), exist_ok=True)
        _write_file(os.path.join(fresh, name), content, 0o644)
    for name, target in _ETC_LINKS.items():
        os.symlink(target, os.path.join(fresh, name))
    for current, _, _ in os.walk(fresh):
        os.chmod(current, 0o755)
    try:
        os.rename(fresh, path)
    except OSError:
        # Another server with this data folder was first; its content is the same by name.
        shutil.rmtree(fresh)
    return path


def _copied_files(root: str) -> dict[str, bytes]:
    found = {}
    for name in _ETC_COPIES:
        path = resolve(root, f"/etc/{name}")
        if os.path.isfile(path) and os.stat(path).st_mode & 0o004:
            with open(path, "rb") as file:
                found[name] = file.read()
    return found


def prune(folder: str, keep: set[str]) -> None:
    """Remove earlier versions. A sandbox that still runs keeps what it has mounted."""
    for entry in list(os.scandir(folder)):
        if entry.path in keep or not is_shared(entry.path):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


def is_shared(path: str) -> bool:
    return re.fullmatch(r"bridge-[0-9a-f]{16}\.zip|etc-[0-9a-f]{16}|\.etc-\w+", os.path.basename(path)) is not None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_file(path: str, content: bytes, mode: int) -> None:
    fd, name = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    os.chmod(name, mode)
    os.rename(name, path)
