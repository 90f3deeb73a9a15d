"""The Glob and Grep tools. Grep runs in a process of its own: ripgrep where there is one, else `grep_worker`.

A process of its own, because a hostile regular expression can keep Python's `re` busy for ever, with the interpreter locked.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from ash.runtime.interrupt import Interrupt
from ash.runtime.paths import Paths
from ash.runtime.patterns import Glob
from ash.runtime.process import Output, Process, Room, run
from ash.runtime.shell import decode
from ash.runtime.tools.call import Json, Outcome, Tool, ToolError, Workbench, flag, number, schema, text

MAX_FILES = 100
DEFAULT_HEAD = 250
MAX_CHARACTERS = 30_000
GREP_TIMEOUT = 60.0
_PROGRAM_OUTPUT = 8 * 1024 * 1024
_PRUNED = (".git", ".hg", ".svn")

_GLOB_DESCRIPTION = f"""Finds files by their name, newest first, at most {MAX_FILES}.

`pattern` is a glob such as `**/*.py` or `src/**/*.{{ts,tsx}}`; `path` is the folder to search (default: the workspace)."""
_GREP_DESCRIPTION = f"""Searches the content of files with a regular expression.

`output_mode` files_with_matches (default) lists files, content shows the matching lines (with -A, -B, -C lines around them \
and -n line numbers), count counts them. `glob` (`*.js`) or `type` (`py`) limit the files. With `multiline` a match may span \
lines. At most `head_limit` lines or files are shown (default {DEFAULT_HEAD}, 0 for all), after skipping `offset` of them."""


# Glob


def _run_glob(bench: Workbench, given: Json, interrupt: Interrupt) -> Outcome:
    base, pattern = _split_pattern(bench.paths, given)
    if not os.path.isdir(base):
        raise ToolError(f"path: no such folder: {base}")
    try:
        matches = Glob(pattern).matches
    except (re.error, ValueError) as error:
        raise ToolError(f"pattern: {error}") from error
    found = []
    for path, modified in _walk(base, pattern, interrupt):
        interrupt.check()
        if matches(os.path.relpath(path, base)) and bench.can_read(path):
            found.append((-modified, path))
    names = [path for _, path in sorted(found)][:MAX_FILES]
    detail = {"filenames": names, "numFiles": len(names), "truncated": len(found) > len(names)}
    if not names:
        return Outcome("No files found", detail)
    note = f"\n[{len(found) - len(names)} more files match; use a narrower pattern or path.]" if len(found) > len(names) else ""
    return Outcome("\n".join(names) + note, detail)


def _split_pattern(paths: Paths, given: Json) -> tuple[str, str]:
    """The folder to search and the pattern below it; an absolute pattern brings its own folder."""
    pattern = given["pattern"].removeprefix("./")
    if not pattern.startswith("/"):
        return paths.resolve(given.get("path") or "."), pattern
    parts = pattern.split("/")
    fixed = next((index for index, part in enumerate(parts) if re.search(r"[*?\[{]", part)), len(parts) - 1)
    return "/".join(parts[:fixed]) or "/", "/".join(parts[fixed:])


def _walk(base: str, pattern: str, interrupt: Interrupt) -> Iterator[tuple[str, float]]:
    pruned = tuple(name for name in _PRUNED if name not in pattern)
    folders = [base]
    while folders:
        interrupt.check()
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name not in pruned:
                            folders.append(entry.path)
                    else:
                        yield entry.path, _modified(entry)
        except OSError:
            continue  # a folder that may not be read, or is gone by now


def _modified(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except OSError:
        return 0.0


GLOB = Tool(
    "Glob",
    _GLOB_DESCRIPTION,
    schema(
        ["pattern"],
        pattern=text("The glob pattern of the files' names"),
        path=text("The folder to search; leave out for the workspace"),
    ),
    _run_glob,
    is_read_only=True,
)


# Programs in the background of a tool


class ProgramResult(NamedTuple):
    code: int
    text: str
    errors: str
    timed_out: bool
    is_cut: bool


def find_program(name: str, env: dict[str, str]) -> str | None:
    """Where a program is on the PATH that the tools have."""
    candidates = [os.path.join(folder, name) for folder in env.get("PATH", "").split(":") if folder]
    return next((path for path in candidates if os.access(path, os.X_OK) and os.path.isfile(path)), None)


def run_program(argv: list[str], bench: Workbench, interrupt: Interrupt, stdin: bytes = b"") -> ProgramResult:
    """Run a program with the tools' environment for GREP_TIMEOUT at most. Raises Interrupted."""
    output, errors = Output(Room(_PROGRAM_OUTPUT)), Output(Room(65536))
    try:
        ended = run(Process(argv, bench.env, output, errors, stdin=stdin), min(GREP_TIMEOUT, bench.tool_timeout), interrupt)
    except OSError as error:
        raise ToolError(f"{argv[0]} could not be started: {error}") from error
    interrupt.check()
    return ProgramResult(ended.code, decode(bytes(output.head)), decode(bytes(errors.head)), ended.timed_out, bool(output.dropped))


