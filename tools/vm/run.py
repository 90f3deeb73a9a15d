"""Boots the test guest with a built ash.pyz, follows its tests, and ends with their exit code: `python -m tools.vm.run [--help]`.

The guest gets a throw-away copy of its disk, no network, and the files of this checkout on a disk of its own. Ends only the
emulator it started, whatever happens, within `--timeout` seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tools.vm import image
from tools.vm.image import ROOT, GuestFailed, say

BROUGHT = ("ash", "ash_ai", "tests", "examples", "pyproject.toml")
"""What of the checkout the guest sees, besides the built file and the packages of the tests."""
DATA_DISK_MB = 1024
BOOT_TIMEOUT = 300.0
"""Seconds until the guest says its first word; usually 20 to 60."""
BOOT_TRIES = 3
CPU = "Nehalem"
"""The emulated processor: all that Debian and the wheels need. With everything that the emulator knows (`max`) a boot fails at random."""
KERNEL = "root=LABEL=ash-root rw console=ttyS0 panic=-1 mitigations=off random.trust_cpu=on systemd.show_status=false"
_LAST_WORD = "guest: exit "


def main(argv: Sequence[str] | None = None) -> int:
    args, began = _parser().parse_args(argv), time.monotonic()
    try:
        image.require_tools()
        guest = image.open_image()
        about = dict(line.split(" ", 1) for line in (guest / "about.txt").read_text().splitlines())
        site = image.open_site(about["python"])
        say(", ".join(f"{name} {version}" for name, version in about.items()))
        results = Path(args.results)
        with tempfile.TemporaryDirectory(prefix="ash-vm-") as folder:
            disks = _make_disks(Path(folder), Path(args.file), site, Path(args.script), args.words)
            try:
                code = _boot(guest, disks, Path(folder), args.accel, args.timeout)
            finally:
                _keep_results(Path(folder), results)
    except GuestFailed as error:
        say(str(error))
        return 1
    spent, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{spent / 60:.1f} minutes, {(used.ru_utime + used.ru_stime) / 60:.1f} of processor time"
    say(f"{'passed' if code == 0 else f'failed with {code}'} in {took}; results in {results}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.vm.run", description=__doc__)
    parser.add_argument("--file", default=str(ROOT / "dist" / "ash.pyz"), help="the built ash.pyz")
    parser.add_argument("--results", default=str(ROOT / "dist" / "vm"), help="folder for the results")
    parser.add_argument("--script", default=str(ROOT / "tests" / "guest" / "run.sh"), help="what the guest runs, as root; $1: results")
    parser.add_argument("--timeout", type=float, default=2400.0, help="seconds until the guest is turned off")
    parser.add_argument("--accel", default=os.environ.get("VM_ACCEL", "tcg"), help="tcg, or kvm where that works (VM_ACCEL)")
    parser.add_argument("words", nargs="*", help="words for pytest in the guest, after --")
    return parser


# The disks


def _make_disks(folder: Path, pyz: Path, site: Path, script: Path, words: Sequence[str]) -> dict[str, Path]:
    if not pyz.exists():
        raise GuestFailed(f"{pyz} does not exist; run:  make pyz")
    say("disks")
    content = folder / "content"
    project = content / "project"
    project.mkdir(parents=True)
    for name in BROUGHT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
        elif source.exists():
            shutil.copy2(source, project / name)
    shutil.copy2(pyz, content / "ash.pyz")
    shutil.copy2(script, content / "run")
    (content / "words").write_text("".join(f"{word}\n" for word in words))
    shutil.copytree(site, content / "site")
    used = sum(file.stat().st_size + 4096 for file in content.rglob("*")) // 1024**2
    disks = {"in": folder / "in.ext4", "data": folder / "data.ext4"}
    _make_file_system(disks["in"], used * 5 // 4 + 64, "-L", "ash-in", "-d", str(content))
    _make_file_system(disks["data"], DATA_DISK_MB, "-L", "ash-data", "-O", "project,quota", "-E", "quotatype=prjquota")
    shutil.rmtree(content)
    return disks


def _make_file_system(path: Path, megabytes: int, *options: str) -> None:
    with path.open("wb") as file:
        file.truncate(megabytes * 1024**2)
    program = image.find_program("mkfs.ext4") or "mkfs.ext4"
    done = subprocess.run([program, "-q", *options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestFailed(f"mkfs.ext4 failed: {done.stderr.strip()[-500:]}")


# The machine


def command(guest: Path, disks: dict[str, Path], folder: Path, accel: str) -> list[str]:
    """The emulator's command line. No network card; everything goes by two ports and the console."""
    drives = [(guest / "root.ext4", "snapshot=on"), (disks["in"], "readonly=on"), (disks["data"], "snapshot=off")]
    words = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi" if accel == "tcg" else accel]
    words += [
        "-cpu",
        CPU,
        "-smp",
        "2",
        "-m",
        "3072",
        "-display",
        "none",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-nic",
        "none",
    ]
    words += ["-kernel", str(guest / "vmlinuz"), "-initrd", str(guest / "initrd"), "-append", KERNEL, "-device", "virtio-rng-pci"]
    for path, option in drives:
        words += ["-drive", f"file={path},format=raw,if=virtio,{option}"]
    words += ["-device", "virtio-serial"]
    for name in ("progress", "results"):
        words += ["-chardev", f"file,id={name},path={folder / name}", "-device", f"virtserialport,chardev={name},name=ash.{name}"]
    return [*words, "-chardev", f"file,id=console,path={folder / 'console.log'}", "-serial", "chardev:console"]


