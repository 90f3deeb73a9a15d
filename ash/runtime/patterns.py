"""File name patterns (`**`, `*`, `?`, `[a-z]`, `{a,b}`) as regular expressions, and the path rules of settings. Pure."""

from __future__ import annotations

import os
import re

from ash.runtime.paths import Paths

_MAX_OPTIONS = 64
_FEW_STARS = 2
_INNER_BRACES = re.compile(r"\{([^{}]*)\}")
_TOKEN = re.compile(r"\*\*+/?|\[.[^\]]*\]|\\.|.", re.DOTALL)


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


class Glob:
    """A glob pattern that the model chose, matched in time that grows with pattern times path, however many stars it has.

    A regular expression only does for few stars: `*a*a*a*ab` keeps one busy for minutes, with the interpreter locked.
    """

    def __init__(self, pattern: str) -> None:
        options = _options(pattern)
        is_quick = all(len(re.findall(r"\*+", option)) <= _FEW_STARS for option in options)
        self._expression = re.compile(f"(?s:{translate(pattern)})") if is_quick else None
        self._alternatives = [] if is_quick else [_tokens(option) for option in options]

    def matches(self, path: str) -> bool:
        if self._expression is not None:
            return self._expression.fullmatch(path) is not None
        return any(_accepts(tokens, path) for tokens in self._alternatives)


def _options(pattern: str) -> list[str]:
    """The pattern without braces: one for each choice, so many at most as one may reasonably mean."""
    done: list[str] = []
    waiting = [pattern]
    while waiting and len(done) + len(waiting) <= _MAX_OPTIONS:
        current = waiting.pop()
        found = _INNER_BRACES.search(current)
        if found is None:
            done.append(current)
        else:
            waiting += [current[: found.start()] + choice + current[found.end() :] for choice in found[1].split(",")]
    if waiting:
        raise ValueError(f"{{…}} in the pattern stand for more than {_MAX_OPTIONS} patterns; ask for fewer at a time")
    return done


def _tokens(pattern: str) -> list[re.Pattern[str] | str]:
    """`*`, `**` and `**/` as they are, everything else as an expression for one character."""
    tokens: list[re.Pattern[str] | str] = []
    for match in _TOKEN.finditer(pattern):
        text = match[0]
        if text.startswith("**"):
            is_folders = text.endswith("/") and (match.start() == 0 or pattern[match.start() - 1] == "/")
            tokens += ["**/"] if is_folders else ["**", *([re.compile("/")] if text.endswith("/") else [])]
        else:
            tokens.append(text if text == "*" else re.compile(f"(?s:{translate(text)})"))
    return tokens


def _accepts(tokens: list[re.Pattern[str] | str], path: str) -> bool:
    """Walk the path once, with the set of all places in the pattern that its beginning can lead to."""
    places = _closure(tokens, {0}, at_start=True)
    for char in path:
        after = set()
        for place in places:
            token = tokens[place] if place < len(tokens) else ""
            if isinstance(token, re.Pattern):
                after |= {place + 1} if token.fullmatch(char) else set()
            elif token.startswith("**") or (token == "*" and char != "/"):
                after.add(place)
        places = _closure(tokens, after, at_start=char == "/")
        if not places:
            return False
    return len(tokens) in places


def _closure(tokens: list[re.Pattern[str] | str], places: set[int], *, at_start: bool) -> set[int]:
    """With the places behind stars that may stand for nothing (more); `**/` ends only where a name starts."""
    found = set()
    for place in places:
        while place not in found:
            found.add(place)
            token = tokens[place] if place < len(tokens) else ""
            place += token in ("*", "**") or (token == "**/" and at_start)
    return found


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
