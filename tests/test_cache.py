"""The cache folder of ash.pyz: where it may be, what counts as safe, and what prune removes. tests/e2e/test_pyz.py unpacks for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ash import cache

NAME = "core-cp311-x86_64-glibc-" + "0123456789abcdef"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and an empty temporary folder."""
    monkeypatch.setenv("ASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache.create_root(str(tmp_path / "cache"))
    return tmp_path / "cache"


def unpack(root: Path, name: str = NAME) -> Path:
    """A folder as the bootstrap leaves it."""
    folder = root / name
    folder.mkdir()
    (folder / cache.MANIFEST).write_text("# 0 lines\n")
    return folder


def test_a_checkout_runs_from_no_file() -> None:
    assert cache.running_file() is None


def test_the_folder_asked_for_comes_first_then_one_below_the_temporary_folder(root: Path) -> None:
    assert cache.candidates() == [str(root), str(root.parent / f"ash-{os.geteuid()}")]


def test_xdg_cache_home_counts_when_it_is_absolute(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASH_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert cache.candidates()[0] == "/some/where/ash"
    monkeypatch.setenv("XDG_CACHE_HOME", "some/where")
    assert cache.candidates()[0] == "/home/someone/.cache/ash"


def test_a_new_root_is_for_this_user_alone(root: Path) -> None:
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_root_that_others_can_write_is_refused(root: Path) -> None:
    root.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by other users"):
        cache.check_owner(str(root))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another user")
def test_a_root_of_another_user_is_refused(root: Path) -> None:
    os.chown(root, 61234, 61234)
    with pytest.raises(PermissionError, match="belongs to another user"):
        cache.check_owner(str(root))


def test_a_file_in_place_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="is not a folder"):
        cache.create_root(str(tmp_path / "file"))


def test_describe_tells_size_and_use(root: Path) -> None:
    folder = unpack(root)
    assert cache.describe() == [cache.Unpacked(str(folder), 10, is_current=False, is_used=False)]
    held = cache.hold(str(folder))
    assert held is not None
    assert cache.describe()[0].is_used
    os.close(held)


def test_prune_removes_what_is_old_or_unfinished(root: Path) -> None:
    old = unpack(root)
    unfinished = root / f"{cache.UNFINISHED}123-{NAME}"
    unfinished.mkdir()
    assert [found.path for found in cache.prune()] == [str(unfinished), str(old)]
    assert not old.exists()
    assert cache.prune() == []


def test_prune_leaves_alone_what_another_process_uses(root: Path) -> None:
    folder = unpack(root)
    code = f"from ash import cache; assert cache.hold({str(folder)!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        user.stdout.readline()
        assert cache.prune() == []
        user.communicate("\n", timeout=5)
    assert [found.path for found in cache.prune()] == [str(folder)]


def test_prune_never_touches_what_is_not_ours(root: Path) -> None:
    (root / "my-own-precious-folder").mkdir()
    (root / "notes.txt").touch()
    assert cache.prune() == []
    assert sorted(path.name for path in root.iterdir()) == [".lock", "my-own-precious-folder", "notes.txt"]


def test_a_folder_that_is_gone_cannot_be_held(root: Path) -> None:
    assert cache.hold(str(root / NAME)) is None


def test_cache_of_a_machine_without_one_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASH_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache.describe() == cache.prune() == []
    assert list(tmp_path.iterdir()) == []
