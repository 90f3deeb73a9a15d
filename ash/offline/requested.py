"""Finds out which tool calls a plain English request asks for: "run `ls`", "write hello to notes.txt and then read it". Pure.

A short list of patterns, not a language model: what none of them fits is not a request for tools.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from ash.models import Json


class Call(NamedTuple):
    name: str
    input: Json


Step = list[Call]
"""Calls that are made at once; the next step waits for their results."""


class Plan(NamedTuple):
    steps: list[Step]
    missing: list[str]
    """Tools that it takes and that the request does not offer."""


_QUOTED = re.compile(r"```.*?```|`[^`\n]+`|\"[^\"\n]*\"|(?<!\w)'[^'\n]*'(?!\w)", re.DOTALL)
_PATH = r"(?:`[^`]+`|\"[^\"]+\"|'[^']+'|[\w~@+./-]*(?:\.\w[\w-]*|/[\w.@+-]*)|Makefile|Dockerfile|README|LICENSE|CHANGELOG)"
_FILE = r"(?:an?\s+|the\s+|my\s+)?(?:new\s+|text\s+)*(?:file\s+)?(?:called\s+|named\s+)?"
_POLITE = re.compile(
    r"^(?:(?:\d+[.)]|[-*])\s+)?(?:(?:please|now|first|next|finally|also|ok|okay|so|(?:can|could|would|will) you|i want you to|"
    r"i would like you to|i'd like you to|let's|"
    r"(?:use|using|with) (?:the )?bash(?: tool)?(?: to)?)[\s,:]+)*",
    re.IGNORECASE,
)
_TRAILING = re.compile(r"(?:[\s,]+(?:please|for me|thanks|thank you))*\s*[.?!]*\s*$", re.IGNORECASE)
_PARALLEL = re.compile(r"[\s,]*\b(?:at the same time|in parallel|simultaneously|concurrently|both at once)\b[\s,:]*", re.IGNORECASE)
_THEN = re.compile(r"(?:[\s,;.]+(?:and\s+)?(?:then|after that|afterwards)\b[\s,:]*|\s*\n\s*(?:\d+[.)]\s+|[-*]\s+)?)", re.IGNORECASE)
_AND = re.compile(r"\s*,?\s+and\s+(?:also\s+)?|,\s+", re.IGNORECASE)
_REPORT = re.compile(r"(?:tell|show|give|explain|summari[sz]e|report|describe|say|let)\b", re.IGNORECASE)
_SHELL_WORD = re.compile(r"(?:ls|pwd|whoami|id|date|uname|env|ps|df|hostname|git|python3?|node|npm|echo|make)\b(?=$|\s+-|\s+\w+$)")
_LANGUAGES = {
    "python": "py", "javascript": "js", "typescript": "ts", "markdown": "md", "text": "txt", "json": "json", "html": "html", "css": "css",
    "yaml": "yaml",
}  # fmt: skip
_LONGEST = 4_000  # some patterns take time by the square of the length
_MOST_BRACKETS = 300
_HERE = {"", ".", "here", "current", "this", "workspace", "working", "folder", "directory", "there"}


def plan(text: str, offered: Collection[str], cwd: str = "") -> Plan:
    """The steps that `text` asks for, as far as the tools `offered` allow; no steps when it asks for none."""
    steps = _steps(text, cwd) if len(text) <= _LONGEST else []
    if not steps:
        return Plan([], [])
    possible = [[_with_offered(call, offered) for call in step] for step in steps]
    missing = [call.name for step in possible for call in step if call.name not in offered]
    return Plan([] if missing else possible, list(dict.fromkeys(missing)))


def _steps(text: str, cwd: str) -> list[Step]:
    is_parallel = _PARALLEL.search(text) is not None
    clauses = _PARALLEL.sub(" ", text).strip() if is_parallel else text.strip()
    found = _all_of(_split(_THEN, clauses), cwd) or _one_of(clauses, cwd)
    if is_parallel and found:
        return [[call for step in found for call in step]]
    return found


def _split(pattern: re.Pattern[str], text: str) -> list[str]:
    """`text` split outside quotes and code."""
    kept: list[str] = []

    def hide(match: re.Match[str]) -> str:
        kept.append(match.group())
        return f"\0{len(kept) - 1}\0"

    parts = [part for part in pattern.split(_QUOTED.sub(hide, text)) if part and part.strip()]
    return [re.sub(r"\0(\d+)\0", lambda match: kept[int(match.group(1))], part) for part in parts]


def _all_of(clauses: list[str], cwd: str) -> list[Step]:
    """The steps of several clauses, if each is a request of its own; the last ones may only ask to report."""
    if len(clauses) < 2:
        return []
    steps: list[Step] = []
    verb, path = "", ""
    for clause in clauses:
        bare = _POLITE.sub("", clause.strip())
        found = _one_of(clause, cwd, path) or (_one_of(f"{verb} {bare}", cwd, path) if verb and re.fullmatch(_PATH, bare) else [])
        if not found and steps and _REPORT.match(bare):
            continue
        if not found:
            return []
        steps += found
        verb = bare.split()[0] if len(bare.split()) > 1 else verb
        path = next((str(call.input["file_path"]) for call in found[-1] if "file_path" in call.input), path)
    return steps


def _one_of(clause: str, cwd: str, path: str = "") -> list[Step]:
    """The steps of one clause: of its parts joined by "and" if each is a request, else of the whole."""
    parts = _split(_AND, clause)
    if len(parts) > 1 and (found := _all_of(parts, cwd)):
        return found
    bare = _TRAILING.sub("", _POLITE.sub("", clause.strip()))
    for pattern, build in _PATTERNS:
        if match := pattern.fullmatch(bare):
            fields = {name: value or "" for name, value in match.groupdict().items()}
            return build(fields, cwd, path)
    return []


def _with_offered(call: Call, offered: Collection[str]) -> Call:
    """The call itself, or the same done by the shell when only that is offered."""
    if call.name in offered or "Bash" not in offered:
        return call
    command = _as_command(call)
    return Call("Bash", {"command": command, "description": f"The same as {call.name}"}) if command else call


_NEEDED = {"Read": {"file_path"}, "Write": {"file_path", "content"}, "Glob": {"pattern"}, "Grep": {"pattern"}}


def _as_command(call: Call) -> str:
    field = {name: str(value) for name, value in call.input.items()}
    if not _NEEDED.get(call.name, set()) <= set(field):
        return ""
    if call.name == "Read":
        return f"cat -- {shlex.quote(field['file_path'])}"
    if call.name == "Write":
        return f"printf %s {shlex.quote(field['content'])} > {shlex.quote(field['file_path'])}"
    if call.name == "Glob":
        pattern = field["pattern"].removeprefix("**/")
        return f"find {shlex.quote(field.get('path', '.'))} -name {shlex.quote(pattern)}"
    if call.name == "Grep":
        return f"grep -rn -e {shlex.quote(field['pattern'])} {shlex.quote(field.get('path', '.'))}"
    return ""


def _unquote(text: str) -> str:
    """The text inside quotes or a code fence; as it is when it has none."""
    text = text.strip()
    fence = re.fullmatch(r"```[\w+-]*\n?(.*?)\n?```", text, re.DOTALL)
    if fence:
        return fence.group(1)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "`\"'":
        return text[1:-1]
    return text


def _absolute(path: str, cwd: str) -> str:
    path = _unquote(path)
    return posixpath.normpath(posixpath.join(cwd, path)) if cwd and not path.startswith("~") else path


def _folder(path: str, cwd: str) -> Json:
    path = _unquote(path).removesuffix(" folder").removesuffix(" directory")
    return {} if path in _HERE else {"path": _absolute(path, cwd)}


def bash(command: str, description: str) -> list[Step]:
    return [[Call("Bash", {"command": command, "description": description})]]


def _run(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    command = found["command"]
    quoted = re.search(r"```(?:\w+\n)?(.+?)```|`([^`]+)`", command, re.DOTALL)
    if quoted:
        command = quoted.group(1) or quoted.group(2)
    else:
        command = re.sub(r"\s+and\s+(?:tell|show|explain|report)\b.*", "", command, flags=re.DOTALL)
    return bash(_unquote(command), "Run the command that was asked for")


def _write(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    content = re.sub(r"^(?:the\s+)?(?:text|words?|line|string|content)\s*:?\s+(?=[`\"'])", "", found.get("content", ""))
    return [[Call("Write", {"file_path": _absolute(found["path"], cwd), "content": _unquote(content)})]]


def _append(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    target = shlex.quote(_absolute(found["path"], cwd))
    return bash(f"printf '%s\\n' {shlex.quote(_unquote(found['content']))} >> {target}", "Append to the file")


def _replace(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    target = _absolute(found["path"], cwd)
    change: Json = {"file_path": target, "old_string": _unquote(found["old"]), "new_string": _unquote(found["new"])}
    if found["all"] or found["everywhere"]:
        change["replace_all"] = True
    return [[Call("Read", {"file_path": target})], [Call("Edit", change)]]


def _read(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    return [[Call("Read", {"file_path": _absolute(found["path"], cwd)})]]


def _read_again(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    return [[Call("Read", {"file_path": path})]] if path else []


def _list(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    return [[Call("Glob", {"pattern": "**/*", **_folder(found["path"], cwd)})]]


def _find(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    language = found.get("language", "").lower()
    pattern = f"*.{_LANGUAGES[language]}" if language else _unquote(found["glob"])
    return [[Call("Glob", {"pattern": pattern if "/" in pattern else f"**/{pattern}", **_folder(found["path"], cwd)})]]


def _grep(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    where = _folder(found["path"], cwd)
    return [[Call("Grep", {"pattern": _unquote(found["pattern"]), "output_mode": "content", "-n": True, **where})]]


def _todo(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    items = [re.sub(r"^(?:\d+[.)]|[-*])\s+", "", item.strip()) for item in re.split(r"\n|;|,\s+(?:and\s+)?", found["items"])]
    todos = [
        {"content": item, "status": "pending" if index else "in_progress", "activeForm": f"Working on: {item}"}
        for index, item in enumerate(item for item in items if item)
    ]
    return [[Call("TodoWrite", {"todos": todos})]]


def _delete(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    return bash(f"rm -- {shlex.quote(_absolute(found['path'], cwd))}", "Delete the file")


def _make_folder(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    return bash(f"mkdir -p -- {shlex.quote(_absolute(found['path'], cwd))}", "Make the folder")


def _count(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    flag = {"line": "-l", "word": "-w", "character": "-m", "byte": "-c"}[found["unit"].lower().removesuffix("s")]
    return bash(f"wc {flag} < {shlex.quote(_absolute(found['path'], cwd))}", f"Count the {found['unit']}")


def _call(found: dict[str, str], cwd: str, path: str) -> list[Step]:
    try:
        value: Any = json.loads(found["json"])
    except (ValueError, RecursionError):
        return []
    is_flat = found["json"].count("{") + found["json"].count("[") <= _MOST_BRACKETS  # deep ones could not be written out again
    return [[Call(found["name"], value)]] if isinstance(value, dict) and is_flat else []


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text.replace(" ", r"\s+").replace("{PATH}", _PATH).replace("{FILE}", _FILE), re.IGNORECASE | re.DOTALL)


_IN = r"(?: (?:in|of|inside|under)(?: the)?(?: file)? (?P<path>\S+?)(?: (?:folder|directory))?)?"
_SAYING = (
    r"(?:with|containing|that contains|that says|saying|which says)(?: the| this)?(?: following)?(?: (?:contents?|text|lines?|words?))?"
    r"(?: of)?\s*:?\s*"
)
_PATTERNS: list[tuple[re.Pattern[str], Callable[[dict[str, str], str, str], list[Step]]]] = [
    (_pattern(r"(?:call|use)(?: the)?(?: tool)? `?(?P<name>[\w-]+)`?(?: tool)? with\s*:?\s*(?P<json>\{.*\})"), _call),
    (_pattern(r"(?:make|create|add)(?: an?| the)?(?: new)? (?:directory|folder)(?: called| named)? (?P<path>\S+)"), _make_folder),
    (_pattern(r"(?:create|make|write|add|save)(?: me)? {FILE}(?P<path>{PATH}),? " + _SAYING + r"(?P<content>.+)"), _write),
    (_pattern(r"(?:create|make|add|touch)(?: me)?(?: an)?(?: empty)? {FILE}(?P<path>{PATH})"), _write),
    (_pattern(r"(?:append|add) (?P<content>.+?) to (?:the end of )?{FILE}(?P<path>{PATH})"), _append),
    (_pattern(r"(?:write|put|save|store) (?P<content>.+?) (?:to|into|in) {FILE}(?P<path>\S+)"), _write),
    (
        _pattern(
            r"(?:replace|change|rename)(?P<all> all| every)? (?P<old>.+?) (?:with|by|to|into) (?P<new>.+?) in {FILE}(?P<path>{PATH})"
            r"(?P<everywhere> everywhere)?"
        ),
        _replace,
    ),
    (_pattern(r"(?:delete|remove) (?:the )?(?:file )?(?P<path>{PATH})"), _delete),
    (_pattern(r"(?:read|cat|open|show|print|display)(?: me)? it(?: back| again| to me)*"), _read_again),
    (_pattern(r"(?:list|show|what)(?: me)?(?: are)?(?: all)?(?: the| my)? (?:files|folders)(?: there| here)?" + _IN), _list),
    (_pattern(r"(?:what|which) (?:files|folders) (?:do (?:i|we|you) have|are there|exist)" + _IN), _list),
    (
        _pattern(
            r"(?:read|cat|open|show|print|display|view)(?: me)?(?: the)?(?: contents? of)? {FILE}(?P<path>{PATH})"
            r"(?: (?:file|back|to me|again))?"
        ),
        _read,
    ),
    (_pattern(r"what(?:'s| is| are| does) (?:in|inside|the contents? of)(?: the)?(?: file)? (?P<path>{PATH})"), _read),
    (_pattern(r"what does(?: the)?(?: file)? (?P<path>{PATH}) (?:say|contain|look like)"), _read),
    (_pattern(rf"(?:find|list|show)(?: me)?(?: all)?(?: the| my)? (?P<language>{'|'.join(_LANGUAGES)}) files" + _IN), _find),
    (
        _pattern(
            r"(?:find|glob|locate|list)(?: me)?(?: all)?(?: the)?(?: files?)?(?: matching| named| called| like)?(?: the pattern)? "
            r"(?P<glob>`[^`]+`|\"[^\"]+\"|'[^']+'|\S*[*?]\S*|[\w-]+\.\w+)(?: files)?" + _IN
        ),
        _find,
    ),
    (
        _pattern(
            r"(?:search(?: (?:the )?(?:files|code|workspace|folder))?(?: for)|grep(?: for)?|look for|find (?:the )?(?:text|word|string)) "
            r"(?P<pattern>.+?)" + _IN
        ),
        _grep,
    ),
    (_pattern(r"count(?: the)? (?P<unit>lines?|words?|characters?|bytes?) (?:in|of) {FILE}(?P<path>{PATH})"), _count),
    (_pattern(r"how many (?P<unit>lines|words|characters|bytes) (?:are in|does|has|in) {FILE}(?P<path>{PATH})(?: have| contain)?"), _count),
    (_pattern(r"(?:make |write |create )?(?:me )?(?:an? |my )?(?:todos?|to-dos?)(?: list)?(?: with| of| for)?\s*:\s*(?P<items>.+)"), _todo),
    (_pattern(r"(?:make|write|create) (?:me )?(?:an? |my )?(?:todo|to-do) list (?:with|of|for) (?P<items>.+)"), _todo),
    (
        _pattern(r"(?:run|execute|exec)(?: the)?(?: following)?(?: (?:shell|bash))?(?: command| commands| script)?\s*:?\s*(?P<command>.+)"),
        _run,
    ),
    (_pattern(r"(?:bash|shell|\$|!)\s*:?\s*(?P<command>.+)"), _run),
    (re.compile(rf"(?P<command>{_SHELL_WORD.pattern}.*)"), _run),
]
