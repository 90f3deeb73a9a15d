"""The one file as its users meet it: what it holds, when it unpacks, and what it does where it cannot."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHONS = ("311", "312", "313", "314")
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
IMPORT_SERVER_PARTS = (
    "import _ash; _ash.install(); import aiohttp.web, aiosqlite, ash.store; print(aiohttp.__file__); print(ash.store.__file__)"
)
USE_CLOUD_PARTS = """
import _ash; _ash.install()
import anthropic, boto3, jiter, pydantic_core
from anthropic.lib.bedrock import _stream_decoder
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
session = boto3.Session(region_name="eu-west-1")
request = AWSRequest("POST", "https://bedrock-runtime.eu-west-1.amazonaws.com/model/m/invoke", data=b"{}")
SigV4Auth(session.get_credentials(), "bedrock", "eu-west-1").add_auth(request)
assert "Credential=AKIDEXAMPLE/" in request.headers["Authorization"], request.headers
for service in ("sts", "sso", "sso-oidc", "bedrock-runtime"):
    session.client(service)
assert _stream_decoder.get_response_stream_shape() is not None
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import rsa
pem = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
import google.auth.transport.requests
from google.oauth2 import service_account
info = {"client_email": "a@example.com", "token_uri": "https://example.com/token", "private_key": pem.decode()}
credentials = service_account.Credentials.from_service_account_info(info, scopes=["x"])
assert len(credentials.sign_bytes(b"text")) == 256
print("signed", anthropic.AnthropicVertex(region="r", project_id="p", credentials=credentials).region)
"""


def other_pythons() -> dict[str, str | None]:
    """Interpreters of the other supported versions, on PATH or below pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found: dict[str, str | None] = {}
    for minor in (11, 12, 13, 14):
        if sys.version_info[1] != minor:
            places = [*sorted(str(path) for path in pyenv.glob(f"3.{minor}.*/bin")), os.environ.get("PATH", "")]
            found[f"3.{minor}"] = shutil.which(f"python3.{minor}", path=os.pathsep.join(places))
    return found


class Machine:
    """Runs the file with a cache, a home and a temporary folder of its own."""

    def __init__(self, pyz: Path, folder: Path) -> None:
        self.pyz, self.cache, self.home, self.tmp = pyz, folder / "cache", folder / "home", folder / "tmp"
        self.home.mkdir()
        self.tmp.mkdir(mode=0o700)

    def env(self, **changes: str | None) -> dict[str, str]:
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "ASH_CACHE_DIR": str(self.cache),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return {name: value for name, value in {**env, **changes}.items() if value is not None}

    def ash(self, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
        return self.run([python, str(self.pyz), *arguments])

    def run_code(
        self, code: str, python: str = sys.executable, prefix: tuple[str, ...] = (), **env: str | None
    ) -> subprocess.CompletedProcess[str]:
        return self.run([*prefix, python, "-c", code], PYTHONPATH=str(self.pyz), **env)

    def run(self, command: list[str], **env: str | None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.env(**env), cwd=self.home, capture_output=True, text=True, timeout=120, check=False)

    def unpacked(self, group: str = "") -> list[Path]:
        return sorted(path for path in self.cache.glob(f"{group}*") if path.is_dir()) if self.cache.exists() else []


@pytest.fixture
def machine(ash_pyz: Path, tmp_path: Path) -> Machine:
    return Machine(ash_pyz, tmp_path)


@pytest.fixture(scope="module")
def warm_cache(ash_pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    machine = Machine(ash_pyz, tmp_path_factory.mktemp("warm"))
    assert machine.run_code(IMPORT_SERVER_PARTS).returncode == 0
    return machine.cache


@pytest.fixture
def warm(machine: Machine, warm_cache: Path) -> Machine:
    """A machine on which the server parts are unpacked already."""
    shutil.copytree(warm_cache, machine.cache)
    return machine


def payload(pyz: Path, group: str, kind: str) -> dict[str, bytes]:
    with zipfile.ZipFile(pyz) as archive:
        data = lzma.decompress(archive.read(f"_ash/payload/{group}-{kind}.xz"))
    index, _, content = data.partition(b"\n\n")
    files, start = {}, 0
    for line in index.decode().splitlines():
        size, _, name = line.partition(" ")
        files[name] = content[start : start + int(size)]
        start += int(size)
    assert start == len(content)
    return files


# What needs no unpacking.


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["cache", "list"], ["session", "--help"], ["start", "--help"]])
def test_client_commands_unpack_nothing(machine: Machine, arguments: list[str]) -> None:
    done = machine.ash(*arguments)
    assert done.returncode == 0, done.stderr
    assert machine.unpacked() == []
    assert list(machine.tmp.iterdir()) == []


