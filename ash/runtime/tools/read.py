"""The Read tool: text with line numbers, images and PDF files as blocks. Reads a huge file only as far as it shows it."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from ash.runtime.interrupt import Interrupt
from ash.runtime.tools.call import Json, Outcome, Tool, ToolError, Workbench, number, schema, text

DEFAULT_LINES = 2000
MAX_LINE = 2000
MAX_CHARACTERS = 200_000
MAX_IMAGE_BYTES = 3_750_000
MAX_PDF_BYTES = 20_000_000
_IMAGES = ((b"\x89PNG\r\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"), (b"RIFF", "image/webp"))

_DESCRIPTION = f"""Reads a file.

`file_path` should be absolute; a relative one starts at the workspace. Text comes with line numbers as `cat -n` shows \
them: up to {DEFAULT_LINES} lines from the start unless `offset` and `limit` say otherwise; lines are cut at {MAX_LINE} characters. \
Images (PNG, JPEG, GIF, WebP) are shown to you, PDF files come as documents; `pages` ("3" or "1-5") gives the text of some pages of a PDF. \
Directories cannot be read: use Glob, or `ls` through Bash."""


def _run(bench: Workbench, given: Json, interrupt: Interrupt) -> Outcome:
    path = bench.paths.resolve(given["file_path"])
    try:
        with _open(path) as file:
            return _read(bench, path, file, given, interrupt)
    except OSError as error:
        raise ToolError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise ToolError(f"file_path: {error}") from error


def _open(path: str) -> BinaryIO:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ToolError(f"{path} is a directory. Use Glob or `ls` to see what is in it.")
    if not stat.S_ISREG(status.st_mode):
        raise ToolError(f"{path} is not a regular file, so reading it could wait for ever.")
    return open(path, "rb")


def _read(bench: Workbench, path: str, file: BinaryIO, given: Json, interrupt: Interrupt) -> Outcome:
    start = file.read(8192)
    file.seek(0)
    media_type = next((kind for magic, kind in _IMAGES if start.startswith(magic)), None)
    if media_type == "image/webp" and start[8:12] != b"WEBP":
        media_type = None
    if media_type is not None:
        return _image(path, file, media_type)
    if start.startswith(b"%PDF-"):
        return _pdf_pages(bench, path, given["pages"], interrupt) if "pages" in given else _pdf(path, file)
    if b"\0" in start:
        size = os.fstat(file.fileno()).st_size
        raise ToolError(f"{path} is a binary file of {size} bytes. Use Bash with a program that understands it, such as `file` or `xxd`.")
    outcome = _text(path, file, int(given.get("offset", 1)), int(given.get("limit", DEFAULT_LINES)), interrupt)
    remember(bench, path)
    return outcome


def remember(bench: Workbench, path: str) -> None:
    """Note that the model has seen the file as it is now."""
    status = os.stat(path)
    bench.seen[os.path.realpath(path)] = (status.st_mtime_ns, status.st_size)


def _text(path: str, file: BinaryIO, offset: int, limit: int, interrupt: Interrupt) -> Outcome:
    first = max(1, offset)
    lines: list[str] = []
    shown, number_, more = 0, 0, False
    while (line := _line(file)) is not None:
        number_ += 1
        if number_ % 10_000 == 0:
            interrupt.check()
        if number_ < first:
            continue
        if len(lines) >= limit or shown > MAX_CHARACTERS:
            more = True
            break
        lines.append(f"{number_:6d}\t{line}")
        shown += len(line)
    detail = {"type": "text", "file": {"filePath": path, "numLines": len(lines), "startLine": first}}
    if not lines:
        empty = "The file exists but is empty." if number_ == 0 else f"The file has only {number_} lines, and offset is {first}."
        return Outcome(f"[{empty}]", detail)
    note = f"\n[More lines follow. Continue with offset={first + len(lines)}.]" if more else ""
    return Outcome("\n".join(lines) + note, detail)


def _line(file: BinaryIO) -> str | None:
    """The next line without its end, cut at MAX_LINE characters; None at the end of the file."""
    raw = file.readline(4 * MAX_LINE + 2)
    if not raw:
        return None
    rest = raw
    while rest and not rest.endswith(b"\n"):
        rest = file.readline(65536)
    text_ = raw.decode("utf-8", "replace").rstrip("\r\n")
    return text_ if len(text_) <= MAX_LINE else text_[:MAX_LINE] + " [line cut]"


def _image(path: str, file: BinaryIO, media_type: str) -> Outcome:
    data = file.read(MAX_IMAGE_BYTES + 1)
    if len(data) > MAX_IMAGE_BYTES:
        raise ToolError(f"{path} is an image of more than {MAX_IMAGE_BYTES} bytes. Make it smaller first.")
    source = {"type": "base64", "media_type": media_type, "data": _base64(data)}
    detail = {"type": "image", "file": {"filePath": path, "type": media_type, "originalSize": len(data)}}
    return Outcome([{"type": "image", "source": source}], detail)


def _pdf(path: str, file: BinaryIO) -> Outcome:
    data = file.read(MAX_PDF_BYTES + 1)
    if len(data) > MAX_PDF_BYTES:
        raise ToolError(f"{path} is a PDF file of more than {MAX_PDF_BYTES} bytes. Read some of its pages with `pages`.")
    source = {"type": "base64", "media_type": "application/pdf", "data": _base64(data)}
    return Outcome([{"type": "document", "source": source}], {"type": "pdf", "file": {"filePath": path, "originalSize": len(data)}})


def _base64(data: bytes) -> str:
    from binascii import b2a_base64

    return b2a_base64(data, newline=False).decode("ascii")


def _pdf_pages(bench: Workbench, path: str, pages: str, interrupt: Interrupt) -> Outcome:
    from ash.runtime.tools.bash import cut_middle
    from ash.runtime.tools.search import find_program, run_program

    first, _, last = pages.replace(" ", "").partition("-")
    if not first.isdigit() or not (last or first).isdigit():
        raise ToolError(f"pages: {pages!r} is not a page or a range such as '1-5'.")
    program = find_program("pdftotext", bench.env)
    if program is None:
        raise ToolError("pages: pdftotext (poppler-utils) is not installed here. Read the whole PDF without `pages`.")
    argv = [program, "-layout", "-f", first, "-l", last or first, path, "-"]
    result = run_program(argv, bench, interrupt)
    if result.code:
        raise ToolError(f"{path}: pdftotext failed: {result.errors.strip()}")
    return Outcome(cut_middle(result.text), {"type": "pdf_pages", "file": {"filePath": path, "pages": pages}})


READ = Tool(
    "Read",
    _DESCRIPTION,
    schema(
        ["file_path"],
        file_path=text("The file to read, as an absolute path"),
        offset=number("The first line to read, counted from 1", minimum=0),
        limit=number(f"How many lines to read (default {DEFAULT_LINES})", minimum=1),
        pages=text('Only for PDF files: a page or a range of pages, such as "3" or "1-5"'),
    ),
    _run,
    is_read_only=True,
)
