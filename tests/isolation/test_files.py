"""Workspaces as archives: what a caller sends is refused or arrives whole, and what the agent made leads nobody astray."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import io
import os
import random
import signal
import stat
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ash.errors import AshError, CapacityReached, Conflict, InvalidRequest, NotFound, PayloadTooLarge
from ash.isolation import files
from ash.isolation.files import Budget
from ash.models import timestamp

BUDGET = Budget(8 << 20, disk_files=102)
"""So that 100 files may come in: the two folders count too."""


@pytest.fixture
def session(tmp_path: Path) -> Path:
    (tmp_path / "sessions/session/workspace").mkdir(parents=True)
    (tmp_path / "sessions/session/home").mkdir()
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "sessions/session"


def archive(
    *members: tuple[str, bytes | str], change: Callable[[tarfile.TarInfo], None] = lambda member: None, mode: str = "w:gz"
) -> io.BytesIO:
    """A tar archive; a member whose content is text is a link to it, one whose name ends with / a folder."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name.rstrip("/") if name != "/" else name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
            elif name.endswith("/"):
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(content)
            change(member)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    target.seek(0)
    return target


def everything(session: Path) -> list[str]:
    """What is in a session's folder but its home; nothing of any upload is left beside it."""
    assert os.listdir(session.parent / files.UPLOADS) == []
    return sorted(str(path.relative_to(session)) for path in session.rglob("*") if path.name != "home")


# In


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_an_archive_comes_in_and_replaces_files_of_the_same_name(session: Path, mode: str) -> None:
    (session / "workspace/old").write_text("old")
    count = files.unpack(str(session), archive(("./old", b"new"), ("a/b/c", b"deep"), ("empty/", b""), mode=mode), BUDGET)
    assert count == 2
    assert (session / "workspace/old").read_text() == "new"
    assert everything(session) == ["workspace", "workspace/a", "workspace/a/b", "workspace/a/b/c", "workspace/empty", "workspace/old"]


def test_what_comes_in_belongs_to_the_workspace_and_has_plain_modes(session: Path) -> None:
    if os.geteuid() == 0:
        os.chown(session / "workspace", 65700, 65700)

    def change(member: tarfile.TarInfo) -> None:
        member.mode, member.uid = 0o6777, 0

    files.unpack(str(session), archive(("a/run", b"#!"), change=change), BUDGET)
    state = (session / "workspace/a/run").stat()
    assert stat.S_IMODE(state.st_mode) == 0o755
    assert state.st_uid == (session / "workspace").stat().st_uid == (session / "workspace/a").stat().st_uid


BAD = {
    "a link": archive(("x", "/etc/passwd")),
    "an absolute path": archive(("/etc/x", b"")),
    "a way up": archive(("a/../../x", b"")),
    "a name twice": archive(("x", b"1"), ("x", b"2")),
    "names that differ by case": archive(("x", b"1"), ("X", b"2")),
    "a file that is also a folder": archive(("x", b"1"), ("x/y", b"2")),
    "a backslash": archive(("a\\x", b"")),
    "a newline": archive(("a\nx", b"")),
    "too deep": archive(("d/" * 40 + "x", b"")),
    "a long name": archive(("n" * 300, b"")),
    "no archive": io.BytesIO(b"hello" * 1000),
    "damaged compression": io.BytesIO(b"\x1f\x8b" + b"x" * 100),
}


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_nothing_but_files_and_folders_comes_in(session: Path, kind: bytes) -> None:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, "x", 0

    with pytest.raises(InvalidRequest, match="archive"):
        files.unpack(str(session), archive(("good", b"x"), ("bad", b""), change=change), BUDGET)
    assert everything(session) == ["workspace"]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_archive_is_refused_and_leaves_the_workspace_as_it_was(session: Path, name: str) -> None:
    BAD[name].seek(0)
    with pytest.raises(InvalidRequest, match="archive: "):
        files.unpack(str(session), BAD[name], BUDGET)
    assert everything(session) == ["workspace"]


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_an_archive_that_is_cut_off_anywhere_is_refused(session: Path, mode: str) -> None:
    whole = archive(("a", random.Random(1).randbytes(3000)), ("b", b"x" * 600), mode=mode).getvalue()
    ends = range(1, len(whole) - (1 if mode == "w:gz" else 10240 - 512), 97)
    for end in ends:
        with pytest.raises(InvalidRequest):
            files.unpack(str(session), io.BytesIO(whole[:end]), BUDGET)
    assert everything(session) == ["workspace"]


