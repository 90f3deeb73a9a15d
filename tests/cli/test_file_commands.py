"""`ash session files`, `download` and `upload`: what is printed, what is written, and what is sent."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.cli.conftest import Ash
from tests.cli.stub_server import StubServer


@pytest.fixture
def id(stub: StubServer) -> str:
    stub.files = {"src/main.py": b"print(1)", "data.bin": b"\xff\x00\n"}
    return str(stub.session("my-agent")["id"])


def test_files_are_listed_as_json_when_piped(ash: Ash, id: str) -> None:
    done = ash("session", "files", id)
    assert [file["path"] for file in json.loads(done.out)] == ["src/main.py", "data.bin"]
    assert done.err == "2 files\n"
    assert "and more that are not shown" in ash("session", "files", id, "--no-hidden").err


def test_a_file_is_printed_or_written(ash: Ash, id: str, tmp_path: Path) -> None:
    assert ash("session", "files", id, "src/main.py") == (0, "print(1)", "")
    target = tmp_path / "out"
    target.write_text("old")
    assert ash("session", "files", id, "data.bin", "--output", str(target)).code == 0
    assert target.read_bytes() == b"\xff\x00\n"
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["files", "{id}", "missing"], 1, "File not found: missing"),
        (["files", "{id}", "src/main.py", "-o", "/no/such/folder/x"], 2, "cannot be written"),
        (["files", "{id}", "-o", "x"], 2, "--output is for one file"),
        (["upload", "{id}", "/no/such/file"], 2, "cannot be read"),
    ],
)
def test_what_does_not_work_is_said(ash: Ash, id: str, words: list[str], code: int, complaint: str) -> None:
    done = ash("session", *(word.replace("{id}", id) for word in words))
    assert done.code == code
    assert complaint in done.err


def test_the_workspace_is_downloaded_into_a_file(
    ash: Ash, stub: StubServer, id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.archive = b"an archive"
    monkeypatch.chdir(tmp_path)
    assert ash("session", "download", id).err == f"Wrote {id}.tar.gz (10 bytes)\n"
    assert (tmp_path / f"{id}.tar.gz").read_bytes() == b"an archive"
    assert ash("session", "download", id, "-o", "-").out == "an archive"


def test_a_folder_is_uploaded_without_links_and_without_what_is_never_sent(ash: Ash, stub: StubServer, id: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "src").mkdir(parents=True)
    (folder / "src/a").write_text("1")
    (folder / "src/b").hardlink_to(folder / "src/a")
    (folder / "node_modules").mkdir()
    (folder / ".env").write_text("SECRET=1")
    (folder / "link").symlink_to("src/a")
    done = ash("session", "upload", id, str(folder))
    assert done.out == "Uploaded 2 files\n"
    assert "link" in done.err
    with tarfile.open(fileobj=io.BytesIO(stub.archive)) as archive:
        members = archive.getmembers()
        assert [(member.name, member.isreg()) for member in members] == [("src", False), ("src/a", True), ("src/b", True)]
        assert all((member.uid, member.uname) == (0, "") for member in members)


def test_an_archive_is_uploaded_as_it_is(ash: Ash, stub: StubServer, id: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"an archive")
    assert json.loads(ash("session", "upload", id, str(tmp_path / "x.tar"), "--json").out) == {"files": 2}
    assert stub.archive == b"an archive"
    ash("session", "upload", id, "-", stdin="another")
    assert stub.archive == b"another"
