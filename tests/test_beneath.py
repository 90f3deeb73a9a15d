"""Opening below a hostile folder, by openat2 and by steps: what is there is reached, and nothing outside it by any way."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ash import beneath

WAYS = ["at once", "by steps"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "at once" and not beneath.has_openat2():
        pytest.skip("this kernel, or what filters its calls, has no openat2")
    monkeypatch.setattr(beneath, "has_openat2", lambda: request.param == "at once")
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "secret").write_text("secret")
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    (inside / "deep" / "file").write_text("found")
    (inside / "link").symlink_to(tmp_path / "secret")
    (inside / "up").symlink_to("..")
    (inside / "deep" / "same").symlink_to("file")
    (inside / "proc").symlink_to("/proc/self/root")
    os.mkfifo(inside / "fifo")
    fd = beneath.open_folder(str(inside))
    yield fd
    os.close(fd)


def read(folder: int, path: str) -> str:
    with open(beneath.open_file(folder, path)) as file:
        return file.read()


@pytest.mark.parametrize("path", ["deep/file", "./deep/file", "deep//file", "deep/./file"])
def test_what_lies_below_is_opened(way: str, folder: int, path: str) -> None:
    assert read(folder, path) == "found"


@pytest.mark.parametrize(
    "path",
    [
        "link", "up/secret", "deep/same", "../secret", "deep/../../secret", "/etc/passwd", "proc/etc/passwd", "fifo", "deep", "missing",
        "up/inside/deep/file",
    ],
)  # fmt: skip
def test_no_link_no_way_up_and_nothing_but_files(way: str, folder: int, path: str) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - which error it is depends on the way
        read(folder, path)


def test_another_file_system_is_not_entered(way: str, tmp_path: Path) -> None:
    root = beneath.open_folder("/")
    try:
        for path in ("proc/self/status", "proc"):
            with pytest.raises(OSError, match="cross-device") as caught:
                os.close(beneath.open_beneath(root, path, os.O_RDONLY))
            assert caught.value.errno == errno.EXDEV
    finally:
        os.close(root)


@given(
    path=st.lists(
        st.sampled_from(["..", ".", "", "deep", "up", "link", "proc", "file", "same", "inside", "secret", "/", "\0"]), max_size=8
    ).map("/".join)
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_path_is_asked_for_the_secret_stays_outside(way: str, folder: int, path: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        assert read(folder, path) == "found"
