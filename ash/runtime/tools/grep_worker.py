"""Grep where there is no ripgrep: a program that takes the call as JSON on its input and prints lines as ripgrep does.

Runs in a process of its own, started and limited by `search`; never imported by the bridge.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ash.runtime.patterns import Glob

_PRUNED = (".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv")
_MAX_FILE_BYTES = 32 * 1024 * 1024
_MAX_LINE = 2000
_TYPES = {
    "py": "py pyi", "python": "py pyi", "js": "js jsx mjs cjs", "ts": "ts tsx mts cts", "rust": "rs", "go": "go", "java": "java",
    "c": "c h", "cpp": "cpp cc cxx hpp hh h", "cs": "cs", "ruby": "rb", "php": "php", "swift": "swift", "kotlin": "kt kts",
    "sh": "sh bash zsh", "md": "md markdown", "markdown": "md markdown", "json": "json jsonl", "yaml": "yaml yml",
    "toml": "toml", "html": "html htm", "css": "css scss", "sql": "sql", "xml": "xml", "txt": "txt",
}  # fmt: skip


def main() -> None:
    call = json.load(sys.stdin)
    try:
        pattern = compile_pattern(call)
        wanted = _filter(call)
    except (re.error, ValueError) as error:
        sys.stderr.write(str(error))
        sys.exit(2)
    out = sys.stdout
    out.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    files = [path for path in _files(call["path"]) if wanted(path)]
    if call["output_mode"] == "files_with_matches":
        files.sort(key=_modified, reverse=True)
    has_context = call["output_mode"] == "content" and any(call.get(name) for name in ("-A", "-B", "-C"))
    is_first = True
    for path in files:
        lines = list(search_file(path, pattern, call))
        if lines and has_context and not is_first:
            lines.insert(0, "--")
        is_first = is_first and not lines
        out.writelines(line + "\n" for line in lines)


def compile_pattern(call: dict[str, Any]) -> re.Pattern[str]:
    flags = re.MULTILINE | (re.IGNORECASE if call.get("-i") else 0) | (re.DOTALL if call.get("multiline") else 0)
    return re.compile(call["pattern"], flags)


def _filter(call: dict[str, Any]) -> Any:
    names: list[Callable[[str], bool]] = []
    if "glob" in call:
        glob = call["glob"].removeprefix("./")
        names.append(Glob(glob if "/" in glob else "**/" + glob).matches)
    if "type" in call:
        if call["type"] not in _TYPES:
            raise ValueError(f"unknown type {call['type']!r}; use glob, or one of {', '.join(_TYPES)}")
        endings = tuple(f".{ending}" for ending in _TYPES[call["type"]].split())
        names.append(lambda path: path.endswith(endings))
    return lambda path: all(matches(os.path.relpath(path, call["path"]) if os.path.isdir(call["path"]) else path) for matches in names)


def _files(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in _PRUNED)
        for name in sorted(names):
            full = os.path.join(folder, name)
            if os.path.isfile(full) and not os.path.islink(full):
                yield full


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def search_file(path: str, pattern: re.Pattern[str], call: dict[str, Any]) -> Iterator[str]:
    """The lines ripgrep prints for one file: its name, and a NUL before what the mode adds to it."""
    content = _load(path)
    if content is None:
        return
    lines = content.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    hits = _hits(content, lines, pattern, spans_lines=bool(call.get("multiline")))
    if not hits:
        return
    if call["output_mode"] == "files_with_matches":
        yield path
    elif call["output_mode"] == "count":
        yield f"{path}\0{len(hits)}"
    else:
        yield from _with_context(path, lines, hits, call)


def _load(path: str) -> str | None:
    try:
        if os.path.getsize(path) > _MAX_FILE_BYTES:
            return None
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return None
    return None if b"\0" in data[:8192] else data.decode("utf-8", "replace").replace("\r\n", "\n")


def _hits(content: str, lines: list[str], pattern: re.Pattern[str], *, spans_lines: bool) -> list[int]:
    if not spans_lines:
        return [index for index, line in enumerate(lines) if pattern.search(line)]
    found: dict[int, None] = {}
    for match in pattern.finditer(content):
        first = content.count("\n", 0, match.start())
        found.update(dict.fromkeys(range(first, min(len(lines), first + match[0].count("\n") + 1))))
    return list(found)


def _with_context(path: str, lines: list[str], hits: list[int], call: dict[str, Any]) -> Iterator[str]:
    before = int(call.get("-B", call.get("-C", 0)))
    after = int(call.get("-A", call.get("-C", 0)))
    matching, previous = set(hits), -1
    for index in sorted({near for hit in hits for near in range(max(0, hit - before), min(len(lines), hit + after + 1))}):
        if previous >= 0 and index > previous + 1 and (before or after):
            yield "--"
        previous = index
        separator = ":" if index in matching else "-"
        shown_number = f"{index + 1}{separator}" if call.get("-n", True) else ""
        yield f"{path}\0{shown_number}{lines[index][:_MAX_LINE]}"