def test_too_many_files_and_too_many_bytes_are_refused(session: Path) -> None:
    with pytest.raises(PayloadTooLarge, match="more than 100 files"):
        files.unpack(str(session), archive(*((f"{n}", b"") for n in range(200))), BUDGET)
    with pytest.raises(PayloadTooLarge, match="more than 8 MiB"):
        files.unpack(str(session), archive(("big", random.Random(1).randbytes(9 << 20))), BUDGET)
    assert everything(session) == ["workspace"]


def test_a_bomb_is_refused_before_it_fills_the_disk(session: Path) -> None:
    bomb = io.BytesIO(gzip.compress(bytes(100 << 20)))
    with pytest.raises(PayloadTooLarge, match="unpacks to more than"):
        files.unpack(str(session), bomb, Budget(1 << 40))


def test_a_header_cannot_make_the_server_read_the_archive_into_memory(session: Path) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("x")
        member.pax_headers = {"comment": "x" * (4 << 20)}
        tar.addfile(member)
    target.seek(0)
    with pytest.raises(InvalidRequest, match="headers"):
        files.unpack(str(session), target, BUDGET)


@pytest.mark.parametrize("obstacle", ["link", "file"])
def test_an_upload_is_not_led_out_of_the_workspace(session: Path, obstacle: str) -> None:
    outside = session.parent / "outside"
    outside.mkdir()
    if obstacle == "link":
        (session / "workspace/a").symlink_to(outside)
    else:
        (session / "workspace/a").write_text("")
    with pytest.raises(InvalidRequest, match="leads through"):
        files.unpack(str(session), archive(("first", b"x"), ("a/x", b"x")), BUDGET)
    assert os.listdir(outside) == []
    assert not (session / "workspace/first").exists()


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(session: Path) -> None:
    (session / "workspace/x").symlink_to(session.parent.parent / "secret")
    files.unpack(str(session), archive(("x", b"new")), BUDGET)
    assert (session.parent.parent / "secret").read_text() == "secret"
    assert not (session / "workspace/x").is_symlink()


@given(data=st.binary(max_size=3000))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_refused_in_words(session: Path, data: bytes) -> None:
    for content in (data, gzip.compress(data, mtime=0)):
        with pytest.raises(InvalidRequest):
            files.unpack(str(session), io.BytesIO(content), BUDGET)
    assert everything(session) == ["workspace"]


WHOLE = archive(("a/one", b"x" * 700), ("b", b"y" * 100), ("folder/", b""), mode="w").getvalue()


@given(changes=st.lists(st.tuples(st.integers(0, 3 * 1024), st.integers(0, 255)), min_size=1, max_size=8), packs=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_archive_never_writes_outside_nor_fails_without_a_word(
    session: Path, changes: list[tuple[int, int]], packs: bool
) -> None:
    content = bytearray(WHOLE)
    for position, value in changes:
        content[position] = value
    before = sorted(os.listdir(session.parent.parent))
    with contextlib.suppress(AshError):  # every other exception fails the test
        files.unpack(str(session), io.BytesIO(gzip.compress(content) if packs else bytes(content)), BUDGET)
    assert sorted(os.listdir(session.parent.parent)) == before
    assert sorted(os.listdir(session)) == ["home", "workspace"]
    assert os.listdir(session.parent / files.UPLOADS) == []
    assert all(path.is_file() or path.is_dir() for path in session.rglob("*"))


# Out


def test_the_list_has_files_alone_and_follows_no_link(session: Path) -> None:
    workspace = session / "workspace"
    (workspace / "node_modules/x").mkdir(parents=True)
    (workspace / "node_modules/x/y").write_text("")
    (workspace / "a").write_text("12345")
    (workspace / "link").symlink_to("/etc")
    os.mkfifo(workspace / "fifo")
    found, is_cut = files.list_files(str(session), frozenset(("node_modules",)))
    assert [(file.path, file.size) for file in found] == [("a", 5)]
    assert not is_cut


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("link", "links are not followed"),
        ("up/secret", "link|found"),
        ("../secret", r"\.\."),
        ("folder", "not a file"),
        ("fifo", "not a file"),
    ],
)
def test_the_server_follows_no_link_that_the_agent_made(session: Path, path: str, error: str) -> None:
    workspace = session / "workspace"
    (workspace / "link").symlink_to("../../../secret")
    (workspace / "up").symlink_to("../../..")
    (workspace / "folder").mkdir()
    os.mkfifo(workspace / "fifo")
    with pytest.raises((InvalidRequest, NotFound), match=error):
        files.open_workspace_file(str(session), path)


