"""The system prompt: the session's own or the agent's CLAUDE.md with what it imports, and where the agent is. Never writes."""

from __future__ import annotations

import os
import re

from ash.runtime.paths import Paths

DEFAULT_PROMPT = "You are a helpful assistant that can use tools to work with files and run commands."
MAX_DEPTH = 5
MAX_FILES = 50
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_IMPORT = re.compile(r"(?<![^\s(])@([\w./-]*\w)")


def system_prompt(option: str | None, paths: Paths, today: str) -> list[str]:
    """The prompt of the session, else the agent's CLAUDE.md, followed by where the agent is.

    `today` is fixed at `init`: a date taken anew each turn would change the cached prefix of a long conversation.
    """
    prompt = option if option is not None else read_prompt(paths.agent)
    place = (
        "<env>\n"
        f"Working directory: {paths.workspace}\n"
        f"Agent files (read-only): {paths.agent}\n"
        "Platform: linux, in a sandbox of its own\n"
        f"Today's date: {today}\n"
        "</env>"
    )
    return [prompt if prompt.strip() else DEFAULT_PROMPT, place]


def read_prompt(agent_dir: str) -> str:
    """CLAUDE.md, then every file it imports with `@path`, each once; such a path outside the folder is just text."""
    root = os.path.realpath(agent_dir)
    found: dict[str, str] = {}
    _collect(root, os.path.join(root, "CLAUDE.md"), found, 0)
    main, *imported = found.items() or [("", "")]
    return "\n\n".join([main[1], *(f"Contents of {os.path.relpath(path, root)}:\n\n{text}" for path, text in imported)])


def _collect(root: str, path: str, found: dict[str, str], depth: int) -> None:
    path = os.path.realpath(path)
    if path in found or depth > MAX_DEPTH or len(found) >= MAX_FILES or not path.startswith(root + "/") or not os.path.isfile(path):
        return
    try:
        with open(path, "rb") as file:
            found[path] = file.read().decode("utf-8-sig", "replace")
    except OSError:
        return
    for name in _IMPORT.findall(_CODE.sub("", found[path])):
        _collect(root, os.path.join(os.path.dirname(path), name), found, depth + 1)
