"""The pure parts of the build: reading the lock, choosing files, stripping compiled modules. tests/e2e/test_pyz.py builds for real."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import build_pyz

ROOT = Path(__file__).parents[1]


def test_a_stripped_module_is_smaller_and_still_works(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("aiohttp._http_parser")
    if spec is None or spec.origin is None or not spec.origin.endswith(".so"):
        pytest.skip("aiohttp has no compiled parser here")
    original = Path(spec.origin).read_bytes()
    stripped = build_pyz.strip_elf(original)
    assert len(stripped) < len(original)
    (tmp_path / "_http_parser.so").write_bytes(stripped)
    code = (
        "import aiohttp, importlib.util, sys;"
        "spec = importlib.util.spec_from_file_location('aiohttp._http_parser', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); print(module.HttpRequestParser.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "_http_parser.so")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "HttpRequestParser\n", done.stderr


def test_stripping_refuses_what_is_not_a_module() -> None:
    with pytest.raises(build_pyz.BuildError, match="64-bit little-endian ELF"):
        build_pyz.strip_elf(b"MZ" + bytes(100))


def test_the_lock_pins_every_package_with_hashes_and_names_no_place() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / name).read_text()
        locked = build_pyz.read_lock(text)
        assert len(locked) > 30
        assert all(locked.values())
        assert "://" not in text
        assert not [line for line in text.splitlines() if line.startswith("-")]


def test_the_lock_of_the_file_and_that_of_the_tools_agree() -> None:
    tools, held = (
        {line.partition(" ;")[0]: hashes for line, hashes in build_pyz.read_lock((ROOT / name).read_text()).items()}
        for name in ("requirements-dev.lock", "requirements.lock")
    )
    assert {package: tools.get(package) for package in held} == held


def test_a_dependency_that_depends_on_the_python_version_stops_the_build() -> None:
    with pytest.raises(build_pyz.BuildError, match="depends on the Python version"):
        build_pyz.read_lock("tomli==2.0 ; python_full_version < '3.12' \\\n    --hash=sha256:" + "0" * 64)


def test_the_oldest_glibc_that_fits_all_wheels_counts() -> None:
    names = [
        "a-1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "b-1-cp311-abi3-manylinux_2_28_x86_64.whl",
        "c-1-py3-none-any.whl",
    ]
    assert build_pyz.min_glibc(map(Path, names)) == (2, 28)


def test_an_unknown_kind_of_file_in_a_wheel_stops_the_build(tmp_path: Path) -> None:
    wheel = tmp_path / "pkg-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/__init__.py", "")
        archive.writestr("pkg/model.bin", "data")
    with pytest.raises(build_pyz.BuildError, match=r"holds pkg/model\.bin"):
        list(build_pyz.wheel_files(wheel))


def test_namespace_packages_become_ordinary_ones(tmp_path: Path) -> None:
    wheel = tmp_path / "pkg-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("google/auth/__init__.py", "")
    (sources,) = build_pyz.payloads({"cp311-x86_64": [wheel]})
    assert sources.files["google/__init__.py"] == b""


def test_the_zip_has_fixed_times_modes_and_order(tmp_path: Path) -> None:
    build_pyz.write(tmp_path / "a.pyz", {"b.py": b"2", "a/c.py": b"1"})
    build_pyz.write(tmp_path / "b.pyz", {"a/c.py": b"1", "b.py": b"2"})
    assert (tmp_path / "a.pyz").read_bytes() == (tmp_path / "b.pyz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pyz") as archive:
        assert archive.namelist() == ["a/", "a/c.py", "b.py"]
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
