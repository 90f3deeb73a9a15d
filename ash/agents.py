"""Agents: checks an uploaded folder, unpacks it content-addressed and read-only, and keeps its record with a new version.

An agent folder is configuration written by somebody else: nothing in it is run or obeyed here, and no path in it leads outside.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

from ash import models
from ash.egress.rules import check_rules
from ash.errors import AgentUnusable, AshError, InvalidRequest, PayloadTooLarge
from ash.models import Agent, Json
from ash.paths import Names, clean_path
from ash.skipped import is_skipped
from ash.store import Store

SETTINGS_PATH = ".claude/settings.json"
MCP_PATH = ".mcp.json"
LOCAL_SETTINGS_PATH = ".claude/settings.local.json"
PROMPT_PATH = "CLAUDE.md"
NO_PROMPT = "Agent directory must contain CLAUDE.md"

_CONFIGURATION = (SETTINGS_PATH, LOCAL_SETTINGS_PATH, MCP_PATH)
_UNPACKING = ".unpacking-"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,255}")
_MAX_CONFIG_BYTES = 1024 * 1024
_SYNC_EACH = 64
"""Up to so many files are flushed one by one; for more, one flush of everything is cheaper."""

# Settings that would run something for the session, or reach beyond its sandbox. They are common in existing folders, so that they are
# not refused but left aside, and `Agent.config["ignored"]` says so.
_IGNORED_SETTINGS = (
    "hooks", "statusLine", "fileSuggestion", "awsAuthRefresh", "awsCredentialExport", "otelHeadersHelper",
    "enabledPlugins", "extraKnownMarketplaces", "enableAllProjectMcpServers", "enabledMcpjsonServers",
)  # fmt: skip
# Parts of a folder that agents have elsewhere and that nothing here reads yet; they are kept, and named as ignored.
_UNUSED_PATHS = (".claude/skills/", ".claude/agents/", ".claude/commands/", "install.sh", "startup.sh")
_IGNORED = {SETTINGS_PATH: _IGNORED_SETTINGS, LOCAL_SETTINGS_PATH: _IGNORED_SETTINGS, MCP_PATH: ("mcpServers",)}


class _File(NamedTuple):
    path: str
    content: bytes
    is_executable: bool


class _Unpacked(NamedTuple):
    """A folder that was written and checked, but is not yet in its place."""

    temporary: str
    digest: str
    sizes: dict[str, int]
    ignored: list[str]


class Network(NamedTuple):
    """Rules for hosts, as `ash.egress` takes them."""

    hosts: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()


def check_env(env: Mapping[str, Any], where: str) -> None:
    """Raise InvalidRequest unless `env` holds names and values that a process can be given."""
    for name, value in env.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise InvalidRequest(f"{where}: {name!r:.80} is not a name for a variable; use letters, digits and _")
        if name.upper().startswith(models.RESERVED_VARIABLES):
            raise InvalidRequest(f"{where}: {name} is not passed into a sandbox; keys and addresses of models are settings of the server")
        if not isinstance(value, str) or "\0" in value:
            raise InvalidRequest(f"{where}: the value of {name!r:.80} must be text without NUL; put it in quotes")


class Agents:
    """The deployed agents. Their folders are `agents_dir`/<digest>; a relative path to deploy from starts beside `agents_dir`."""

    def __init__(self, store: Store, agents_dir: str, *, max_bytes: int, max_files: int) -> None:
        self._store = store
        self._agents_dir = agents_dir
        self._max_bytes, self._max_files = max_bytes, max_files
        self._settings: dict[str, Json] = {}
        self._networks: dict[str, Network] = {}
        self._unpacking: set[str] = set()
        # Between a folder's arrival and its record nobody may find it unused and remove it.
        self._lock = asyncio.Lock()

    def folder(self, digest: str) -> str:
        return os.path.join(self._agents_dir, digest)

    async def get(self, tenant_id: str, name: str) -> Agent:
        return await self._store.get_agent(tenant_id, name)

    async def list(self, tenant_id: str) -> list[Agent]:
        return await self._store.list_agents(tenant_id)

    async def delete(self, tenant_id: str, name: str) -> None:
        """Its sessions go on; folders that nothing needs any more are removed."""
        await self._store.delete_agent(tenant_id, name)
        await self.prune()

    async def deploy(
        self,
        tenant_id: str,
        name: str,
        *,
        files: Iterable[tuple[str, bytes]] | None = None,
        path: str | None = None,
        system_prompt: str | None = None,
        env: dict[str, str] | None = None,
        config: Json | None = None,
    ) -> Agent:
        """Check and unpack the files, and make them the agent's next version. `env` and `config` are kept where None is given.

        The files come from `files`, or from the folder `path` on the server. `system_prompt` becomes the CLAUDE.md.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequest("name must be 1 to 255 letters, digits, _ or -")
        check_env(env or {}, "env")
        unpacked = await self._unpack(self._sources(name, files, path, system_prompt))
        try:
            async with self._lock:
                await asyncio.to_thread(self._publish, unpacked)
                config = await self._config(tenant_id, name, config, unpacked.ignored)
                return await self._store.put_agent(tenant_id, name, unpacked.digest, env, config)
        finally:
            await asyncio.to_thread(shutil.rmtree, unpacked.temporary, True)
            self._unpacking.discard(os.path.basename(unpacked.temporary))

    async def _config(self, tenant_id: str, name: str, config: Json | None, ignored: Sequence[str]) -> Json | None:
        """`config`, or None to keep the stored one, with what this version of the folder asks for in vain."""
        if config is None:
            known = {agent.name: agent.config for agent in await self._store.list_agents(tenant_id)}
            config = known.get(name, {})
            if config.get("ignored", []) == ignored:
                return None
        kept = {key: value for key, value in config.items() if key != "ignored"}
        return {**kept, "ignored": ignored} if ignored else kept

    async def settings(self, digest: str) -> Json:
        """The parsed .claude/settings.json of a version; empty when it has none."""
        if digest not in self._settings:
            self._settings[digest] = await asyncio.to_thread(_read_settings, self.folder(digest))
        return self._settings[digest]

    async def network(self, digest: str) -> Network:
        """The hosts that a version asks for, and those that it shuts out: `sandbox.network` of its settings files."""
        if digest not in self._networks:
            self._networks[digest] = await asyncio.to_thread(_read_network, self.folder(digest))
        return self._networks[digest]

    async def prune(self) -> None:
        """Remove the folders that no agent, version or unfinished session needs, and what an interrupted deploy left."""
        async with self._lock:
            needed = await self._store.agent_digests() | self._unpacking
            removed = await asyncio.to_thread(_remove_others, self._agents_dir, needed)
        for digest in removed:
            self._settings.pop(digest, None)
            self._networks.pop(digest, None)

    # Unpacking; everything below runs in a thread

    def _sources(
        self, name: str, files: Iterable[tuple[str, bytes]] | None, path: str | None, system_prompt: str | None
    ) -> Generator[_File, None, None]:  # fmt: skip
        given = list(files or ())
        if path and given:
            raise InvalidRequest("give either files or path, not both")
        if path:
            root = os.path.join(os.path.dirname(os.path.abspath(self._agents_dir)), path)
            return _with_prompt(_read_folder(root, self._max_bytes), system_prompt, NO_PROMPT)
        if given:
            missing = "The files hold no CLAUDE.md at their top; add one, or give systemPrompt"
            return _with_prompt((_uploaded(entry, content) for entry, content in given), system_prompt, missing)
        return _with_prompt((), system_prompt or f"# {name}\n", "")

    async def _unpack(self, source: Generator[_File, None, None]) -> _Unpacked:
        name = f"{_UNPACKING}{models.new_id()}"
        self._unpacking.add(name)
        temporary = os.path.join(self._agents_dir, name)
        try:
            return await asyncio.to_thread(self._write, source, temporary)
        except BaseException:
            self._unpacking.discard(name)
            raise

    def _write(self, source: Generator[_File, None, None], temporary: str) -> _Unpacked:
        try:
            with _storing(), closing(source):
                os.makedirs(temporary)
                return self._write_files(source, temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write_files(self, source: Generator[_File, None, None], temporary: str) -> _Unpacked:
        names, contents = Names(), {}
        entries: dict[str, tuple[bool, str]] = {}
        sizes: dict[str, int] = {}
        total = 0
        for file in source:
            names.add(file.path)
            sizes[file.path] = len(file.content)
            total += len(file.content)
            self._check_size(len(sizes), total)
            _write_file(temporary, file)
            entries[file.path] = (file.is_executable, hashlib.sha256(file.content).hexdigest())
            if file.path in _CONFIGURATION:
                contents[file.path] = file.content
        ignored = _check_configuration(contents) + [path for path in _UNUSED_PATHS if any(name.startswith(path) for name in sizes)]
        _seal(temporary, len(sizes))
        return _Unpacked(temporary, _digest(entries), sizes, ignored)

    def _check_size(self, count: int, total: int) -> None:
        if count > self._max_files:
            raise PayloadTooLarge(f"The agent has more than {self._max_files} files; leave some out or raise max_agent_files")
        if total > self._max_bytes:
            raise _too_large(self._max_bytes)

    def _publish(self, unpacked: _Unpacked) -> None:
        """Put the folder in its place, by one rename. One that is there already is used again if it is whole."""
        target, broken = self.folder(unpacked.digest), f"{unpacked.temporary}-broken"
        if _is_whole(target, unpacked.sizes):
            return
        try:
            with _storing():
                if os.path.lexists(target):
                    os.rename(target, broken)
                os.rename(unpacked.temporary, target)
                _flush(self._agents_dir)
        finally:
            shutil.rmtree(broken, ignore_errors=True)


@contextmanager
def _storing() -> Iterator[None]:
    """Translates what the disk says while a folder is stored."""
    try:
        yield
    except OSError as error:
        raise AshError(f"The agent's files cannot be stored on the server: {error.strerror}") from error


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The agent's files are larger than {limit / 2**20:g} MiB together; leave some out or raise max_agent_mb")


def _with_prompt(source: Iterable[_File], system_prompt: str | None, missing: str) -> Generator[_File, None, None]:
    """The files, with `system_prompt` as the CLAUDE.md where it is given. Raises InvalidRequest with `missing` when there is none."""
    if system_prompt is not None:
        yield _File(PROMPT_PATH, _encoded(system_prompt), False)
    has_prompt = system_prompt is not None
    for file in source:
        if file.path == PROMPT_PATH and system_prompt is not None:
            continue
        has_prompt = has_prompt or file.path == PROMPT_PATH
        yield file
    if not has_prompt:
        raise InvalidRequest(missing)


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("systemPrompt holds half of a surrogate pair; send valid Unicode") from error


# Uploads


def _uploaded(path: str, content: bytes) -> _File:
    """An upload says nothing of modes: what names its interpreter may be executed."""
    return _File(clean_path(path), content, content.startswith(b"#!"))


# A folder on the server


def _read_folder(root: str, limit: int) -> Iterator[_File]:
    """Every file below `root`, without what is never part of an agent. Refuses links and whatever is not a file or a folder."""
    if "\0" in root or not os.path.isdir(root):
        raise InvalidRequest("Agent directory must contain CLAUDE.md; there is no such folder on the server")
    if not os.path.lexists(os.path.join(root, PROMPT_PATH)):  # first of all, so that a wrong path does not read a whole disk
        raise InvalidRequest(NO_PROMPT)
    yield from _walk(root, None, "", limit)


def _walk(name: str, parent: int | None, prefix: str, limit: int) -> Iterator[_File]:
    """Down by directory descriptors, so that nothing exchanged for a link meanwhile is followed."""
    follow = 0 if parent is None else os.O_NOFOLLOW
    folder = _open(name, parent, os.O_DIRECTORY | follow, prefix or name)
    try:
        for entry, is_folder in _entries(folder):
            path = clean_path(prefix + entry)
            if is_folder:
                yield from _walk(entry, folder, f"{path}/", limit)
            else:
                yield _read_file(entry, folder, path, limit)
    finally:
        os.close(folder)


def _entries(folder: int) -> list[tuple[str, bool]]:
    """Names with whether they are folders, sorted, without what is skipped."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            kinds = {is_folder, is_folder or entry.is_symlink()}  # a link may stand for a folder: node_modules often is one
            if not any(is_skipped(entry.name, is_folder=kind) for kind in kinds):
                found.append((entry.name, is_folder))
    return sorted(found)


def _read_file(name: str, folder: int, path: str, limit: int) -> _File:
    mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        raise InvalidRequest(f"files: {path!r:.200} is a link; replace it by what it points to")
    if not stat.S_ISREG(mode):
        raise InvalidRequest(f"files: {path!r:.200} is neither a file nor a folder; remove it")
    with open(_open(name, folder, os.O_NOFOLLOW | os.O_NONBLOCK, path), "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size > limit:
            raise _too_large(limit)
        content = file.read(limit + 1)
    return _File(path, content, bool(status.st_mode & 0o111) or content.startswith(b"#!"))


def _open(name: str, parent: int | None, flags: int, path: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=parent)
    except OSError as error:
        raise InvalidRequest(f"files: {path!r:.200} cannot be read by the server: {error.strerror}") from error


# What a folder may configure


def _check_configuration(contents: Mapping[str, bytes]) -> list[str]:
    """Raise InvalidRequest for what is malformed or not for a folder to decide. Returns what is left aside, by file and key."""
    ignored = []
    for path in _CONFIGURATION:
        if path not in contents:
            continue
        text = _decoded(path, contents[path])
        value, fault = _parse_object(path, text), partial(_fault, path, text)
        if path == MCP_PATH:
            _check_mcp(value, fault)
        else:
            _check_settings(value, fault)
        ignored += [f"{path}: {key}" for key in _IGNORED[path] if value.get(key)]
    return ignored


def _check_settings(settings: Json, fault: Callable[[str, str], InvalidRequest]) -> None:
    permissions = settings.get("permissions", {})
    if not isinstance(permissions, dict):
        raise fault("permissions", 'permissions must be an object, such as {"allow": ["Bash(ls:*)"]}')
    for key in ("allow", "deny", "ask"):
        rules = permissions.get(key, [])
        if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
            raise fault(key, f'permissions.{key} must be a list of strings, such as ["Bash(ls:*)"]')
    mode = permissions.get("defaultMode")
    if mode is not None and not isinstance(mode, str):
        raise fault("defaultMode", 'permissions.defaultMode must be a string, such as "acceptEdits"')
    if mode == "bypassPermissions":
        raise fault("defaultMode", "a folder may not choose bypassPermissions; remove defaultMode, or set permissionMode for the session")
    if "apiKeyHelper" in settings:
        raise fault("apiKeyHelper", "a folder may not run a program for keys; remove apiKeyHelper and give the server its key")
    _check_settings_env(settings.get("env", {}), fault)
    _check_network(settings.get("sandbox", {}), fault)


def _check_network(sandbox: Any, fault: Callable[[str, str], InvalidRequest]) -> None:
    network = sandbox.get("network", {}) if isinstance(sandbox, dict) else None
    if not isinstance(network, dict):
        raise fault("sandbox", 'sandbox must be an object, such as {"network": {"allowedDomains": ["pypi.org"]}}')
    for key in ("allowedDomains", "deniedDomains"):
        hosts = network.get(key, [])
        if not isinstance(hosts, list):
            raise fault(key, f'sandbox.network.{key} must be a list of hosts, such as ["pypi.org", "*.example.com"]')
        _ = check_rules(hosts, lambda problem, key=key: fault(key, f"sandbox.network.{key}: {problem}"))  # type: ignore[misc]


def _check_settings_env(env: Any, fault: Callable[[str, str], InvalidRequest]) -> None:
    if not isinstance(env, dict):
        raise fault("env", 'env must be an object of strings, such as {"TZ": "UTC"}')
    for name, value in env.items():
        if name.upper().startswith(models.RESERVED_VARIABLES):
            raise fault(name, f"a folder may not set {name}: the server alone decides about the model's address and key; remove it")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            check_env({name: str(value) if is_number else value}, "env")
        except InvalidRequest as error:
            raise fault(name, error.message) from error


def _check_mcp(config: Json, fault: Callable[[str, str], InvalidRequest]) -> None:
    servers = config.get("mcpServers", {})
    if not isinstance(servers, dict):
        raise fault("mcpServers", "mcpServers must be an object with one entry for each server")
    for name, server in servers.items():
        if not isinstance(server, dict) or not any(isinstance(server.get(key), str) for key in ("command", "url")):
            raise fault(name, f"the server {name!r:.80} needs a command or a url")


def _fault(path: str, text: str, key: str, what: str) -> InvalidRequest:
    """An error that names the line on which `key` first stands."""
    match = re.search(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text)
    line = text.count("\n", 0, match.start()) + 1 if match else 1
    return InvalidRequest(f"{path} line {line}: {what}")


def _decoded(path: str, content: bytes) -> str:
    if len(content) > _MAX_CONFIG_BYTES:
        raise PayloadTooLarge(f"{path} is larger than {_MAX_CONFIG_BYTES // 2**20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidRequest(f"{path} line {line}: this is not UTF-8; save the file as UTF-8") from error


def _parse_object(path: str, text: str) -> Json:
    try:
        value = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{path} line {error.lineno}: this is not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise InvalidRequest(f"{path}: this is nested too deeply") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} line 1: the file must hold a JSON object, {{…}}")
    return value


# Folders on the disk


def _write_file(root: str, file: _File) -> None:
    target = os.path.join(root, file.path)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
        out.write(file.content)
        os.fchmod(out.fileno(), 0o555 if file.is_executable else 0o444)


def _seal(root: str, count: int) -> None:
    """Make the folders readable for the sandboxes' users whatever the umask, and bring everything to the disk before the rename."""
    for folder, _, names in os.walk(root):
        os.chmod(folder, 0o755)
        if count <= _SYNC_EACH:
            for path in (*(os.path.join(folder, name) for name in names), folder):
                _flush(path)
    if count > _SYNC_EACH:
        os.sync()


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(entries: Mapping[str, tuple[bool, str]]) -> str:
    """The name of a folder: a hash over the sorted paths, whether each may be executed, and its content."""
    whole = hashlib.sha256()
    for path, (is_executable, content_hash) in sorted(entries.items()):
        whole.update(f"{path}\0{'x' if is_executable else '-'}\0{content_hash}\n".encode())
    return whole.hexdigest()


def _is_whole(folder: str, sizes: Mapping[str, int]) -> bool:
    try:
        found = {path: os.lstat(os.path.join(folder, path)) for path in sizes}
    except OSError:
        return False
    return all(stat.S_ISREG(status.st_mode) and status.st_size == sizes[path] for path, status in found.items())


def _read_network(folder: str) -> Network:
    """What was deployed before these rules were checked may hold anything: then the agent reaches nothing."""
    try:
        found = [_parse_network(_read_settings(folder, path)) for path in (SETTINGS_PATH, LOCAL_SETTINGS_PATH)]
    except InvalidRequest:
        return Network()
    return Network(*(tuple(dict.fromkeys(itertools.chain(*rules))) for rules in zip(*found, strict=True)))


def _parse_network(settings: Json) -> Network:
    _check_network(settings.get("sandbox", {}), lambda key, problem: InvalidRequest(problem))
    network = settings.get("sandbox", {}).get("network", {})
    return Network(tuple(network.get("allowedDomains", ())), tuple(network.get("deniedDomains", ())))


def _read_settings(folder: str, path: str = SETTINGS_PATH) -> Json:
    if not os.path.isdir(folder):
        raise AgentUnusable("The files of this agent are missing on the server; deploy it again")
    try:
        with open(os.path.join(folder, path), "rb") as file:
            return _parse_object(path, _decoded(path, file.read()))
    except FileNotFoundError:
        return {}


def _remove_others(agents_dir: str, needed: set[str]) -> list[str]:
    """Remove the version folders and unfinished ones in `agents_dir` that are not `needed`; which they were."""
    names = os.listdir(agents_dir) if os.path.isdir(agents_dir) else []
    unused = [name for name in names if name not in needed and (_DIGEST.fullmatch(name) or name.startswith(_UNPACKING))]
    for name in unused:
        shutil.rmtree(os.path.join(agents_dir, name), ignore_errors=True)
    return unused