def test_a_packed_workspace_unpacks_to_the_same_files(session: Path) -> None:
    workspace = session / "workspace"
    (workspace / ".git").mkdir()
    (workspace / ".git/HEAD").write_text("ref")
    (workspace / "run").write_text("#!/bin/sh")
    (workspace / "run").chmod(0o700)
    (workspace / "link").symlink_to("/etc/passwd")
    os.mkfifo(workspace / "fifo")
    target = io.BytesIO()
    assert files.pack(str(session), target, BUDGET) == 3
    target.seek(0)
    other = session.parent / "other"
    (other / "workspace").mkdir(parents=True)
    (other / "home").mkdir()
    files.unpack(str(other), target, BUDGET)
    assert everything(other) == ["workspace", "workspace/.git", "workspace/.git/HEAD", "workspace/run"]
    assert os.access(other / "workspace/run", os.X_OK)


def test_a_workspace_that_is_too_large_is_not_packed(session: Path) -> None:
    with (session / "workspace/big").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PayloadTooLarge, match="workspace: its files take more than one archive may hold"):
        files.pack(str(session), io.BytesIO(), BUDGET)


def test_a_file_that_shrinks_while_it_is_packed_keeps_the_archive_whole() -> None:
    padded = files._Padded(io.BytesIO(b"abc"), 6)
    assert [padded.read(4), padded.read(4)] == [b"abc\0", b"\0\0"]


def test_a_session_without_files_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="No workspace"):
        files.list_files(str(tmp_path))


def test_what_a_killed_server_left_of_an_upload_is_removed(session: Path) -> None:
    staged = session.parent / files.UPLOADS / "0123"
    staged.mkdir(parents=True)
    (staged / "x").write_text("")
    files.remove_staged(str(session.parent))
    assert not staged.parent.exists()


# Against the server itself


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    """A tar header with a size of any kind, a negative one included."""
    member = tarfile.TarInfo(name)
    member.type = kind
    raw = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else (size % (1 << 95) | 1 << 95 | (size < 0) << 94).to_bytes(12, "big")
    raw[148:156] = b"        "
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


