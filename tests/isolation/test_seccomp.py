"""The filter of system calls, carried out here step by step: its table is complete, and its program does what the table says."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import re
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from ash.errors import IsolationUnavailable
from ash.isolation import seccomp
from ash.isolation.seccomp import ALLOW, ARCHITECTURES, ENOSYS, EPERM, KILL, RULES, compile_filter, decide
from ash.isolation.syscalls import NUMBERS

MACHINES = sorted(NUMBERS)
X86_HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
GENERIC_HEADER = Path("/usr/include/asm-generic/unistd.h")
NEWUSER, SIGCHLD, TIOCSTI, TIOCGWINSZ = 0x10000000, 17, 0x5412, 0x5413
ANYTHING = ((0,) * 6, (0xFFFFFFFFFFFFFFFF,) * 6, (2, 1, 6, 0, 0, 0), (16, 3, 9, 0, 0, 0), (NEWUSER, TIOCSTI, 31, 0, 0, 0))


def run(program: bytes, machine: str, number: int, arguments: Sequence[int] = (0,) * 6) -> int:
    """What the kernel would answer: the few instructions that the filter uses, and an error for any other."""
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, ARCHITECTURES.get(machine, 0x40000003), 0, *arguments)
    instructions = list(struct.iter_unpack("<HBBI", program))
    at = value = 0
    while True:
        code, if_true, if_false, constant = instructions[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, constant)
        elif code == 0x54:
            value &= constant
        elif code == 0x05:
            at += constant
        elif code == 0x06:
            return int(constant)
        else:
            holds = {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[code]
            at += if_true if holds else if_false


def expect(call: str, arguments: Sequence[int], *, ptrace: bool = False) -> int:
    """The same from the table itself."""
    for rule in decide(call, ptrace=ptrace):
        tests = []
        for check in rule.when:
            value = arguments[check.argument] & 0xFFFFFFFF & check.mask
            tests.append(
                {"in": value in check.values, "not in": value not in check.values, "any bit of": value & check.values[0]}[check.kind]
            )
        if all(tests):
            return rule.action
    raise AssertionError(f"no rule for {call}")


# The table


@pytest.mark.parametrize("machine", MACHINES)
def test_every_call_is_decided_and_ends_in_a_rule_without_conditions(machine: str) -> None:
    for call in NUMBERS[machine]:
        rules = decide(call, ptrace=False)
        assert [bool(rule.when) for rule in rules] == [True] * (len(rules) - 1) + [False], call


def test_every_rule_speaks_of_calls_that_exist() -> None:
    known = set().union(*(set(numbers) for numbers in NUMBERS.values()))
    assert [call for rule in RULES for call in rule.calls.split() if call not in known] == []


def test_every_condition_is_said_in_words() -> None:
    assert [rule for rule in RULES if bool(rule.when) != bool(rule.condition)] == []


def test_the_page_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "threat-model.md").read_text()
    assert seccomp.markdown() in page, "put the output of `python -c 'from ash.isolation import seccomp; print(seccomp.markdown())'` there"


@pytest.mark.skipif(not X86_HEADER.exists(), reason="no kernel headers for x86-64 (linux-libc-dev)")
def test_the_numbers_of_x86_64_are_those_of_the_kernels_headers() -> None:
    found = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)$", X86_HEADER.read_text(), re.M)}
    assert {name: NUMBERS["x86_64"].get(name) for name in found} == found


@pytest.mark.skipif(not GENERIC_HEADER.exists(), reason="no kernel headers (linux-libc-dev)")
def test_the_numbers_of_aarch64_are_those_of_the_kernels_generic_headers() -> None:
    found = dict(re.findall(r"^#define (__NR\w+)\s+(\w+)$", GENERIC_HEADER.read_text(), re.M))
    newest = int(found.pop("__NR_syscalls"))
    theirs = {name.removeprefix("__NR_"): found.get(value, value) for name, value in found.items() if name.startswith("__NR_")}
    ours = {name: str(number) for name, number in NUMBERS["aarch64"].items() if number < newest}
    assert {name: theirs.get(name) for name in ours} == ours


def test_the_numbers_agree_with_libseccomps_for_both_machines() -> None:
    library = ctypes.util.find_library("seccomp")
    if library is None:
        pytest.skip("libseccomp is not installed")
    resolve = ctypes.CDLL(library).seccomp_syscall_resolve_name_arch
    for machine, numbers in NUMBERS.items():
        theirs = {name: resolve(ctypes.c_uint32(ARCHITECTURES[machine]), name.encode()) for name in numbers}
        assert {name: number for name, number in theirs.items() if number >= 0 and number != numbers[name]} == {}
        assert sum(number >= 0 for number in theirs.values()) > 280


# The program


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("ptrace", [False, True])
def test_the_program_does_what_the_table_says(machine: str, ptrace: bool) -> None:
    program = compile_filter(machine, ptrace=ptrace)
    for call, number in NUMBERS[machine].items():
        for arguments in ANYTHING:
            assert run(program, machine, number, arguments) == expect(call, arguments, ptrace=ptrace), (call, arguments)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_number_that_is_not_in_the_table_is_no_call(machine: str) -> None:
    program, known = compile_filter(machine), set(NUMBERS[machine].values())
    assert {run(program, machine, number) for number in range(1200) if number not in known} == {ENOSYS}
    assert run(program, machine, -1) == ENOSYS


def test_another_calling_convention_ends_the_process() -> None:
    program = compile_filter("x86_64")
    assert run(program, "i386", NUMBERS["x86_64"]["read"]) == KILL
    assert run(program, "aarch64", NUMBERS["aarch64"]["read"]) == KILL
    assert {run(program, "x86_64", 0x40000000 | number) for number in (0, 39, 512, 547, 0x3FFFFFFE)} == {KILL}
    assert run(compile_filter("aarch64"), "x86_64", 0) == KILL


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("call", "arguments", "answer"),
    [
        ("clone", (0x3D0F00, 0), ALLOW),  # a thread
        ("clone", (0x4111 | SIGCHLD, 0), ALLOW),  # vfork
        ("clone", (NEWUSER | SIGCHLD, 0), EPERM),
        ("clone", (1 << 40 | NEWUSER, 0), EPERM),
        ("unshare", (0x400, 0), ALLOW),  # its own table of files
        ("unshare", (0x80, 0), EPERM),
        ("ioctl", (0, TIOCSTI), EPERM),
        ("ioctl", (0, 0xDEAD00000000 | TIOCSTI), EPERM),
        ("ioctl", (0, TIOCGWINSZ), ALLOW),
        ("socket", (1, 1, 0), ALLOW),
        ("socket", (10, 1 | 0o2004000, 6), ALLOW),  # close-on-exec, non-blocking
        ("socket", (2, 2, 1), ALLOW),  # ping
        ("socket", (2, 5, 0), seccomp.EPROTONOSUPPORT),
        ("socket", (2, 3, 1), seccomp.EPROTONOSUPPORT),
        ("socket", (2, 1, 262), seccomp.EPROTONOSUPPORT),
        ("socket", (16, 3, 0), ALLOW),
        ("socket", (16, 3, 12), seccomp.EPROTONOSUPPORT),
        ("socket", (40, 1, 0), seccomp.EAFNOSUPPORT),
        ("socket", (1 << 32 | 40, 1, 0), seccomp.EAFNOSUPPORT),
        ("setsockopt", (0, 6, 31), seccomp.ENOPROTOOPT),
        ("setsockopt", (0, 1, 31), ALLOW),
        ("setsockopt", (0, 6, 1), ALLOW),
        ("personality", (0xFFFFFFFF,), ALLOW),
        ("personality", (0x400000,), EPERM),
    ],
)
def test_arguments_are_told_apart(machine: str, call: str, arguments: tuple[int, ...], answer: int) -> None:
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    assert run(compile_filter(machine), machine, NUMBERS[machine][call], padded) == answer


@pytest.mark.parametrize("machine", MACHINES)
def test_ptrace_is_allowed_by_the_setting_and_nothing_else_changes(machine: str) -> None:
    changed = {
        call for call in NUMBERS[machine] for arguments in ANYTHING if expect(call, arguments) != expect(call, arguments, ptrace=True)
    }
    assert changed == {"ptrace", "process_vm_readv", "process_vm_writev"}


def test_a_machine_without_a_table_isolates_nothing() -> None:
    with pytest.raises(IsolationUnavailable, match="this machine is riscv64"):
        compile_filter("riscv64")


@pytest.mark.parametrize("machine", MACHINES)
def test_the_program_is_short_and_has_no_idle_instruction(machine: str) -> None:
    """Some seven comparisons for most calls; `socket` has the most conditions."""
    program = compile_filter(machine)
    assert len(program) // 8 < 400
    assert len(program) % 8 == 0
    paths = _paths(program)
    assert max(map(len, paths)) < 40
    assert {step for path in paths for step in path} == set(range(len(program) // 8))


def _paths(program: bytes) -> list[list[int]]:
    """Every way through the program."""
    instructions = list(struct.iter_unpack("<HBBI", program))
    waiting, done = [[0]], []
    while waiting:
        path = waiting.pop()
        code, if_true, if_false, constant = instructions[path[-1]]
        if code == 0x06:
            done.append(path)
            continue
        steps = {constant} if code == 0x05 else {if_true, if_false} if code in (0x15, 0x35, 0x45) else {0}
        waiting += [[*path, path[-1] + 1 + step] for step in steps]
    return done


def test_errors_are_the_kernels() -> None:
    assert EPERM & 0xFFFF == errno.EPERM
    assert {seccomp.ALLOW, seccomp.KILL} == {0x7FFF0000, 0x80000000}


def test_the_kernel_takes_the_program(tmp_path: Path) -> None:
    """Loaded by `bwrap` alone, which hands it to the kernel's own checks."""
    machine = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout.strip()
    if machine not in MACHINES:
        pytest.skip(f"no filter for {machine}")
    script = (
        "import ctypes, struct, sys; program = open(sys.argv[1], 'rb').read(); libc = ctypes.CDLL(None, use_errno=True)\n"
        "buffer = ctypes.create_string_buffer(program); prog = struct.pack('HxxxxxxQ', len(program) // 8, ctypes.addressof(buffer))\n"
        "assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.create_string_buffer(prog), 0, 0) == 0\n"
        "sys.exit(libc.unshare(0x10000000) == 0 or ctypes.get_errno() != 1)"
    )
    path = tmp_path / "filter"
    path.write_bytes(compile_filter(machine))
    subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", script, str(path)], check=True, timeout=30)
