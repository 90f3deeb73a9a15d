"""Unpacks a group of bundled packages into the cache once, and checks what is there on every later use.

A group is one xz file of sources for every target and one of compiled modules per target; in the cache it becomes one stored
zip with bytecode, so that few files are created. A folder appears by one rename, whole or not at all, and is never changed.
"""

from __future__ import annotations

import marshal
import os
import sys
import zipfile
from collections.abc import Iterator
from hashlib import file_digest, sha256
from importlib.util import MAGIC_NUMBER
from typing import NamedTuple

from _ash import BundleError, interpreter
from _ash.table import GROUPS, MIN_GLIBC
from ash import cache

LIBRARY = "lib.zip"
FILES = "files"
_PYC_HEADER = MAGIC_NUMBER + b"\x01\0\0\0" + bytes(8)  # hash-based and unchecked: valid whatever the zip's timestamps say
_held: list[int | None] = []
"""Descriptors that keep `ash cache prune` away from what this process uses."""


class Opened(NamedTuple):
    paths: list[str]  # for sys.path-like search
    extensions: dict[str, str]  # compiled modules: full name -> file


def platform() -> str:
    """The machine and its C library as the payloads name them; `any` when the bundle has no compiled modules for it."""
    machine = os.uname().machine if sys.platform == "linux" and sys.maxsize > 2**32 else ""
    try:
        libc, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        new_enough = tuple(map(int, version.split(".")[:2])) >= MIN_GLIBC
    except (ValueError, OSError):  # musl does not know the name
        return "any"
    name = f"{machine}-{libc}"
    return name if new_enough and f"{interpreter()}-{name}" in GROUPS["core"]["payloads"] else "any"


def open_group(archive: str, group: str) -> Opened:
    """The search paths and compiled modules of `group`, unpacked and verified. Raises BundleError."""
    on = platform() if GROUPS[group]["payloads"] else "any"
    if on == "any" and GROUPS[group]["needs_compiled"]:
        raise BundleError(
            "Credentials, Bedrock and Vertex need compiled packages, which this file holds for CPython 3.11 to 3.14 on Linux "
            f"(x86-64, aarch64) with glibc {MIN_GLIBC[0]}.{MIN_GLIBC[1]} or newer; "
            f"this is {sys.version.split()[0]} on {sys.platform} {os.uname().machine}"
        )
    try:
        return _open_somewhere(archive, group, on)
    except _Noexec as error:
        if GROUPS[group]["needs_compiled"]:
            raise BundleError(f"{error}; set ASH_CACHE_DIR to a folder that allows running files") from None
        _say(f"{error}; going on without compiled modules, which is slower")
        return _open_somewhere(archive, group, "any")


class _Noexec(PermissionError):
    """A folder is mounted so that compiled modules cannot be loaded from it."""


def _open_somewhere(archive: str, group: str, on: str) -> Opened:
    refused: list[OSError] = []
    for root in cache.candidates():
        try:
            opened = _open_in(archive, group, on, root)
        except OSError as error:
            refused.append(error)
            continue
        if refused:
            _say(f"{'; '.join(map(str, refused))}; using {root} instead")
        return opened
    reasons = "; ".join(map(str, refused))
    if any(isinstance(error, _Noexec) for error in refused):
        raise _Noexec(reasons)
    raise BundleError(f"no folder to unpack into: {reasons}; set ASH_CACHE_DIR to a folder of yours that can be written")


def _open_in(archive: str, group: str, on: str, root: str) -> Opened:
    folder = os.path.join(root, f"{group}-{interpreter()}-{on}-{GROUPS[group]['digest']}")
    for _ in range(3):  # a prune may take it away between two steps
        if os.path.isdir(root):
            _check(root, group, on)
        if not _is_whole(folder):
            cache.create_root(root)
            _check(root, group, on)
            _unpack(archive, group, on, root, folder)
        held = cache.hold(folder)
        if held is not None:
            _held.append(held)
            return _opened(folder)
    raise OSError(f"{folder} is removed again and again while it is being opened")


def _check(root: str, group: str, on: str) -> None:
    cache.check_owner(root)
    if f"{interpreter()}-{on}" in GROUPS[group]["payloads"] and cache.is_noexec(root):
        raise _Noexec(f"{root} is mounted noexec")


def _opened(folder: str) -> Opened:
    extensions = {name[:-3]: os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".so")}
    paths = [os.path.join(folder, name) for name in (LIBRARY, FILES)]
    return Opened([path for path in paths if os.path.exists(path)], extensions)


