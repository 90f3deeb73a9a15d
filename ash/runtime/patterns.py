"""File name patterns (`**`, `*`, `?`, `[a-z]`, `{a,b}`) as regular expressions, and the path rules of settings. Pure."""

from __future__ import annotations

import os
import re

from ash.runtime.paths import Paths


def translate(pattern: str) -> str:
    """A regular expression, to be matched against a whole path, for a glob pattern."""
    result: list[str] = []
    position, braces = 0, 0
    while position < len(pattern):
        part, position, braces = _next(pattern, position, braces)
        result.append(part)
    return "".join(result) + ")" * braces


def _next(pattern: str, at: int, braces: int) -> tuple[str, int, int]:
    char = pattern[at]
    if char == "*":
        return (*_stars(pattern, at), braces)
    if char == "?":
        return "[^/]", at + 1, braces
    if char == "[" and (end := pattern.find("]", at + 2)) > 0:
        inner = pattern[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[").replace("&&", "&\\&")
        return f"[{'^' + inner[1:] if inner[0] in '!^' else inner}]", end + 1, braces
    if char == "{" and "}" in pattern[at:]:
        return "(?:", at + 1, braces + 1
    if braces and char in ",}":
        return ("|", at + 1, braces) if char == "," else (")", at + 1, braces - 1)
    if char == "\\" and at + 1 < len(pattern):
        return re.escape(pattern[at + 1]), at + 2, braces
    return re.escape(char), at + 1, braces


def _stars(pattern: str, at: int) -> tuple[str, int]:
    if not pattern.startswith("**", at):
        return "[^/]*", at + 1
    if pattern.startswith("**/", at) and (at == 0 or pattern[at - 1] == "/"):
        return "(?:.*/)?", at + 3
    return ".*", at + 2


def path_rule(spec: str, paths: Paths) -> re.Pattern[str]:
    """The files that a rule such as `Read(./secrets/**)` means, as one expression over absolute paths.

    `//x` is absolute, `~/x` in the home folder; everything else is relative to the agent's folder, which exists twice: as
    the workspace and as the read-only original. A name without a slash matches at any depth, a folder means all in it.
    """
    forms = [f"{re.escape(base)}{translate(rest)}" for base, rest in _anchors(spec, paths)]
    return re.compile(f"(?s:(?:{'|'.join(forms)})(?:/.*)?)")


def _anchors(spec: str, paths: Paths) -> list[tuple[str, str]]:
    spec = spec.rstrip("/") or spec
    if spec.startswith("//"):
        return [("", spec[1:])]
    if spec == "~" or spec.startswith("~/"):
        return [(paths.home, spec[1:])]
    relative = spec[2:] if spec.startswith("./") else spec
    if "/" not in relative and not spec.startswith("./"):
        relative = "**/" + relative
    anchors = [(root + "/", relative.lstrip("/")) for root in dict.fromkeys((paths.workspace, paths.agent))]
    if spec.startswith((paths.workspace + "/", paths.agent + "/", paths.home + "/")):
        anchors.append(("", spec))
    return anchors


def forms_of(path: str) -> set[str]:
    """The path as given and where it really leads: a rule must not be passed by through a link."""
    return {os.path.normpath(path), os.path.realpath(path)}
