"""The folders of a sandbox: what is filled in, what is refused, who owns it, and that no link is followed."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ash.errors import CapacityReached, InvalidRequest, SandboxFailed
from ash.isolation import folders
from ash.isolation.folders import UIDS, Folders, Uids

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives files to other users")


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Folders]:
    found = Folders(str(tmp_path / "data"))
    found.open()
    yield found
    found.close()


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    folder = tmp_path / "agents" / "digest-1"
    (folder / "bin").mkdir(parents=True)
    (folder / "CLAUDE.md").write_text("be kind")
    (folder / "bin" / "run").write_text("#!/bin/sh\n")
    (folder / "bin" / "run").chmod(0o755)
    (folder / "CLAUDE.md").chmod(0o644)
    return folder


def make_session(places: Folders, agent: Path, uid: int | None = None, *, fresh: bool = True, link: bool = True) -> Path:
    session = Path(places.sessions, "one")
    places.make_session_dir(str(session), uid)
    folders.fill(str(session), str(agent), uid, fresh=fresh, link=link)
    return session


def test_a_fresh_session_gets_the_agent_and_a_writable_copy_of_it(places: Folders, agent: Path) -> None:
    session = make_session(places, agent)
    assert (session / "agent" / "CLAUDE.md").read_text() == (session / "workspace" / "CLAUDE.md").read_text() == "be kind"
    assert os.access(session / "workspace" / "bin" / "run", os.X_OK)
    assert (session / "workspace" / "CLAUDE.md").stat().st_mode & 0o200


def test_the_agents_files_are_shared_but_the_workspaces_are_its_own(places: Folders, agent: Path) -> None:
    session = make_session(places, agent)
    origin = (agent / "CLAUDE.md").stat().st_ino
    assert (session / "agent" / "CLAUDE.md").stat().st_ino == origin
    assert (session / "workspace" / "CLAUDE.md").stat().st_ino != origin


def test_without_isolation_nothing_is_shared(places: Folders, agent: Path) -> None:
    session = make_session(places, agent, link=False)
    assert (session / "agent" / "CLAUDE.md").stat().st_ino != (agent / "CLAUDE.md").stat().st_ino


def test_a_session_that_wakes_keeps_its_workspace(places: Folders, agent: Path) -> None:
    session = make_session(places, agent)
    (session / "workspace" / "CLAUDE.md").write_text("mine now")
    make_session(places, agent, fresh=False)
    assert (session / "workspace" / "CLAUDE.md").read_text() == "mine now"


def test_another_version_replaces_the_agent_folder_in_place(places: Folders, agent: Path, tmp_path: Path) -> None:
    session = make_session(places, agent)
    inode = (session / "agent").stat().st_ino
    other = tmp_path / "agents" / "digest-2"
    other.mkdir()
    (other / "AGENT.md").write_text("new")
    folders.fill(str(session), str(other), None, fresh=False, link=True)
    assert [entry.name for entry in (session / "agent").iterdir()] == ["AGENT.md"]
    assert (session / "agent").stat().st_ino == inode


def test_an_agent_folder_that_was_half_filled_is_filled_again(places: Folders, agent: Path) -> None:
    session = make_session(places, agent)
    (session / folders.DIGEST_FILE).unlink()
    (session / "agent" / "CLAUDE.md").unlink()
    make_session(places, agent, fresh=False)
    assert (session / "agent" / "CLAUDE.md").exists()


def test_a_missing_agent_folder_is_an_error_in_words(places: Folders, tmp_path: Path) -> None:
    with pytest.raises(SandboxFailed, match="agent's files could not be put"):
        make_session(places, tmp_path / "nowhere")


def test_links_are_copied_as_links_and_specials_left_out(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "link").symlink_to("/etc/passwd")
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
        folders.copy_tree(str(source), str(target), None, writable=True)
    assert [entry.name for entry in target.iterdir()] == ["link"]
    assert os.readlink(target / "link") == "/etc/passwd"


def test_a_source_that_is_itself_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError, match="Not a directory"):
        folders.copy_tree(str(tmp_path / "link"), str(tmp_path / "target"), None, writable=True)


def test_setuid_bits_do_not_survive_a_copy(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "program").write_text("x")
    (source / "program").chmod(0o4755)
    folders.copy_tree(str(source), str(target), None, writable=True)
    assert not (target / "program").stat().st_mode & (stat.S_ISUID | stat.S_ISGID)


def test_a_fork_has_files_of_its_own(places: Folders, agent: Path) -> None:
    session, fork = make_session(places, agent), Path(places.sessions, "two")
    (session / "home" / "note").write_text("kept")
    folders.copy_session(str(session), str(fork), None)
    (session / "workspace" / "CLAUDE.md").write_text("changed later")
    assert (fork / "workspace" / "CLAUDE.md").read_text() == "be kind"
    assert (fork / "home" / "note").read_text() == "kept"


def test_a_fork_never_writes_into_a_folder_that_exists(places: Folders, agent: Path) -> None:
    session = make_session(places, agent)
    with pytest.raises(SandboxFailed, match="exists already"):
        folders.copy_session(str(session), str(session), None)


def test_a_slot_cannot_replace_a_sessions_files(places: Folders, agent: Path) -> None:
    session = make_session(places, agent)
    slot = Path(places.slots, "slot")
    places.make_session_dir(str(slot), None)
    with pytest.raises(SandboxFailed, match="could not be made"):
        places.claim_slot(str(slot), str(session))


def test_a_long_data_folder_still_gives_a_socket_path_that_works(tmp_path: Path) -> None:
    places = Folders(str(tmp_path / ("x" * 120)))
    places.open()
    places.make_run_dir("one", None)
    path = places.socket_path("one", "bridge.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
    places.close()
    assert Path(places.run, "one", "bridge.sock").is_socket()


@needs_root
def test_each_folder_is_open_to_its_own_uid_and_nobody_else(places: Folders, agent: Path) -> None:
    uid = UIDS[0]
    session = make_session(places, agent, uid)
    places.make_run_dir("one", uid)
    for name in ("workspace", "home"):
        state = (session / name).stat()
        assert (state.st_uid, stat.S_IMODE(state.st_mode)) == (uid, 0o700)
    for folder in (session, session / "agent", Path(places.run_dir("one")), Path(places.run_dir("one"), "gw")):
        state = folder.stat()
        assert (state.st_uid, state.st_gid) == (0, uid)
        assert not state.st_mode & 0o027


@needs_root
def test_what_a_fresh_workspace_holds_belongs_to_its_uid_and_the_agent_does_not(places: Folders, agent: Path) -> None:
    session = make_session(places, agent, UIDS[0])
    assert {path.lstat().st_uid for path in (session / "workspace").rglob("*")} == {UIDS[0]}
    assert {path.lstat().st_uid for path in (session / "agent").rglob("*")} == {0}


@needs_root
def test_a_private_agent_file_is_copied_so_that_its_sandbox_can_read_it(places: Folders, agent: Path) -> None:
    (agent / "CLAUDE.md").chmod(0o600)
    copied = make_session(places, agent, UIDS[0]) / "agent" / "CLAUDE.md"
    assert (copied.stat().st_gid, stat.S_IMODE(copied.stat().st_mode)) == (UIDS[0], 0o440)


@needs_root
def test_a_folder_of_another_kind_of_server_is_taken_over(places: Folders, agent: Path) -> None:
    session = make_session(places, agent)
    (session / "workspace" / "link").symlink_to("/etc/passwd")
    before = os.stat("/etc/passwd").st_uid
    folders.adopt(str(session), UIDS[3])
    assert {path.lstat().st_uid for path in (session / "workspace").rglob("*")} == {UIDS[3]}
    assert os.stat("/etc/passwd").st_uid == before
    assert folders.find_owner(str(session)) == UIDS[3]


def test_a_uid_is_given_once_however_many_threads_ask() -> None:
    uids, before = Uids("/data"), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(uids.take, map(str, range(3000))))
    finally:
        sys.setswitchinterval(before)
    assert len(set(found)) == 3000


@needs_root
def test_uids_of_sessions_on_disk_are_not_given_again(places: Folders, agent: Path) -> None:
    first = Uids(places.data).take("one")
    make_session(places, agent, first)
    uids = Uids(places.data)
    uids.scan(places.sessions)
    assert uids.take("two") != first


def test_when_every_uid_was_used_those_without_a_sandbox_are_given_again() -> None:
    uids = Uids("/data")
    for number, uid in enumerate(UIDS):
        assert uids.take(str(number), uid) == uid
    with pytest.raises(CapacityReached, match="capacity reached"):
        uids.take("one more")
    uids.let_go("7")
    assert uids.take("one more") == UIDS[7]


def test_a_folder_keeps_its_uid_unless_another_sandbox_runs_with_it() -> None:
    uids = Uids("/data")
    assert uids.take("one", UIDS[3]) == UIDS[3]
    assert uids.take("two", UIDS[3]) != UIDS[3]
    uids.let_go("one")
    assert uids.take("three", UIDS[3]) == UIDS[3]


# Trees that somebody hostile made


def nest(folder: Path, levels: int) -> None:
    """Folders in folders, deeper than a path can say."""
    current = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=current)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=current))
        inner = os.open("d", os.O_RDONLY, dir_fd=current)
        os.close(current)
        current = inner
    os.close(current)


def test_a_very_deep_tree_is_not_copied_and_leaves_nothing(places: Folders, agent: Path) -> None:
    session, fork = make_session(places, agent), Path(places.sessions, "two")
    nest(session / "workspace", 1500)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InvalidRequest, match="deeper than 200 levels"):
        folders.copy_session(str(session), str(fork), None)
    assert not fork.exists()
    folders.remove_tree(str(session))
    assert not session.exists()
    assert len(os.listdir("/proc/self/fd")) == before


@needs_root
def test_a_very_deep_tree_can_be_taken_over(places: Folders, agent: Path) -> None:
    session = make_session(places, agent)
    nest(session / "home", 1500)
    folders.adopt(str(session), UIDS[3])
    assert (session / "home" / "d" / "d" / "file").stat().st_uid == UIDS[3]
    assert (session / "agent").stat().st_gid == UIDS[3]
    folders.remove_tree(str(session))
    assert not session.exists()


def test_a_tree_of_ordinary_depth_is_copied_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    nest(source, 150)
    folders.copy_tree(str(source), str(target), None, writable=True)
    assert sorted(path.relative_to(target) for path in target.rglob("*")) == sorted(path.relative_to(source) for path in source.rglob("*"))


def test_holes_of_a_sparse_file_stay_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    with open(source / "sparse", "wb") as file:
        file.seek(500_000_000)
        file.write(b"data")
        file.truncate(1_000_000_000)
    folders.copy_tree(str(source), str(target), None, writable=True)
    state = (target / "sparse").stat()
    assert state.st_size == 1_000_000_000
    assert state.st_blocks * 512 < 1_000_000
    with open(target / "sparse", "rb") as file:
        assert os.pread(file.fileno(), 8, 500_000_000) == b"data\0\0\0\0"


def test_more_than_a_copy_may_take_is_refused_and_leaves_nothing(places: Folders, agent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, fork = make_session(places, agent), Path(places.sessions, "two")
    (session / "workspace" / "big").write_bytes(b"x" * 3000)
    os.link(session / "workspace" / "big", session / "workspace" / "again")
    monkeypatch.setattr(folders, "MAX_COPY_BYTES", 5000)
    with pytest.raises(InvalidRequest, match="they take more than"):
        folders.copy_session(str(session), str(fork), None)
    assert not fork.exists()


def test_a_folder_that_was_closed_to_its_owner_is_removed(tmp_path: Path) -> None:
    doomed = tmp_path / "doomed"
    (doomed / "closed" / "inner").mkdir(parents=True)
    (doomed / "closed" / "file").touch()
    if os.geteuid() == 0:
        tmp_path.chmod(0o777)
        for path in (doomed, *doomed.rglob("*")):
            os.chown(path, UIDS[0], UIDS[0])
    for name, mode in (("closed/inner", 0o000), ("closed", 0o000), (".", 0o500)):
        (doomed / name).chmod(mode)
    before = os.geteuid()
    parent = os.open(tmp_path, os.O_RDONLY)
    try:
        os.fchdir(parent)
        if before == 0:
            os.seteuid(UIDS[0])
        folders.remove_tree("doomed")
    finally:
        os.seteuid(before)
        os.chdir(Path(__file__).parents[2])
        os.close(parent)
    assert not doomed.exists()


def test_what_a_link_points_to_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "kept" / "inner").mkdir(parents=True)
    (tmp_path / "doomed").mkdir()
    (tmp_path / "doomed" / "link").symlink_to(tmp_path / "kept")
    folders.remove_tree(str(tmp_path / "doomed"))
    assert (tmp_path / "kept" / "inner").exists()
    assert not (tmp_path / "doomed").exists()