def _is_whole(folder: str) -> bool:
    """Whether every file of `folder` is what was written. Read on each start: 5 MB, some milliseconds."""
    try:
        with open(os.path.join(folder, cache.MANIFEST), encoding="ascii") as manifest:
            lines = manifest.read().splitlines()
        if not lines or lines.pop() != f"# {len(lines)} lines":
            return False
        return all(_digest(os.path.join(folder, name)) == digest for digest, _, name in (line.partition("  ") for line in lines[1:]))
    except (OSError, ValueError):
        return False


def _digest(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return file_digest(file, sha256).hexdigest()


def _unpack(archive: str, group: str, on: str, root: str, folder: str) -> None:
    with cache.locked(root):
        if _is_whole(folder):  # another process was faster
            return
        _remove_unfinished(root)
        building = os.path.join(root, f"{cache.UNFINISHED}{os.getpid()}-{os.path.basename(folder)}")
        os.mkdir(building, 0o700)
        lines = [f"{_digest(os.path.join(building, name))}  {name}" for name in _write(archive, group, on, building, folder)]
        with open(os.path.join(building, cache.MANIFEST), "w", encoding="ascii") as manifest:
            manifest.write("\n".join([_quick_check(building), *lines, f"# {len(lines) + 1} lines\n"]))
        if os.path.lexists(folder):
            _say(f"{folder} was damaged; unpacked it again")
            cache.remove(folder)
        os.rename(building, folder)


def _quick_check(folder: str) -> str:
    """The line that client commands look at, which have no time for more."""
    from zlib import crc32

    with open(os.path.join(folder, LIBRARY), "rb") as file:
        return f"# crc32 {crc32(file.read()):08x}"


def _remove_unfinished(root: str) -> None:
    for name in os.listdir(root):
        if name.startswith(cache.UNFINISHED):
            cache.remove(os.path.join(root, name))


def _write(archive: str, group: str, on: str, building: str, folder: str) -> Iterator[str]:
    """Write the group's files into `building`, which will be renamed to `folder`; gives their names."""
    with zipfile.ZipFile(os.path.join(building, LIBRARY), "w") as library:
        for name, content in _sources(archive, group):
            if name.startswith(FILES + "/"):
                yield from _write_file(building, folder, name, content)
            else:
                library.writestr(zipfile.ZipInfo(name), content)
                if name.endswith(".py"):
                    library.writestr(zipfile.ZipInfo(name + "c"), _compiled(content, os.path.join(folder, LIBRARY, name)))
    yield LIBRARY
    for kind in (f"{interpreter()}-{on}", f"abi3-{on}"):
        for name, content in _payload(archive, group, kind):
            yield from _write_file(building, folder, name, content)


def _write_file(building: str, folder: str, name: str, content: bytes) -> Iterator[str]:
    path = os.path.join(building, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        file.write(content)
    yield name
    if name.endswith(".py"):
        head, tail = os.path.split(name)
        cached = os.path.join(head, "__pycache__", f"{tail[:-3]}.{sys.implementation.cache_tag}.pyc")
        yield from _write_file(building, folder, cached, _compiled(content, os.path.join(folder, name)))


def _compiled(source: bytes, path: str) -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's code; -W error must not stop the start
        return _PYC_HEADER + marshal.dumps(compile(source, path, "exec", dont_inherit=True, optimize=0))


def _sources(archive: str, group: str) -> Iterator[tuple[str, bytes]]:
    if group != "ash":
        yield from _payload(archive, group, "py")
        return
    with zipfile.ZipFile(archive) as bundle:
        for name in bundle.namelist():
            if name.startswith("ash/"):
                yield name, bundle.read(name)


def _payload(archive: str, group: str, kind: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of one payload: xz of a line `size name` per file, an empty line, then the contents in that order."""
    expected = GROUPS[group]["payloads"].get(kind)
    if expected is None:
        return
    try:
        import lzma
    except ImportError:
        raise BundleError(f"{sys.executable} was built without the lzma module; use another Python 3.11 or newer") from None
    try:
        with zipfile.ZipFile(archive) as bundle:
            packed = bundle.read(f"_ash/payload/{group}-{kind}.xz")
    except (KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"{archive} is damaged ({error}); download or build it again") from None
    if sha256(packed).hexdigest() != expected:
        raise BundleError(f"{archive} is damaged (payload {group}-{kind}); download or build it again")
    data = lzma.decompress(packed)
    end = data.index(b"\n\n")
    start = end + 2
    for line in data[:end].decode().splitlines():
        size, _, name = line.partition(" ")
        yield name, data[start : start + int(size)]
        start += int(size)


def _say(text: str) -> None:
    print(f"ash: {text}", file=sys.stderr)  # noqa: T201  # before any logging is set up