HOSTILE = {
    "a negative size": header("x", size=-512) * 3 + bytes(1024),
    "a negative size of a header": header("x", tarfile.XHDTYPE, size=-512) + bytes(1024),
    "a chain of long names": b"".join(header("x", tarfile.GNUTYPE_LONGNAME, 2) + padded(b"y\0") for _ in range(2000)) + bytes(1024),
    "a chain of global headers": b"".join(
        header("x", tarfile.XGLTYPE, 512) + padded(b"512 comment=" + b"x" * 499 + b"\n") for _ in range(3000)
    ) + bytes(1024),
    "a map of holes without an end": header("x", tarfile.XHDTYPE, 72) + padded(
        b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n27 GNU.sparse.name=sparse\n"
    ) + header("x", size=8 << 20) + b"99999999999\n" + b"0\n" * (4 << 20),
    "a size beyond all": header("x", size=1 << 90) + bytes(1024),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_an_archive_made_to_exhaust_the_server_is_refused_at_little_cost(session: Path, name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((InvalidRequest, PayloadTooLarge), match="archive: "):
            files.unpack(str(session), io.BytesIO(HOSTILE[name]), BUDGET)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert everything(session) == ["workspace"]


def test_very_many_gzip_files_in_a_row_are_refused(session: Path) -> None:
    with pytest.raises(InvalidRequest, match="gzip files in a row"):
        files.unpack(str(session), io.BytesIO(gzip.compress(b"") * 10_100), BUDGET)


def test_gzip_files_in_a_row_are_one_archive(session: Path) -> None:
    plain = archive(("a", b"x" * 2000), mode="w").getvalue()
    content = b"".join(gzip.compress(plain[at : at + 999]) for at in range(0, len(plain), 999))
    assert files.unpack(str(session), io.BytesIO(content), BUDGET) == 1


def test_folders_made_on_the_way_count_as_files(session: Path) -> None:
    with pytest.raises(PayloadTooLarge, match="more than 100 files"):
        files.unpack(str(session), archive(*((f"{n}/a/b/c/d", b"") for n in range(25))), BUDGET)


def test_what_is_in_the_session_already_counts_against_its_disk(session: Path) -> None:
    (session / "home/cache").write_bytes(b"x" * (3 << 20))
    budget = Budget(8 << 20, disk_bytes=4 << 20)
    with pytest.raises(PayloadTooLarge, match="session's disk has left"):
        files.unpack(str(session), archive(("big", random.Random(1).randbytes(2 << 20))), budget)
    assert everything(session) == ["home/cache", "workspace"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_would_replace_another_kind_of_thing_is_refused_before_anything_moves(session: Path, kind: str) -> None:
    if kind == "folder":
        (session / "workspace/x").mkdir()
    else:
        (session / "workspace/x").write_text("")
    last = ("x", b"1") if kind == "folder" else ("x/", b"")
    with pytest.raises(InvalidRequest, match="remove it first"):
        files.unpack(str(session), archive(("first", b"1"), last), BUDGET)
    assert everything(session) == ["workspace", "workspace/x"]


@pytest.mark.parametrize(("code", "error"), [(errno.EDQUOT, PayloadTooLarge), (errno.ENOSPC, CapacityReached)])
def test_a_full_disk_is_said_and_leaves_the_workspace_as_it_was(
    session: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[AshError]
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "_copy", full)
    with pytest.raises(error):
        files.unpack(str(session), archive(("x", b"1")), BUDGET)
    assert everything(session) == ["workspace"]


def test_a_listing_ends_at_its_limits_and_says_so(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(30):
        (session / f"workspace/{n}").write_text("")
    for limit, value in (("MAX_LISTED", 10), ("MAX_LOOKED", 10), ("MAX_LISTED_BYTES", 15)):
        with monkeypatch.context() as patch:
            patch.setattr(files, limit, value)
            found, is_cut = files.list_files(str(session))
            assert (0 < len(found) <= 10, is_cut) == (True, True)
    assert len(files.list_files(str(session))[0]) == 30


def test_a_time_that_has_no_name_does_not_break_the_list(session: Path) -> None:
    for name, seconds in (("future", 1 << 39), ("past", -5)):
        (session / "workspace" / name).write_text("")
        os.utime(session / "workspace" / name, (seconds, seconds))
    future, past = (timestamp(file.modified_at)[:4] for file in files.list_files(str(session))[0])
    assert "2100" < future <= "9999"  # file systems have ends of their own
    assert past == "1970"
    assert files.pack(str(session), io.BytesIO(), BUDGET) == 2


def test_files_that_an_upload_could_not_have_made_can_be_read(session: Path) -> None:
    deep = session / "workspace" / "/".join("d" * 40)
    deep.mkdir(parents=True)
    for name in ("back\\slash", "new\nline", "a..b"):
        (deep / name).write_text("found")
    paths = [file.path for file in files.list_files(str(session))[0]]
    assert len(paths) == 3
    for path in paths:
        file, state = files.open_workspace_file(str(session), path)
        with file:
            assert file.read(state.st_size) == b"found"


def test_names_that_are_no_text_are_left_out(session: Path) -> None:
    (session / "workspace" / os.fsdecode(b"\xff")).write_text("")
    assert files.list_files(str(session)) == ([], False)
    assert files.pack(str(session), io.BytesIO(), BUDGET) == 0


def test_a_workspace_with_too_many_files_or_paths_is_not_packed(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(5):
        (session / f"workspace/{n}").mkdir()
    for limit, words in (("MAX_MEMBERS", "more than 4 files and folders"), ("MAX_NAMES_BYTES", "too many folders")):
        with monkeypatch.context() as patch:
            patch.setattr(files, limit, 4)
            with pytest.raises(PayloadTooLarge, match=words):
                files.pack(str(session), io.BytesIO(), BUDGET)


def test_a_file_under_a_lease_is_an_error_and_no_wait(session: Path) -> None:
    path = session / "workspace/x"
    path.write_text("")
    with path.open("r+b") as held:
        fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        previous = signal.signal(signal.SIGIO, signal.SIG_IGN)
        try:
            with pytest.raises(Conflict, match="being changed"):
                files.open_workspace_file(str(session), "x")
        finally:
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            signal.signal(signal.SIGIO, previous)


def test_no_descriptor_is_left_open_whatever_went_wrong(session: Path) -> None:
    workspace = session / "workspace"
    (workspace / "folder").mkdir()
    os.mkfifo(workspace / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    for path in ("folder", "fifo", "missing", "folder/missing", "../x"):
        with pytest.raises(AshError):
            files.open_workspace_file(str(session), path)
    for content in (b"x" * 2000, HOSTILE["a negative size"], gzip.compress(b"x")):
        with pytest.raises(AshError):
            files.unpack(str(session), io.BytesIO(content), BUDGET)
    (workspace / "file").write_text("x")
    with pytest.raises(PayloadTooLarge):
        files.pack(str(session), io.BytesIO(), BUDGET._replace(max_bytes=0))
    assert len(os.listdir("/proc/self/fd")) == before