def test_the_file_is_a_library_without_unpacking(machine: Machine) -> None:
    code = (
        "import ash.client, importlib.resources as r; from ash_ai import AshClient; print((r.files('ash') / 'bridge.py').read_text()[:3])"
    )
    done = machine.run_code(code)
    assert (done.returncode, done.stdout) == (0, '"""\n'), done.stderr
    assert machine.unpacked() == []


def test_asking_whether_a_package_exists_unpacks_nothing(machine: Machine) -> None:
    done = machine.run_code(
        "import _ash; _ash.install(); from importlib.util import find_spec; print(find_spec('pydantic_core') is not None)"
    )
    assert done.stdout == "True\n", done.stderr
    assert machine.unpacked() == []


# Unpacking.


def test_first_import_unpacks_the_server_parts_only_and_the_next_start_nothing(machine: Machine) -> None:
    assert machine.run_code(IMPORT_SERVER_PARTS).returncode == 0
    first = {path: path.stat().st_ino for path in machine.cache.rglob("*")}
    assert [path.name.partition("-")[0] for path in machine.unpacked()] == ["ash", "core"]
    again = machine.run_code(IMPORT_SERVER_PARTS)
    assert again.returncode == 0
    assert all(line.startswith(str(machine.cache)) and line.endswith(".pyc") for line in again.stdout.split())
    assert {path: path.stat().st_ino for path in machine.cache.rglob("*")} == first


def test_ten_first_starts_at_once_unpack_once(machine: Machine) -> None:
    command = [sys.executable, "-c", IMPORT_SERVER_PARTS]
    env = machine.env(PYTHONPATH=str(machine.pyz))
    started = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(10)]
    results = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
    assert results == [("", 0)] * 10
    assert len(machine.unpacked("core-")) == 1
    assert not list(machine.cache.glob(".unfinished-*"))