def _boot(guest: Path, disks: dict[str, Path], folder: Path, accel: str, timeout: float) -> int:
    """Boots and follows to the end; gives the guest's exit code. An emulated machine sometimes hangs early: then it is started again."""
    deadline, said = time.monotonic() + timeout, ""
    for attempt in range(1, BOOT_TRIES + 1):
        say(f"booting ({accel})")
        (folder / "progress").write_bytes(b"")
        with (
            _machine(command(guest, disks, folder, accel), folder / "qemu.log") as machine,
            (folder / "progress").open(errors="replace") as lines,
        ):
            last = ""
            for line in _follow(machine, lines, deadline):
                say(line)
                last = line or last
        if last.startswith(_LAST_WORD):
            return int(last.removeprefix(_LAST_WORD))
        said = _tail(folder / "console.log") + _tail(folder / "qemu.log")
        if last or attempt == BOOT_TRIES:
            break
        say(f"it said nothing within {BOOT_TIMEOUT:g} s; its console ends with:\n{said}")
    raise GuestFailed(f"the guest ended without a word of the outcome; its console ends with:\n{said}")


@contextmanager
def _machine(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {"PATH": os.environ.get("PATH", ""), "TMPDIR": str(log.parent)}
    with log.open("wb") as output:
        machine = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        yield machine
    finally:
        machine.terminate()
        try:
            machine.wait(10)
        except subprocess.TimeoutExpired:
            machine.kill()
            machine.wait(10)


def _follow(machine: subprocess.Popen[bytes], lines: TextIO, deadline: float) -> Iterator[str]:
    """What the guest prints, line by line, until it is off or seems to hang before its first word. Raises GuestFailed at `deadline`."""
    silent_until = time.monotonic() + BOOT_TIMEOUT
    rest = ""
    while True:
        is_over = machine.poll() is not None
        for piece in lines:
            rest += piece
            if rest.endswith("\n"):
                silent_until = deadline
                yield rest.rstrip()
                rest = ""
        if is_over or time.monotonic() > silent_until < deadline:
            return
        if time.monotonic() > deadline:
            raise GuestFailed("the guest did not end in time (--timeout)")
        time.sleep(0.2)


def _keep_results(folder: Path, results: Path) -> None:
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    for name in ("console.log", "progress"):
        if (folder / name).exists():
            shutil.copy2(folder / name, results / name)
    if (folder / "results").exists() and (folder / "results").stat().st_size:
        with tarfile.open(folder / "results") as archive:
            archive.extractall(results, filter="data")


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:] if path.exists() else ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
