"""Builds dist/ash.pyz: Ash, its locked dependencies for eight interpreters, and the bootstrap, in one reproducible file.

    python build_pyz.py [--output dist/ash.pyz] [--sizes]

Wheels come by `pip download` with the hashes of requirements.lock and are kept, like compressed payloads, in a build cache
($XDG_CACHE_HOME/ash-build), so that a second build needs neither network nor time. The layout and the reasons for it are in
docs/decisions/0001-one-file.md. Nothing of the building machine (time, path, umask, strip tool) reaches the file.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PYTHONS = ("311", "312", "313", "314")
MACHINES = ("x86_64", "aarch64")
MANYLINUX = ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux_2_12", "manylinux_2_5", "manylinux1")

# What the server itself imports; everything else is only for Bedrock and Vertex, or for credentials, and is unpacked when it is used.
CORE = {
    "aiohappyeyeballs",
    "aiohttp",
    "aiosignal",
    "aiosqlite",
    "attrs",
    "frozenlist",
    "h11",
    "idna",
    "multidict",
    "propcache",
    "typing-extensions",
    "yarl",
}
CRYPTO = {"cffi", "cryptography"}
GROUPS = ("core", "crypto", "models")
UNUSED = {"pycparser"}  # cffi's compiler; cryptography needs only _cffi_backend
UNUSED_FILES = re.compile(r"cffi/|[^/]+\.data/|charset_normalizer/\w+\.[\w-]+\.so$|multidict/_testcapi\.")
AS_FOLDERS = ("botocore/", "certifi/")
"""Packages that read their data next to their code by path; they are unpacked as files, the others as one zip."""
BOTOCORE_DATA = re.compile(
    r"botocore/data/((endpoints|partitions|sdk-default-configuration|_retry)\.json|(sts|sso|sso-oidc|signin|bedrock-runtime)/)"
)
DROPPED = re.compile(
    r"\.(pyi|pyx|pxd|pxi|h|md|rst|typed|keep|js|cfg)$|(dist-info/(RECORD|WHEEL|INSTALLER|REQUESTED|top_level\.txt|zip-safe))$"
    r"|^(botocore|boto3)/(data|examples)/|dateutil-zoneinfo"
)
KEPT = re.compile(r"\.(py|pem)$|\.dist-info/")

PREFIX = b"""#!/usr/bin/env python3
# Python only reads these lines when the end of this file is missing. coding: this-file-is-incomplete_download-or-build-it-again
"""
_EPOCH = (1980, 1, 1, 0, 0, 0)


class BuildError(Exception):
    """The build cannot go on; the message says why and what to do."""


class Payload(NamedTuple):
    kind: str  # py, cp311-x86_64-glibc, abi3-x86_64-glibc, …
    files: dict[str, bytes]


# ---- wheels -----------------------------------------------------------------------------------------------------------------


def read_lock(text: str) -> dict[str, set[str]]:
    """Requirement line -> its sha256 digests."""
    found: dict[str, set[str]] = {}
    for block in re.split(r"\n(?=[a-z0-9])", "\n" + text):
        requirement, *rest = block.strip().split(" \\\n")
        if "==" not in requirement:
            continue
        if "python" in requirement.partition(";")[2] and "emscripten" not in requirement and "implementation" not in requirement:
            raise BuildError(f"requirements.lock: {requirement!r} depends on the Python version, which one shared payload cannot")
        found[requirement.strip()] = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", " ".join(rest)))
    return found


def download_all(lock: Path, cache: Path) -> dict[str, list[Path]]:
    """Wheels per target (`cp311-x86_64`). Pure ones are fetched for the first target only, and shared."""
    requirements = {line: hashes for line, hashes in read_lock(lock.read_text()).items() if _name(line) not in UNUSED}
    known = {digest for hashes in requirements.values() for digest in hashes}
    home = cache / "wheels" / hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    targets = [(machine, python) for machine in MACHINES for python in PYTHONS]
    first = _download(requirements, MACHINES[0], PYTHONS[0], home, known)
    pure = {_name(wheel.name) for wheel in first if wheel.name.endswith("-none-any.whl")}
    native = {line: hashes for line, hashes in requirements.items() if _name(line) not in pure}
    with ThreadPoolExecutor(2) as pool:
        rest = list(pool.map(lambda target: _download(native, target[0], target[1], home, known), targets[1:]))
    shared = [wheel for wheel in first if _name(wheel.name) in pure]
    return {
        f"cp{python}-{machine}": wheels for (machine, python), wheels in zip(targets, [first, *(shared + w for w in rest)], strict=True)
    }


def _name(text: str) -> str:
    return re.split(r"[=\-]=|-\d", text)[0].strip().lower().replace("_", "-")


def _download(requirements: dict[str, set[str]], machine: str, python: str, home: Path, known: set[str]) -> list[Path]:
    folder = home / f"cp{python}-{machine}"
    if not folder.exists():
        partial = folder.with_suffix(f".{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        listing = partial / "requirements.txt"
        listing.write_text(
            "".join(line + "".join(f" \\\n --hash=sha256:{h}" for h in sorted(hashes)) + "\n" for line, hashes in requirements.items())
        )
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-input", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        command += [f"--platform={manylinux}_{machine}" for manylinux in MANYLINUX]
        command += [f"--python-version={python[0]}.{python[1:]}", "--implementation=cp", f"--abi=cp{python}", "--abi=abi3", "--abi=none"]
        print(f"downloading, once, the packages for CPython {python[0]}.{python[1:]} on {machine}", flush=True)
        done = subprocess.run([*command, "-r", str(listing), "-d", str(partial)], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise BuildError(f"pip could not download the wheels for {folder.name}:\n{done.stderr.strip()[-2000:]}")
        partial.rename(folder)
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        if hashlib.sha256(wheel.read_bytes()).hexdigest() not in known:
            raise BuildError(f"{wheel} is not what requirements.lock says; delete {home} and build again")
    return wheels


def min_glibc(wheels: Iterable[Path]) -> tuple[int, int]:
    """The oldest glibc that every compiled wheel runs on."""
    legacy = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
    needed = [(2, 17)]
    for wheel in wheels:
        tags = [(int(a), int(b)) for a, b in re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name)]
        tags += [version for tag, version in legacy.items() if f"{tag}_" in wheel.name]
        needed += [min(tags)] if tags else []
    return max(needed)


# ---- what goes into a payload -----------------------------------------------------------------------------------------------


def wheel_files(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """What Ash needs of a wheel: code, licences, metadata and the data that its code reads."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith("/") or UNUSED_FILES.match(name) or (DROPPED.search(name) and not BOTOCORE_DATA.match(name)):
                continue
            if not (KEPT.search(name) or BOTOCORE_DATA.match(name) or name.endswith(".so") or "LICENSE" in name):
                raise BuildError(f"{wheel.name} holds {name}, a kind of file the build does not know; keep it or drop it in build_pyz.py")
            yield name, archive.read(name)


