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
    """What is wrong with a path, as the end of a sentence."""
    if any("\ud800" <= character <= "\udfff" for character in path):
        return "is not valid Unicode; rename the file"
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or path.endswith("/"):
        return "names no file"
    if path.startswith("/"):
        return "is absolute; make it relative to the folder"
    if ".." in parts:
        return "contains ..; make it relative to the folder"
    if any(character in "\\\x7f" or character < " " for character in path):
        return "contains a control character or a backslash; rename the file and use / between folders"
    if len(parts) > MAX_DEPTH:
        return f"is deeper than {MAX_DEPTH} folders"
    if len(path.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return f"is longer than {MAX_PATH_BYTES} bytes, or a name in it than {MAX_NAME_BYTES}"
    return None


class Names:
    """The paths of one upload, which refuses duplicates, names that differ only by case, and a file where a folder is."""

    def __init__(self, where: str = "files") -> None:
        self._where = where
        self._seen: dict[str, tuple[str, bool]] = {}

    def add(self, path: str) -> None:
        parts = path.split("/")
        for length in range(1, len(parts)):
            self._claim("/".join(parts[:length]), is_file=False)
        self._claim(path, is_file=True)

    def add_folder(self, path: str) -> None:
        parts = path.split("/")
        for length in range(1, len(parts) + 1):
            self._claim("/".join(parts[:length]), is_file=False)

    def _claim(self, path: str, *, is_file: bool) -> None:
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded not in self._seen:
            self._seen[folded] = (path, is_file)
            return
        other, other_is_file = self._seen[folded]
        if other != path:
            raise InvalidRequest(f"{self._where}: {path!r:.200} and {other!r:.200} differ only by case; rename one")
        if other_is_file != is_file:
            raise InvalidRequest(f"{self._where}: {path!r:.200} is both a file and a folder; rename one")
        if is_file:
            raise InvalidRequest(f"{self._where}: {path!r:.200} is there twice; send it once")