# Grep


def _run_grep(bench: Workbench, given: Json, interrupt: Interrupt) -> Outcome:
    path = bench.paths.resolve(given.get("path") or ".")
    if not os.path.exists(path):
        raise ToolError(f"path: no such file or folder: {path}")
    mode = given.get("output_mode", "files_with_matches")
    program = find_program("rg", bench.env)
    argv, stdin = (_ripgrep(program, given, mode, path), b"") if program else _worker(given, mode, path)
    result = run_program(argv, bench, interrupt, stdin)
    if result.timed_out:
        seconds = min(GREP_TIMEOUT, bench.tool_timeout)
        raise ToolError(f"The search took longer than {seconds:g} s. Narrow it with path, glob or type, or use a simpler pattern.")
    if result.code not in (0, 1) and not result.text:
        raise ToolError(f"pattern: {result.errors.strip() or 'the search failed'}")
    lines = [line for line in result.text.split("\n") if line and (line == "--" or bench.can_read(line.partition("\0")[0]))]
    prefix = bench.paths.workspace + "/"
    return _page([_joined(line.removeprefix(prefix)) for line in lines], given, mode, is_cut=result.is_cut)


def _joined(line: str) -> str:
    """A line of a match begins with its file's name and a NUL; the other modes' lines are names, or `--` between groups."""
    name, found, rest = line.partition("\0")
    if not found:
        return line
    separator = "-" if re.match(r"\d+-", rest) else ":"
    return f"{name}{separator}{rest}"


def _page(lines: list[str], given: Json, mode: str, *, is_cut: bool) -> Outcome:
    head, offset = int(given.get("head_limit", DEFAULT_HEAD)), int(given.get("offset", 0))
    shown = lines[offset : offset + head] if head else lines[offset:]
    body = "\n".join(shown)[:MAX_CHARACTERS]
    detail = {"mode": mode, "numLines" if mode == "content" else "numFiles": len(shown), "content": body}
    if not shown:
        return Outcome("No matches found" if mode == "content" else "No files found", detail)
    left = len(lines) - offset - len(shown)
    notes = [f"[{left} more; continue with offset={offset + len(shown)}]"] if left > 0 else []
    if is_cut or sum(map(len, shown)) > MAX_CHARACTERS:
        notes.append("[There was more output than is shown; narrow the search.]")
    title = [f"Found {len(shown)} file{'s' if len(shown) != 1 else ''}"] if mode == "files_with_matches" else []
    return Outcome("\n".join([*title, body, *notes]), detail)


def _ripgrep(program: str, given: Json, mode: str, path: str) -> list[str]:
    argv = [program, "--no-config", "--color=never", "--no-heading", "--with-filename", "--hidden", "--max-columns=2000"]
    argv += [f"--glob=!{name}" for name in _PRUNED]
    argv += {"content": ["--null"], "count": ["--null", "--count"]}.get(mode, ["--files-with-matches", "--sortr=modified"])
    if mode == "content":
        argv += [f"{name}{int(given[name])}" for name in ("-A", "-B", "-C") if name in given]
        argv += ["-n"] if given.get("-n", True) else ["-N"]
    argv += ["-i"] if given.get("-i") else []
    argv += ["-U", "--multiline-dotall"] if given.get("multiline") else []
    argv += ["--glob", given["glob"]] if "glob" in given else []
    argv += ["--type", given["type"]] if "type" in given else []
    return [*argv, "--regexp", given["pattern"], "--", path]


def _worker(given: Json, mode: str, path: str) -> tuple[list[str], bytes]:
    code = f"import sys; sys.path[:0] = {sys.path!r}; from ash.runtime.tools.grep_worker import main; main()"
    return [sys.executable, "-I", "-S", "-B", "-c", code], json.dumps({**given, "output_mode": mode, "path": path}).encode()


GREP = Tool(
    "Grep",
    _GREP_DESCRIPTION,
    schema(
        ["pattern"],
        pattern=text("The regular expression to search for"),
        path=text("The file or folder to search (default: the workspace)"),
        glob=text('Only files with such names: "*.js", "*.{ts,tsx}"'),
        type=text("Only files of this type: py, js, ts, rust, go, java, c, cpp, md, json, …"),
        output_mode=text("What to show", enum=["content", "files_with_matches", "count"]),
        multiline=flag("Let . match line breaks and matches span lines (default false)"),
        head_limit=number(f"Show only so many lines or files (default {DEFAULT_HEAD}; 0 shows all)", minimum=0),
        offset=number("Skip so many lines or files first", minimum=0),
        **{
            "-A": number("Lines to show after each match (content mode)", minimum=0),
            "-B": number("Lines to show before each match (content mode)", minimum=0),
            "-C": number("Lines to show before and after each match (content mode)", minimum=0),
            "-n": flag("Show line numbers (content mode; default true)"),
            "-i": flag("Ignore case"),
        },
    ),
    _run_grep,
    is_read_only=True,
)