def payloads(wheels: dict[str, list[Path]]) -> list[Payload]:
    """One payload of sources for all targets, one per target, and one per machine for modules that serve every Python."""
    shared: dict[str, bytes] = {}
    compiled: dict[str, dict[str, bytes]] = {}
    for target, files in wheels.items():
        machine = target.partition("-")[2]
        for wheel in files:
            for name, content in wheel_files(wheel):
                if name.endswith(".so"):
                    kind = f"{'abi3' if name.endswith('.abi3.so') else target.partition('-')[0]}-{machine}-glibc"
                    compiled.setdefault(kind, {})[f"{name.partition('.')[0].replace('/', '.')}.so"] = strip_elf(content)
                elif shared.setdefault(_place(name), content) != content and "dist-info" not in name:
                    raise BuildError(f"{wheel.name}: {name} differs between targets; one shared payload cannot hold it")
    _complete_packages(shared)
    return [Payload("py", shared), *(Payload(kind, compiled[kind]) for kind in sorted(compiled))]


def _place(name: str) -> str:
    return f"files/{name}" if name.startswith(AS_FOLDERS) else name


def _complete_packages(files: dict[str, bytes]) -> None:
    """Give namespace packages an __init__, or another package of the machine that uses the same name could take them over."""
    for name in [name for name in files if name.endswith(".py")]:
        folder = name.rpartition("/")[0]
        while folder and folder != "files":
            files.setdefault(f"{folder}/__init__.py", b"")
            folder = folder.rpartition("/")[0]


