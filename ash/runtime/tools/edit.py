"""The Write and Edit tools. They change a file only if the model has seen it as it is, and replace it in one step."""

from __future__ import annotations

import os
import stat

from ash.runtime.interrupt import Interrupt
from ash.runtime.tools.call import Json, Outcome, Tool, ToolError, Workbench, flag, schema, text
from ash.runtime.tools.read import remember

MAX_BYTES = 64 * 1024 * 1024
_CONTEXT = 4
_SNIPPET = 8_000

_WRITE_DESCRIPTION = """Writes a file, replacing it if it exists; missing folders are made.

A file that exists must have been read with Read first. Prefer Edit for changing an existing file."""
_EDIT_DESCRIPTION = """Replaces text in a file.

The file must have been read with Read first. `old_string` must match the file exactly, with its indentation and without \
Read's line numbers, and must occur once; give more lines around it to make it unique, or set `replace_all` to replace every \
occurrence. An empty `old_string` creates a new file."""


def _run_write(bench: Workbench, given: Json, interrupt: Interrupt) -> Outcome:
    path = _path(bench, given)
    is_new = not os.path.lexists(path)
    if not is_new:
        _require_seen(bench, path)
    _replace(path, _encoded("content", given["content"]))
    remember(bench, path)
    detail = {"type": "create" if is_new else "update", "filePath": path, "content": given["content"][:_SNIPPET]}
    return Outcome(f"The file {path} was {'created' if is_new else 'replaced'}.", detail)


def _run_edit(bench: Workbench, given: Json, interrupt: Interrupt) -> Outcome:
    path, old, new = _path(bench, given), given["old_string"], given["new_string"]
    if old == new:
        raise ToolError("old_string and new_string are the same; there is nothing to change.")
    if not old:
        return _create(bench, path, new)
    _require_seen(bench, path)
    _encoded("new_string", new)
    before = _load(path)
    after, count = _substitute(before, old, new, replace_all=given.get("replace_all", False), path=path)
    _replace(path, after.encode("utf-8", "surrogateescape"))
    remember(bench, path)
    detail = {"filePath": path, "oldString": old, "newString": new, "replaceAll": given.get("replace_all", False), "replacements": count}
    if count > 1:
        return Outcome(f"The file {path} was changed: {count} occurrences were replaced.", detail)
    return Outcome(f"The file {path} was changed. The lines around the change are now:\n{_snippet(before, after)}", detail)


def _create(bench: Workbench, path: str, content: str) -> Outcome:
    if os.path.lexists(path) and (not os.path.isfile(path) or os.path.getsize(path)):
        raise ToolError(f"old_string is empty, which creates a file, but {path} exists. Read it and give the text to replace.")
    _replace(path, _encoded("new_string", content))
    remember(bench, path)
    return Outcome(f"The file {path} was created.", {"type": "create", "filePath": path})


def _encoded(field: str, content: str) -> bytes:
    try:
        return content.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(content[error.start]):04x}"
        raise ToolError(f"{field}: holds {half} at {error.start}, half of a character, which no file can hold. Leave it out.") from error


def _path(bench: Workbench, given: Json) -> str:
    path = bench.paths.resolve(given["file_path"])
    if "\0" in path:
        raise ToolError("file_path: holds a NUL.")
    if os.path.isdir(path):
        raise ToolError(f"{path} is a directory.")
    return path


def _require_seen(bench: Workbench, path: str) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ToolError(f"{path} cannot be changed: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ToolError(f"{path} is not a regular file.")
    seen = bench.seen.get(os.path.realpath(path))
    if seen is None:
        raise ToolError(f"{path} has not been read yet in this session. Read it first, then change it.")
    if seen != (status.st_mtime_ns, status.st_size):
        raise ToolError(f"{path} was changed since you read it. Read it again, then change it.")


def _load(path: str) -> str:
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise ToolError(f"{path} is larger than {MAX_BYTES} bytes. Change it with a program through Bash.")
        with open(path, "rb") as file:
            return file.read().decode("utf-8", "surrogateescape")  # what is not UTF-8 must come out as it was
    except OSError as error:
        raise ToolError(f"{path} cannot be read: {error.strerror}") from error


def _substitute(before: str, old: str, new: str, *, replace_all: bool, path: str) -> tuple[str, int]:
    if old not in before and "\r\n" in before and "\r" not in old:
        # The model sees lines without their ends, so its text has LF where the file has CRLF.
        old, new = old.replace("\n", "\r\n"), new.replace("\r\n", "\n").replace("\n", "\r\n")
    count = before.count(old)
    if count == 0:
        raise ToolError(f"old_string was not found in {path}. It must match the file exactly, including spaces and line breaks.")
    if count > 1 and not replace_all:
        raise ToolError(f"old_string occurs {count} times in {path}. Give more of the lines around it, or set replace_all.")
    return before.replace(old, new), count


def _snippet(before: str, after: str) -> str:
    start = next((index for index, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    lines = [line.removesuffix("\r") for line in after.split("\n")]  # as Read counts them; \f and the like end no line
    lines = lines[:-1] if lines[-1] == "" else lines
    first = max(0, after.count("\n", 0, start) - _CONTEXT)
    last = after.count("\n", 0, start + max(0, len(after) - len(before))) + _CONTEXT + 1
    return "\n".join(f"{number:6d}\t{line}" for number, line in enumerate(lines[first:last], first + 1))[:_SNIPPET]


def _replace(path: str, data: bytes) -> None:
    """Put `data` where the file is: all of it or nothing, links followed, permissions kept."""
    target = os.path.realpath(path)
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        mode = stat.S_IMODE(os.stat(target).st_mode) if os.path.exists(target) else None
        with open(temporary, "xb") as file:
            file.write(data)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
        os.replace(temporary, target)
    except OSError as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise ToolError(f"{path} cannot be written: {error.strerror}") from error


WRITE = Tool(
    "Write",
    _WRITE_DESCRIPTION,
    schema(
        ["file_path", "content"],
        file_path=text("The file to write, as an absolute path"),
        content=text("The whole content of the file"),
    ),
    _run_write,
)
EDIT = Tool(
    "Edit",
    _EDIT_DESCRIPTION,
    schema(
        ["file_path", "old_string", "new_string"],
        file_path=text("The file to change, as an absolute path"),
        old_string=text("The text to replace"),
        new_string=text("The text to put in its place"),
        replace_all=flag("Replace every occurrence (default false)"),
    ),
    _run_edit,
)
