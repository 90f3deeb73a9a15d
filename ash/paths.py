"""Paths that callers give for files of an upload: cleaned, or refused with what is wrong with them. It looks at no disk."""

from __future__ import annotations

import unicodedata

from ash.errors import InvalidRequest

MAX_DEPTH = 32
MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255


def clean_path(path: str, where: str = "files") -> str:
    """The path without empty and `.` parts. Raises InvalidRequest for one that leads outside or that a file cannot have."""
    problem = find_problem(path)
    if problem:
        raise InvalidRequest(f"{where}: the path {path!r:.200} {problem}")
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def find_problem(path: str) -> str | None:
    """What is wrong with a path for a file that is to be made, as the end of a sentence."""
    if problem := find_way_out(path):
        return problem
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if any(character in "\\\x7f" or character < " " for character in path):
        return "contains a control character or a backslash; rename the file and use / between folders"
    if len(parts) > MAX_DEPTH:
        return f"is deeper than {MAX_DEPTH} folders"
    if len(path.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return f"is longer than {MAX_PATH_BYTES} bytes, or a name in it than {MAX_NAME_BYTES}"
    return None


def find_way_out(path: str) -> str | None:
    """Why a path cannot be that of any file below a folder, whoever made it; as the end of a sentence."""
    if any("\ud800" <= character <= "\udfff" for character in path):
        return "is not valid Unicode; rename the file"
    parts = path.split("/")
    if path.endswith("/") or not any(part not in ("", ".") for part in parts):
        return "names no file"
    if path.startswith("/"):
        return "is absolute; make it relative to the folder"
    if ".." in parts:
        return "contains ..; make it relative to the folder"
    return "contains a control character, NUL" if "\0" in path else None


_Folder = dict[str, "tuple[str, _Folder | None]"]


class Names:
    """The paths of one upload, which refuses duplicates, names that differ only by case, and a file where a folder is.

    `count` is how many files and folders they are. Each name is kept once, however many paths lead through it.
    """

    def __init__(self, where: str = "files") -> None:
        self._where, self.count = where, 0
        self._top: _Folder = {}

    def add(self, path: str) -> None:
        self._claim(path.split("/"), is_file=True)

    def add_folder(self, path: str) -> None:
        self._claim(path.split("/"), is_file=False)

    def _claim(self, parts: list[str], *, is_file: bool) -> None:
        folder = self._top
        for position, name in enumerate(parts, 1):
            wants_file, key = is_file and position == len(parts), unicodedata.normalize("NFC", name).casefold()
            is_new = key not in folder
            if is_new:
                self.count += 1
                folder[key] = (name, None if wants_file else {})
            other, inner = folder[key]
            if other != name:
                raise self._refuse(
                    parts[:position], f"and {'/'.join((*parts[: position - 1], other))!r:.200} differ only by case; rename one"
                )
            if (inner is None) != wants_file:
                raise self._refuse(parts[:position], "is both a file and a folder; rename one")
            if wants_file and not is_new:
                raise self._refuse(parts, "is there twice; send it once")
            folder = inner if inner is not None else folder

    def _refuse(self, parts: list[str], problem: str) -> InvalidRequest:
        return InvalidRequest(f"{self._where}: {'/'.join(parts)!r:.200} {problem}")