def strip_elf(data: bytes) -> bytes:
    """`data` without what the loader never reads (symbols, debug information, section table); needs no foreign strip tool."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise BuildError("a compiled module that is not 64-bit little-endian ELF")
    (table,) = struct.unpack_from("<Q", data, 32)
    entry_size, entries = struct.unpack_from("<HH", data, 54)
    kept = [(0, 64), (table, entry_size * entries)]
    for number in range(entries):
        kept.append(
            (
                *struct.unpack_from("<Q", data, table + number * entry_size + 8),
                *struct.unpack_from("<Q", data, table + number * entry_size + 32),
            )
        )
    result = bytearray(max(start + size for start, size in kept))
    for start, size in kept:
        result[start : start + size] = data[start : start + size]
    struct.pack_into("<Q", result, 40, 0)  # no section headers
    struct.pack_into("<HHH", result, 58, 0, 0, 0)
    return bytes(result)


def pack(payload: Payload, cache: Path) -> bytes:
    """The payload as the bootstrap reads it: xz of `size name` lines, an empty line, the contents."""
    names = sorted(payload.files)
    data = (
        "".join(f"{len(payload.files[name])} {name}\n" for name in names).encode() + b"\n" + b"".join(payload.files[name] for name in names)
    )
    filters: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 25}]
    if "x86_64" in payload.kind:
        filters.insert(0, {"id": lzma.FILTER_X86})
    kept = cache / "payloads" / hashlib.sha256(repr(filters).encode() + data).hexdigest()
    if kept.exists():
        return kept.read_bytes()
    print(f"compressing {len(data) / 1e6:.0f} MB, kept for later builds", flush=True)
    packed = lzma.compress(data, filters=filters)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(packed)
    partial.replace(kept)
    return packed


# ---- the file ---------------------------------------------------------------------------------------------------------------


def sources(root: Path, top: str) -> dict[str, bytes]:
    """Ash's own files below `top`, by their names in the zip."""
    found = (path for path in sorted((root / top).rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found if path.suffix not in (".pyc", ".pyi")}


def table(groups: dict[str, dict[str, Any]], glibc: tuple[int, int]) -> bytes:
    """Source of `_ash.table`: which names belong to which group, and the digest of every payload."""
    lines = ['"""Written by build_pyz.py."""', f"MIN_GLIBC = {glibc!r}", "GROUPS = {"]
    lines += [f"    {name!r}: {about!r}," for name, about in groups.items()]
    return "\n".join([*lines, "}\n"]).encode()


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def top_level(files: Iterable[str]) -> list[str]:
    """Names that `import` can begin with."""
    modules = {name.removeprefix("files/").partition("/")[0] for name in files if name.endswith((".py", ".so"))}
    return sorted({name.partition(".")[0] for name in modules if ".dist-info" not in name})


def build(output: Path, root: Path, cache: Path) -> dict[str, int]:
    """Write the file; gives the size of each part."""
    wheels = download_all(root / "requirements.lock", cache)
    bootstrap = {name.removeprefix("bootstrap/"): content for name, content in sources(root, "bootstrap").items()}
    unpack = bootstrap["_ash/unpack.py"]
    own = sources(root, "ash")
    groups: dict[str, dict[str, Any]] = {
        "ash": {"names": [], "needs_compiled": False, "digest": digest(unpack, *map(repr_bytes, own.items())), "payloads": {}}
    }
    packed: dict[str, bytes] = {}
    for group in GROUPS:
        chosen = {target: [wheel for wheel in files if _group(wheel) == group] for target, files in wheels.items()}
        parts = payloads(chosen)
        with ThreadPoolExecutor() as pool:  # lzma leaves the interpreter free
            contents = list(pool.map(lambda part: pack(part, cache), parts))
        digests = {part.kind: hashlib.sha256(content).hexdigest() for part, content in zip(parts, contents, strict=True)}
        packed |= {f"_ash/payload/{group}-{part.kind}.xz": content for part, content in zip(parts, contents, strict=True)}
        names = top_level([name for part in parts for name in part.files])
        groups[group] = {
            "names": names,
            "needs_compiled": group != "core",
            "digest": digest(unpack, *(value.encode() for value in digests.values())),
            "payloads": digests,
        }
    glibc = min_glibc(wheel for files in wheels.values() for wheel in files)
    files = {**bootstrap, "_ash/table.py": table(groups, glibc), **own, **sources(root, "ash_ai"), **packed}
    write(output, files)
    return {name: len(content) for name, content in packed.items()} | {"Ash itself": sum(map(len, own.values()))}


def _group(wheel: Path) -> str:
    name = _name(wheel.name)
    return "core" if name in CORE else "crypto" if name in CRYPTO else "models"


def repr_bytes(item: tuple[str, bytes]) -> bytes:
    return item[0].encode() + b"\0" + item[1]


def write(output: Path, files: dict[str, bytes]) -> None:
    """The zip, stored (payloads are compressed already, and Ash's own modules load faster so), in a fixed order with fixed times."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(f".{os.getpid()}")
    folders = {f"{parent.as_posix()}/" for name in files for parent in Path(name).parents if parent.name}
    with open(partial, "wb") as file:
        file.write(PREFIX)
        with zipfile.ZipFile(file, "w") as archive:
            for name in sorted([*files, *folders], key=lambda name: ("/payload/" in name, name)):
                info = zipfile.ZipInfo(name, _EPOCH)
                info.create_system = 3
                info.external_attr = (0o40755 << 16 | 0x10) if name.endswith("/") else 0o100644 << 16
                archive.writestr(info, files.get(name, b""))
    partial.chmod(0o755)
    partial.replace(output)  # a server that runs from the old file keeps it


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ash-build"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build ash.pyz.")
    parser.add_argument("--output", type=Path, default=HERE / "dist" / "ash.pyz")
    parser.add_argument("--source", type=Path, default=HERE, help="the project's folder")
    parser.add_argument("--sizes", action="store_true", help="say what each part costs")
    arguments = parser.parse_args()
    try:
        parts = build(arguments.output, arguments.source, default_cache())
    except BuildError as error:
        print(f"build_pyz: {error}", file=sys.stderr)
        return 1
    for name, size in sorted(parts.items(), key=lambda part: -part[1]) if arguments.sizes else ():
        print(f"{size / 1e6:8.2f} MB  {name}")
    content = arguments.output.read_bytes()
    print(f"{len(content) / 1e6:8.2f} MB  {arguments.output}  sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
