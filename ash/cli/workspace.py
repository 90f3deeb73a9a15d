"""`ash session files`, `download` and `upload`: a session's files, on the terminal, in a file, and from a folder. It unpacks nothing."""

from __future__ import annotations

import argparse
import io
import os
import stat
import sys
import tarfile
from typing import TYPE_CHECKING

from ash.cli import profile
from ash.cli.command import UsageError
from ash.cli.terminal import DIM, Terminal
from ash.skipped import is_skipped

if TYPE_CHECKING:
    from ash.client import AshClient


def configure_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="id of the session")
    parser.add_argument("path", nargs="?", help="print this file instead of the list")
    parser.add_argument("--output", "-o", metavar="FILE", help="write it into this file instead; - is standard output")
    parser.add_argument("--no-hidden", action="store_true", help="leave out caches and virtual environments too")


def files(args: argparse.Namespace, terminal: Terminal) -> int:
    client = profile.client(args)
    if args.path is None:
        if args.output is not None:
            raise UsageError("--output is for one file: name it; `ash session download` gets all of them")
        return _list(client, args, terminal)
    content = client.read_session_file(args.id, args.path)
    if args.output in (None, "-") and terminal.out_is_tty:
        terminal.answer(content.decode(errors="replace"))
        terminal.end_answer()
    else:
        _write(args.output or "-", content)
    return 0


def _list(client: AshClient, args: argparse.Namespace, terminal: Terminal) -> int:
    found = client.list_session_files(args.id, hidden=not args.no_hidden)
    if terminal.is_json or not terminal.out_is_tty:
        terminal.data([file.raw for file in found])
    elif found:
        terminal.table(("PATH", "SIZE", "MODIFIED"), [(file.path, str(file.size), file.modified_at) for file in found])
    terminal.note(f"{len(found)} file{'' if len(found) == 1 else 's'}{', and more that are not shown' if found.is_cut else ''}", DIM)
    return 0


def configure_download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="id of the session")
    parser.add_argument("--output", "-o", metavar="FILE", help="where to write it (default: ID.tar.gz); - is standard output")


def download(args: argparse.Namespace, terminal: Terminal) -> int:
    path = args.output or f"{args.id}.tar.gz"
    if path == "-" and terminal.out_is_tty:
        raise UsageError("an archive is nothing for a terminal: pipe it on, or name a file with --output")
    content = profile.client(args).download_workspace(args.id)
    _write(path, content)
    if path != "-":
        terminal.note(f"Wrote {path} ({len(content)} bytes)", DIM)
    return 0


def _write(path: str, content: bytes) -> None:
    """A file that is there already stays as it was until the new content is whole."""
    if path == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    fresh = f"{path}.{os.getpid()}.part"
    try:
        with open(fresh, "xb") as file:
            file.write(content)
        os.replace(fresh, path)
    except OSError as error:
        if os.path.exists(fresh):
            os.unlink(fresh)
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def configure_upload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="id of the session")
    parser.add_argument("source", help="a tar archive, gzipped or not, or a folder; - is an archive from standard input")


def upload(args: argparse.Namespace, terminal: Terminal) -> int:
    archive = _pack(args.source, terminal) if os.path.isdir(args.source) else _read(args.source)
    count = profile.client(args).upload_workspace(args.id, archive)
    if terminal.is_json:
        terminal.data({"files": count})
    else:
        terminal.line(f"Uploaded {count} file{'' if count == 1 else 's'}")
    return 0


def _read(source: str) -> bytes:
    try:
        if source == "-":
            return sys.stdin.buffer.read()
        with open(source, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from error


def _pack(folder: str, terminal: Terminal) -> bytes:
    """The folder as an archive, without what is never uploaded, and without links, which the server would refuse."""
    target, left_out = io.BytesIO(), list[str]()
    try:
        with tarfile.open(fileobj=target, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
            for parent, folders, names in os.walk(folder):
                folders[:] = sorted(name for name in folders if not is_skipped(name, is_folder=True))
                for name in sorted([*folders, *(name for name in names if not is_skipped(name, is_folder=False))]):
                    path = os.path.join(parent, name)
                    mode = os.lstat(path).st_mode
                    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                        archive.add(path, os.path.relpath(path, folder), recursive=False, filter=_anonymous)
                    else:
                        left_out.append(path)
    except OSError as error:
        raise UsageError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    for path in left_out:
        terminal.note(f"Left out, as it is a link or no file: {path}", DIM)
    return target.getvalue()


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.type = tarfile.DIRTYPE if member.isdir() else tarfile.REGTYPE  # a second name of a file is a file as well
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
