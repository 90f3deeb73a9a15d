"""The test guest's image and the packages its tests need, made once and kept in the cache until what they are made from changes.

Boots nothing. What it installs, as root and only when it is missing, is named in `REQUIRED`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REQUIRED = {"qemu-system-x86_64": "qemu-system-x86", "debootstrap": "debootstrap", "mkfs.ext4": "e2fsprogs"}
"""Programs and the Debian packages they come in."""
RECIPE = ("build-image.sh", "guest-run", "guest.service")
LEFT_OUT = {"mypy", "ruff", "boto3", "botocore", "google-auth", "librt", "mypy-extensions", "ast-serialize"}
"""Packages of the lock that no test in the guest imports."""
_BIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BUILD_TRIES = 2
"""A mirror that fails once may answer the second time."""


class GuestFailed(Exception):
    """The guest could not be made or did not run to its end; the text says why and what to do."""


def require_tools() -> None:
    """Install what is missing when root; otherwise say the command. Raises GuestFailed."""
    missing = sorted(package for program, package in REQUIRED.items() if find_program(program) is None)
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() or shutil.which("apt-get") is None:
        raise GuestFailed(f"missing: {', '.join(missing)}; run:  sudo apt-get update && sudo {' '.join(command)}")
    say(f"installing {', '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "-qq", "update"], [command[0], "-qq", *command[1:]]):
        done = subprocess.run(step, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise GuestFailed(f"{' '.join(step)} failed: {done.stderr.strip()[-500:]}")


def find_program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":" + _BIN)


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else Path.home() / ".cache") / "ash-test-vm"


def open_image() -> Path:
    """The folder with root.ext4, vmlinuz, initrd and about.txt; built when there is none for this recipe. Raises GuestFailed."""
    if os.geteuid() and not _cached("image", _recipe_digest()).exists():
        raise GuestFailed("building the guest's image takes root; run:  sudo make test-vm")
    return _made("image", _recipe_digest(), _build_image)


def _recipe_digest() -> str:
    release = Path("/etc/os-release").read_bytes()
    return _digest(release, *((HERE / name).read_bytes() for name in RECIPE))


def _build_image(folder: Path) -> None:
    for attempt in range(1, BUILD_TRIES + 1):
        done = subprocess.run([str(HERE / "build-image.sh"), str(folder)], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            return
        say(f"building the image failed (try {attempt} of {BUILD_TRIES}): {done.stderr.strip()[-1500:]}")
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    raise GuestFailed("the guest's image could not be built; is Debian's mirror reachable (apt-get update)?")


def open_site(python: str) -> Path:
    """A folder with the locked packages for the guest's Python, as `pip install --target` lays them out. Raises GuestFailed."""
    lock = (ROOT / "requirements-dev.lock").read_text()
    digest = _digest(lock.encode(), python.encode(), repr(sorted(LEFT_OUT)).encode())
    return _made("site", digest, lambda folder: _install(folder, lock, python))


def _install(folder: Path, lock: str, python: str) -> None:
    say(f"locked packages for the guest's Python {python}")
    with tempfile.NamedTemporaryFile("w", suffix=".lock") as wanted:
        wanted.write(leave_out(lock, LEFT_OUT))
        wanted.flush()
        command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", "--no-deps", "--no-compile"]
        command += ["--require-hashes", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        command += [f"--platform={name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux_2_12")]
        done = subprocess.run([*command, "--target", str(folder), "-r", wanted.name], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise GuestFailed(f"the guest's packages could not be installed: {done.stderr.strip()[-1500:]}")


def leave_out(lock: str, names: set[str]) -> str:
    """A lock file without some of its packages: each begins a line, its hashes follow indented."""
    kept, is_kept = [], True
    for line in lock.splitlines(keepends=True):
        if not line[0].isspace():
            is_kept = line.partition("==")[0].strip() not in names
        if is_kept:
            kept.append(line)
    return "".join(kept)


def _made(kind: str, digest: str, make: Callable[[Path], object]) -> Path:
    """The cached folder for a digest; made beside it and renamed, so that it is there whole or not at all. Older ones are removed."""
    folder = _cached(kind, digest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second finds what the first has made
        if folder.exists():
            return folder
        building = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
        try:
            _ = make(building)
            for old in folder.parent.glob(f"{kind}-*"):
                shutil.rmtree(old)
            building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def _cached(kind: str, digest: str) -> Path:
    return cache_dir() / f"{kind}-{digest}"


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def say(text: str) -> None:
    sys.stdout.write(f"vm: {text}\n")
    sys.stdout.flush()