def test_a_killed_first_start_is_made_good_by_the_next(machine: Machine) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORT_SERVER_PARTS], env=machine.env(PYTHONPATH=str(machine.pyz)), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 5
    while not list(machine.cache.glob(".unfinished-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(5)
    assert list(machine.cache.glob(".unfinished-*"))
    assert machine.run_code(IMPORT_SERVER_PARTS).returncode == 0
    assert not list(machine.cache.glob(".unfinished-*"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("core-*/lib.zip", flip_a_byte),
        ("ash-*/lib.zip", flip_a_byte),
        ("core-*/aiohttp*.so", cut_in_half),
        ("core-*/manifest", cut_in_half),
        ("core-*/y*.so", Path.unlink),
    ],
)
def test_a_damaged_cache_is_repaired(warm: Machine, pattern: str, damage: object) -> None:
    assert callable(damage)
    damage(next(warm.cache.glob(pattern)))
    done = warm.run_code(IMPORT_SERVER_PARTS)
    assert done.returncode == 0, done.stderr
    assert "was damaged; unpacked it again" in done.stderr
    assert warm.run_code(IMPORT_SERVER_PARTS).stderr == ""


def test_ash_modules_keep_their_resources_after_unpacking(warm: Machine) -> None:
    code = (
        "import _ash, importlib.resources as r; _ash.install(); import aiohttp, ash.sql;"
        "print(r.files('ash.sql').joinpath('0001_initial.sql').is_file(), r.files('ash').joinpath('runtime').is_dir())"
    )
    done = warm.run_code(code)
    assert done.stdout == "True True\n", done.stderr


@pytest.mark.parametrize(("variable", "below"), [("ASH_CACHE_DIR", ""), ("XDG_CACHE_HOME", "ash"), ("HOME", ".cache/ash")])
def test_later_client_commands_use_the_unpacked_bytecode(warm: Machine, variable: str, below: str) -> None:
    place = warm.tmp / "place"
    shutil.copytree(warm.cache, place / below)
    done = warm.run([sys.executable, str(warm.pyz), "cache", "list", "--json"], **{"ASH_CACHE_DIR": None, variable: str(place)})
    used = {Path(row["path"]).name.partition("-")[0]: row["isUsed"] for row in json.loads(done.stdout)}
    assert used == {"ash": True, "core": False}, done.stderr


def test_client_commands_ignore_damaged_bytecode(warm: Machine) -> None:
    flip_a_byte(next(warm.cache.glob("ash-*/lib.zip")))
    done = warm.ash("cache", "list", "--json")
    assert [row["isUsed"] for row in json.loads(done.stdout)] == [False, False]


def test_packages_of_the_machine_are_never_mixed_in(warm: Machine) -> None:
    (warm.home / "aiohttp").mkdir()
    (warm.home / "aiohttp" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    done = warm.run([sys.executable, "-c", IMPORT_SERVER_PARTS], PYTHONPATH=f"{warm.home}{os.pathsep}{warm.pyz}")
    assert done.returncode == 0, done.stderr


# Places that cannot be used.


def test_a_read_only_home_falls_back_to_the_temporary_folder_and_says_where(machine: Machine) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is missing; it makes the home read-only here")
    prefix = ("bwrap", "--ro-bind", "/", "/", "--bind", str(machine.tmp), str(machine.tmp), "--dev", "/dev")
    done = machine.run_code(IMPORT_SERVER_PARTS, prefix=prefix, ASH_CACHE_DIR=None)
    assert done.returncode == 0, done.stderr
    fallback = machine.tmp / f"ash-{os.getuid()}"
    assert f"using {fallback} instead" in done.stderr
    assert fallback.stat().st_mode & 0o777 == 0o700


def test_a_missing_home_falls_back_to_the_temporary_folder(machine: Machine) -> None:
    done = machine.run_code(IMPORT_SERVER_PARTS, ASH_CACHE_DIR=None, HOME="/proc/none")
    assert done.returncode == 0, done.stderr
    assert f"using {machine.tmp}/ash-{os.getuid()} instead" in done.stderr


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_is_refused(machine: Machine, mode: int) -> None:
    planted = machine.tmp / f"ash-{os.getuid()}"
    planted.mkdir()
    planted.chmod(mode)
    done = machine.run_code(IMPORT_SERVER_PARTS, ASH_CACHE_DIR=None, HOME="/proc/none")
    assert done.returncode == 1
    assert "can be written by other users" in done.stderr
    assert list(planted.iterdir()) == []


def test_a_link_in_the_temporary_folder_is_not_followed(machine: Machine) -> None:
    (machine.tmp / f"ash-{os.getuid()}").symlink_to(machine.home)
    done = machine.run_code(IMPORT_SERVER_PARTS, ASH_CACHE_DIR=None, HOME="/proc/none")
    assert "is not a folder" in done.stderr
    assert list(machine.home.iterdir()) == []


@pytest.fixture
def noexec(machine: Machine) -> tuple[str, ...]:
    """A prefix that runs a command where home and temporary folder are mounted noexec."""
    script = 'mount -t tmpfs -o noexec tmpfs "$HOME" && mount -t tmpfs -o noexec,mode=700 tmpfs "$TMPDIR" && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
    if machine.run([*prefix, "true"]).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    return prefix


def test_where_nothing_may_be_executed_the_server_parts_run_without_compiled_modules(machine: Machine, noexec: tuple[str, ...]) -> None:
    code = IMPORT_SERVER_PARTS + "; import multidict; print(multidict.MultiDict.__module__)"
    done = machine.run_code(code, prefix=noexec, ASH_CACHE_DIR=None)
    assert done.returncode == 0, done.stderr
    assert "mounted noexec" in done.stderr
    assert done.stdout.splitlines()[-1] == "multidict._multidict_py"


def test_where_nothing_may_be_executed_the_cloud_parts_say_so(machine: Machine, noexec: tuple[str, ...]) -> None:
    done = machine.run_code("import _ash; _ash.install(); import anthropic", prefix=noexec, ASH_CACHE_DIR=None)
    assert "set ASH_CACHE_DIR to a folder that allows running files" in done.stderr


def test_an_unusable_cache_folder_ends_in_one_plain_line(machine: Machine) -> None:
    (machine.tmp / f"ash-{os.getuid()}").write_text("")
    done = machine.run(
        [sys.executable, str(machine.pyz), "start", "--port", "0", "--data-dir", str(machine.home / "data")], ASH_CACHE_DIR="/proc/none"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("ash: no folder to unpack into: ")
    assert len(done.stderr.splitlines()) == 1


MUSL = "import os; os.confstr = lambda name: int('unrecognized configuration name'); "


def test_with_another_c_library_the_server_parts_run_without_compiled_modules(machine: Machine) -> None:
    done = machine.run_code(MUSL + IMPORT_SERVER_PARTS + "; import multidict; print(multidict.MultiDict.__module__)")
    assert done.stdout.splitlines()[-1:] == ["multidict._multidict_py"], done.stderr
    assert not list(machine.cache.rglob("*.so"))


def test_with_another_c_library_the_cloud_parts_say_what_they_need(machine: Machine) -> None:
    done = machine.run_code(MUSL + "import _ash; _ash.install(); import anthropic")
    assert "need compiled packages, which this file holds for CPython 3.11 to 3.14 on Linux (x86-64, aarch64) with glibc" in done.stderr


# Damaged files and wrong interpreters.


def test_a_truncated_file_says_that_it_is_incomplete(machine: Machine, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pyz"
    cut.write_bytes(machine.pyz.read_bytes()[: machine.pyz.stat().st_size // 2])
    done = machine.run([sys.executable, str(cut), "version"])
    assert done.returncode != 0
    assert "this-file-is-incomplete_download-or-build-it-again" in done.stderr


def test_a_damaged_payload_is_named_and_never_unpacked(machine: Machine, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pyz"
    with zipfile.ZipFile(machine.pyz) as archive:
        info = archive.getinfo("_ash/payload/core-py.xz")
    content = bytearray(machine.pyz.read_bytes())
    content[info.header_offset + 5000] ^= 1
    damaged.write_bytes(content)
    done = machine.run([sys.executable, str(damaged), "start", "--port", "0", "--data-dir", str(machine.home / "data")])
    assert done.returncode == 1
    assert "is damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert not machine.unpacked("core-")


def test_an_old_python_gets_a_plain_answer(machine: Machine) -> None:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    old = [
        str(path)
        for pattern in ("2.7.*/bin/python2.7", "3.[6-9].*/bin/python3", "3.10.*/bin/python3")
        for path in sorted(pyenv.glob(pattern))
    ]
    if not old:
        pytest.skip("no Python older than 3.11 below pyenv")
    for python in old:
        done = machine.ash("version", python=python)
        assert done.returncode == 1
        assert "needs Python 3.11 or newer" in done.stderr, done.stderr


@pytest.mark.parametrize("version", other_pythons())
def test_another_python_runs_everything(machine: Machine, version: str) -> None:
    python = other_pythons()[version]
    if python is None:
        pytest.skip(f"CPython {version} is not on this machine")
    done = machine.run_code(IMPORT_SERVER_PARTS, python=python)
    assert done.returncode == 0, done.stderr
    cloud = machine.run_code(USE_CLOUD_PARTS, python=python, AWS_ACCESS_KEY_ID="AKIDEXAMPLE", AWS_SECRET_ACCESS_KEY="x")
    assert cloud.stdout == "signed r\n", cloud.stderr
    assert machine.ash("--help", python=python).returncode == 0


def test_cloud_parts_sign_requests_and_stay_apart(warm: Machine) -> None:
    done = warm.run_code(USE_CLOUD_PARTS, AWS_ACCESS_KEY_ID="AKIDEXAMPLE", AWS_SECRET_ACCESS_KEY="x")
    assert done.stdout == "signed r\n", done.stderr
    assert len(warm.unpacked("models-")) == 1


# Contents.


@pytest.fixture(
    scope="module",
    params=[(python, machine) for machine in ELF_MACHINES for python in PYTHONS],
    ids=lambda target: f"cp{target[0]}-{target[1]}",
)
def target(request: pytest.FixtureRequest) -> tuple[str, str]:
    python, machine = request.param
    return python, machine


def test_every_target_has_all_compiled_modules_for_its_machine(ash_pyz: Path, target: tuple[str, str]) -> None:
    python, machine = target
    kinds = [("core", f"cp{python}"), ("models", f"cp{python}"), ("crypto", f"cp{python}"), ("crypto", "abi3")]
    modules = {name: data for group, kind in kinds for name, data in payload(ash_pyz, group, f"{kind}-{machine}-glibc").items()}
    assert set(modules) >= {"aiohttp._http_parser.so", "multidict._multidict.so", "pydantic_core._pydantic_core.so", "jiter.jiter.so",
                            "_cffi_backend.so", "cryptography.hazmat.bindings._rust.so", "yarl._quoting_c.so"}  # fmt: skip
    for name, data in modules.items():
        assert data[:6] == b"\x7fELF\x02\x01", name
        assert struct.unpack_from("<H", data, 18) == (ELF_MACHINES[machine],), name
        assert f"PyInit_{name[:-3].rpartition('.')[2]}".encode() in data, name


def test_all_targets_hold_the_same_modules(ash_pyz: Path) -> None:
    for group in ("core", "crypto", "models"):
        names = [tuple(payload(ash_pyz, group, f"cp{python}-{machine}-glibc")) for python in PYTHONS for machine in ELF_MACHINES]
        assert len(set(names)) == 1


def test_the_shared_sources_hold_licences_and_no_compiled_code(ash_pyz: Path) -> None:
    files = {name: data for group in ("core", "crypto", "models") for name, data in payload(ash_pyz, group, "py").items()}
    assert not [name for name in files if name.endswith((".so", ".pyc"))]
    for package in ("aiohttp", "anthropic", "cryptography", "pydantic_core"):
        assert [name for name in files if name.startswith(f"{package}-") and "LICENSE" in name], package


def test_the_file_stays_below_30_mb_and_runs_by_itself(ash_pyz: Path, machine: Machine) -> None:
    assert ash_pyz.stat().st_size < 30_000_000
    assert machine.run([str(ash_pyz), "version"]).returncode == 0


def build_copy_of(source: Path, folder: Path, umask: int) -> str:
    """The digest of a file built from a copy of `source` at `folder`."""
    for top in ("ash", "ash_ai", "bootstrap"):
        shutil.copytree(source / top, folder / top, copy_function=shutil.copyfile)
    shutil.copyfile(source / "requirements.lock", folder / "requirements.lock")
    command = [sys.executable, str(ROOT / "build_pyz.py"), "--source", str(folder), "--output", str(folder / "built.pyz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, umask=umask)
    assert done.returncode == 0, done.stderr
    return hashlib.sha256((folder / "built.pyz").read_bytes()).hexdigest()


def test_a_build_elsewhere_gives_the_same_bytes(ash_pyz: Path, tmp_path: Path) -> None:
    first = build_copy_of(ROOT, tmp_path / "first", umask=0o022)
    assert build_copy_of(tmp_path / "first", tmp_path / "another place", umask=0o077) == first


# Pruning.


def test_prune_removes_old_builds_and_keeps_what_is_used_or_current(warm: Machine) -> None:
    current = warm.unpacked("core-")[0]
    old, used = (warm.cache / f"core-cp311-any-{letter * 16}" for letter in "ab")
    for folder in (old, used):
        shutil.copytree(current, folder)
    code = f"from ash import cache; assert cache.hold({str(used)!r}); print(flush=True); input()"
    env = warm.env(PYTHONPATH=str(warm.pyz))
    holder = subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    done = warm.ash("cache", "prune")
    holder.communicate("\n", timeout=5)
    assert done.returncode == 0, done.stderr
    assert (old.exists(), used.exists(), current.exists()) == (False, True, True)
