"""The operator's policy: what agents and sessions may have at most, read from one TOML file and checked to the last key.

It reads that file and nothing else, and enforces nothing itself: egress, gateway, sessions and routes ask it. What it does not
understand is an error, never something to be passed over.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from ash import limits
from ash.config import Config
from ash.egress.rules import EgressPolicy, parse_network, parse_rule
from ash.errors import ConfigError
from ash.keys import STATIC_KEY_ID
from ash.limits import LimitRow
from ash.models import DEFAULT_TENANT, Json
from ash.sandbox import Mount

log = logging.getLogger(__name__)

FILE_NAME = "policy.toml"
BUILT_IN = "built-in"
RUNTIMES: tuple[str, ...] = (BUILT_IN,)
LOCAL = "local"
"""In `deploy.allow`: the server's own user and root, on its machine."""
NOTES = {
    "hooks.allow": "no hooks run yet: Ash runs no hooks of agents, whatever stands here",
    "runtimes.allow": "there is one runtime, the built-in one, so that there is nothing to choose yet",
}
"""What an operator should know of keys that govern nothing in this version."""
_MAX_BYTES = 1024 * 1024
_KEY_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_AGENT_NAME = re.compile(r"[a-zA-Z0-9_-]{1,255}")
_OWN_PLACES = ("/proc", "/dev", "/sys", "/run", "/tmp", "/etc", "/agent", "/workspace", "/home")
"""Where a sandbox has something of its own, which a mount must not hide."""

_NONE: tuple[str, ...] = ()

T = TypeVar("T")


class DeployPolicy(NamedTuple):
    """Who may deploy and delete agents: `*`, `local`, `env`, ids of API keys."""

    allow: tuple[str, ...] = ("*",)

    def allows(self, key_id: str | None, *, is_local: bool) -> bool:
        """`key_id` is that of the API key the request came with; `is_local` says that the server's own user sent it."""
        return "*" in self.allow or (is_local and LOCAL in self.allow) or (key_id is not None and key_id in self.allow)


class AgentPolicy(NamedTuple):
    """What is different for one agent. `egress_allow` stands instead of that of everybody; None keeps it."""

    egress_allow: tuple[str, ...] | None = None
    maximum: Mapping[str, float] = MappingProxyType({})

    def describe(self) -> Json:
        egress = {} if self.egress_allow is None else {"egress": {"allow": list(self.egress_allow)}}
        return {**egress, **({"limits": dict(self.maximum)} if self.maximum else {})}


class Policy(NamedTuple):
    """The policy in force. Without a file: no egress, every model, no mounts, the server's own settings as the maximum."""

    egress: EgressPolicy = EgressPolicy()
    models: tuple[str, ...] = ()
    """Patterns of model names; none of them means every model."""
    provider_features: tuple[str, ...] = ()
    """Patterns of what a model request may make the provider do beyond answering; see `ash.providers.reach`."""
    mounts: tuple[Mount, ...] = ()
    maximum: Mapping[str, float] = MappingProxyType({})
    """By limit name, as far as the file says something."""
    hooks: bool = False
    runtimes: tuple[str, ...] = RUNTIMES
    deploy: DeployPolicy = DeployPolicy()
    agents: Mapping[str, AgentPolicy] = MappingProxyType({})
    source: str = "default"
    """The file it was read from."""
    given: frozenset[str] = frozenset()
    """Keys that the file sets, as `egress.allow`; the others have their defaults."""

    def allows_model(self, name: str) -> bool:
        return not self.models or matches(name, self.models)

    def allows_feature(self, name: str) -> bool:
        return matches(name, self.provider_features)

    def describe(self, server: Mapping[str, float]) -> Json:
        """All that is in force, as the file has it, and where each key comes from; `server` are the server's own limits."""
        tables: Json = {
            "egress": {key: list(value) if isinstance(value, tuple) else value for key, value in self.egress._asdict().items()},
            "models": {"allow": list(self.models) or ["*"], "provider_features": list(self.provider_features)},
            "limits": {name: self.maximum.get(name, value) for name, value in server.items()},
            "hooks": {"allow": self.hooks},
            "runtimes": {"allow": list(self.runtimes)},
            "deploy": {"allow": list(self.deploy.allow)},
        }
        keys = [f"{table}.{key}" for table, values in tables.items() for key in values]
        return {
            "source": self.source,
            **tables,
            "mounts": [mount._asdict() for mount in self.mounts],
            "agents": {name: agent.describe() for name, agent in self.agents.items()},
            "origins": {key: self._origin(key) for key in keys},
            "notes": NOTES,
        }

    def _origin(self, key: str) -> str:
        """`policy`, `setting` of the server, or `default`."""
        if key in self.given:
            return "policy"
        return "setting" if key.startswith("limits.") else "default"

    def egress_of(self, tenant_id: str, agent: str) -> EgressPolicy:
        """What one agent may reach at most."""
        own = self._agent(tenant_id, agent).egress_allow
        return self.egress if own is None else self.egress._replace(allow=own)

    def maximum_of(self, tenant_id: str, agent: str) -> Mapping[str, float]:
        """The upper limits that the file sets for one agent's sessions."""
        return {**self.maximum, **self._agent(tenant_id, agent).maximum}

    def _agent(self, tenant_id: str, name: str) -> AgentPolicy:
        # Another tenant can name its agents as it likes: an exception that the operator made is not for them.
        return self.agents.get(name, AgentPolicy()) if tenant_id == DEFAULT_TENANT else AgentPolicy()


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class Policies:
    """Holds the policy in force. `problem` says why the file was not taken at the last `reload`; empty when it was."""

    def __init__(self, path: str, data_dir: str, *, is_required: bool) -> None:
        """Raises ConfigError for a file that is wrong, or missing although it was named."""
        self.path, self._data_dir = path, data_dir
        self.problem = ""
        has_file = is_required or os.path.lexists(path)
        self.current = load_policy(path, data_dir) if has_file else Policy()

    def egress_of(self, tenant_id: str, agent: str) -> EgressPolicy:
        return self.current.egress_of(tenant_id, agent)

    def reload(self) -> bool:
        """Read the file again; what it says holds from now on. A file that is wrong changes nothing."""
        before = self.current
        try:
            if before.source != "default" or os.path.lexists(self.path):
                self.current = load_policy(self.path, self._data_dir)
        except ConfigError as error:
            self.problem = error.message
            log.error("the policy was not reloaded, the one before stays in force: %s", error.message)
            return False
        self.problem = ""
        log.info("policy reloaded from %s", self.current.source if self.current.source != "default" else "nowhere: there is no file")
        if self.current.mounts != before.mounts:
            log.warning("the policy's mounts have changed; that takes effect with the next start of the server")
        return True


def open_policies(config: Config) -> Policies:
    """Raises ConfigError when the policy cannot be used."""
    path = os.path.abspath(os.path.expanduser(config.policy_file)) if config.policy_file else os.path.join(config.data_dir, FILE_NAME)
    return Policies(path, config.data_dir, is_required=bool(config.policy_file))


def load_policy(path: str, data_dir: str = "") -> Policy:
    """Raises ConfigError that names file, line and key, and says what to write."""
    text = _read(path)
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: this is not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: this is nested too deeply") from error
    return _Reader(path, text, data_dir).read(tables)


def _read(path: str) -> str:
    """The file's text. A policy that others may write would be theirs: such a file is refused."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path}: the policy is not a file")
            if status.st_uid not in (0, os.geteuid()):
                raise ConfigError(
                    f"{path}: the policy belongs to another user (uid {status.st_uid}); chown it to root or the server's user"
                )
            if status.st_mode & 0o022:
                raise ConfigError(f"{path}: others than its owner may write the policy; chmod go-w {path}")
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: the policy cannot be read: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path}: the policy is larger than {_MAX_BYTES // 2**20} MiB")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} line {line}: this is not UTF-8; save the file as UTF-8") from error


class _Table:
    """One table of the file. Each method takes one key; `end` refuses what no method asked for."""

    def __init__(self, reader: _Reader, name: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise reader.fault(name, "", f"{name} must be a table: write [{name}]")
        self._reader, self.name, self._values = reader, name, value
        self._known: list[str] = []

    def take(self, key: str, default: T, check: Callable[[Any], T]) -> T:
        """The checked value, or the default where the key is not given. `check` raises ValueError with what to write."""
        self._known.append(key)
        if key not in self._values:
            return default
        try:
            value = check(self._values[key])
        except ValueError as error:
            raise self._reader.fault(self.name, key, f"{self.name}.{key}: {error}") from error
        self._reader.given.add(f"{self.name}.{key}")
        return value

    def end(self) -> None:
        for key in self._values:
            if key not in self._known:
                raise self._reader.fault(self.name, key, f"there is no key {key!r} in [{self.name}]{_suggestion(key, self._known)}")


class _Reader:
    """Turns the parsed file into a Policy."""

    def __init__(self, path: str, text: str, data_dir: str) -> None:
        self._path, self._lines = path, text.splitlines()
        self._data_dir = os.path.realpath(data_dir) if data_dir else ""
        self.given: set[str] = set()

    def read(self, tables: Json) -> Policy:
        readers: dict[str, Callable[[Any], Json]] = {
            "egress": self._egress, "models": self._models, "mounts": self._mounts, "limits": self._limits, "hooks": self._hooks,
            "runtimes": self._runtimes, "deploy": self._deploy, "agents": self._agents,
        }  # fmt: skip
        found: Json = {}
        for name, value in tables.items():
            if name not in readers:
                raise self.fault(name, name, f"there is no table [{name}]{_suggestion(name, list(readers))}")
            found.update(readers[name](value))
        return Policy(**found, source=self._path, given=frozenset(self.given))

    def fault(self, table: str, key: str, what: str) -> ConfigError:
        line = self._find_line(table, key)
        return ConfigError(f"{self._path}{f' line {line}' if line else ''}: {what}")

    def _find_line(self, table: str, key: str) -> int | None:
        """Where a key of a table stands, as far as plain TOML can be followed without a parser that tells."""
        current, header_line = "", None
        for number, line in enumerate(self._lines, 1):
            if header := re.match(r"\s*\[\[?\s*(.+?)\s*\]\]?\s*(?:#.*)?$", line):
                current = re.sub(r"[\"']|\s*(?=\.)|(?<=\.)\s*", "", header[1])
                header_line = number if current == table else header_line
                if key and f"{current}.".startswith(f"{table}.{key}."):
                    return number
                continue
            here = rf"[\"']?{re.escape(key)}[\"']?\s*[=.]" if current == table else rf"{re.escape(table)}(?:\.{re.escape(key)})?\s*="
            if re.match(rf"\s*{here}", line):
                return number
        return header_line

    # The tables

    def _egress(self, value: Any) -> Json:
        table, default = _Table(self, "egress", value), EgressPolicy()
        policy = EgressPolicy(
            allow=table.take("allow", default.allow, _rules),
            deny=table.take("deny", default.deny, _rules),
            allow_private=table.take("allow_private", default.allow_private, _networks),
            bandwidth_mb_per_second=table.take("bandwidth_mb_per_second", default.bandwidth_mb_per_second, _number(0)),
            connections=table.take("connections", default.connections, _whole(1, 100_000)),
            total_connections=table.take("total_connections", default.total_connections, _whole(1, 100_000)),
            total_mb=table.take("total_mb", default.total_mb, _whole(0)),
            connect_seconds=table.take("connect_seconds", default.connect_seconds, _number(0.1)),
            idle_seconds=table.take("idle_seconds", default.idle_seconds, _number(1)),
            tunnel_seconds=table.take("tunnel_seconds", default.tunnel_seconds, _number(1)),
        )
        table.end()
        return {"egress": policy}

    def _models(self, value: Any) -> Json:
        table = _Table(self, "models", value)
        found = {
            "models": table.take("allow", _NONE, _patterns),
            "provider_features": table.take("provider_features", _NONE, _strings),
        }
        table.end()
        return found

    def _mounts(self, value: Any) -> Json:
        if not isinstance(value, list):
            raise self.fault("mounts", "", "mounts must be a list of tables: write [[mounts]] above each source and target")
        mounts = tuple(self._mount(entry) for entry in value)
        targets = [mount.target for mount in mounts]
        for target in targets:
            if any(other is not target and (other == target or other.startswith(f"{target}/")) for other in targets):
                raise self.fault("mounts", "target", f"mounts: two of them meet at {target}; give each a place of its own")
        self.given.add("mounts")
        return {"mounts": mounts}

    def _mount(self, value: Any) -> Mount:
        table = _Table(self, "mounts", value)
        source = table.take("source", "", self._source)
        if not source:
            raise self.fault("mounts", "", "mounts: an entry has no source; name a file or folder of this machine")
        target = table.take("target", "", _target) or table.take("source", "", _target)
        table.end()
        return Mount(source, target)

    def _source(self, value: Any) -> str:
        """Raises ValueError for what would show an agent more than tools and data."""
        path = _path(value)
        real = os.path.realpath(path)
        try:
            mode = os.stat(real).st_mode
        except OSError as error:
            raise ValueError(f"{path} cannot be used: {error.strerror}") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{path} is neither a file nor a folder; a socket or a device would lead out of the sandbox")
        data = self._data_dir
        if data and (_is_inside(real, data) or _is_inside(data, real)):
            raise ValueError(f"{path} shares files with the data folder, which holds keys and other sessions; choose another folder")
        if any(_is_inside(real, place) or real == "/" for place in ("/proc", "/sys", "/dev", "/run", "/var/run")):
            raise ValueError(f"{path} would show the host's processes, devices or sockets; choose another folder")
        return path

    def _limits(self, value: Any) -> Json:
        table = _Table(self, "limits", value)
        maximum = self._maximum(table)
        table.end()
        return {"maximum": maximum}

    def _maximum(self, table: _Table) -> Mapping[str, float]:
        found = {name: table.take(name, None, _limit(row)) for name, row in limits.ROWS.items()}
        return MappingProxyType({name: value for name, value in found.items() if value is not None})

    def _hooks(self, value: Any) -> Json:
        table = _Table(self, "hooks", value)
        found = {"hooks": table.take("allow", False, _flag)}
        table.end()
        return found

    def _runtimes(self, value: Any) -> Json:
        table = _Table(self, "runtimes", value)
        found = {"runtimes": table.take("allow", RUNTIMES, _runtimes)}
        table.end()
        return found

    def _deploy(self, value: Any) -> Json:
        table = _Table(self, "deploy", value)
        found = {"deploy": DeployPolicy(table.take("allow", DeployPolicy().allow, _callers))}
        table.end()
        return found

    def _agents(self, value: Any) -> Json:
        names = _Table(self, "agents", value)
        found = {name: names.take(name, AgentPolicy(), _agent_name(name, self._agent)) for name in value}
        return {"agents": MappingProxyType(found)}

    def _agent(self, name: str, value: Any) -> AgentPolicy:
        table = _Table(self, f"agents.{name}", value)
        egress = table.take("egress", None, lambda inner: self._agent_egress(name, inner))
        maximum = table.take("limits", None, lambda inner: self._agent_limits(name, inner))
        table.end()
        return AgentPolicy(egress, maximum or AgentPolicy().maximum)

    def _agent_egress(self, name: str, value: Any) -> tuple[str, ...] | None:
        table = _Table(self, f"agents.{name}.egress", value)
        allow = table.take("allow", None, _rules)
        table.end()
        return allow

    def _agent_limits(self, name: str, value: Any) -> Mapping[str, float] | None:
        table = _Table(self, f"agents.{name}.limits", value)
        maximum = self._maximum(table)
        table.end()
        return maximum


def _suggestion(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


# Checks of single values: each returns the value or raises ValueError with what to write


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError('must be a list of texts, such as ["one", "two"]')
    return tuple(value)


def _patterns(value: Any) -> tuple[str, ...]:
    if not _strings(value):
        raise ValueError("is empty, which would allow no model; name some, or leave the key out to allow every one")
    return _strings(value)


def _rules(value: Any) -> tuple[str, ...]:
    return tuple(parse_rule(item).text for item in _strings(value))


def _networks(value: Any) -> tuple[str, ...]:
    for item in _strings(value):
        parse_network(item)
    return _strings(value)


def _callers(value: Any) -> tuple[str, ...]:
    for item in _strings(value):
        if item not in ("*", LOCAL, STATIC_KEY_ID) and not _KEY_ID.fullmatch(item):
            raise ValueError(
                f'{item!r:.80} is nobody: write "*", "{LOCAL}" (the server\'s own user and root), "{STATIC_KEY_ID}" (the key in its '
                "settings) or the id of an API key, which GET /api/api-keys lists; a label is no proof of who holds a key"
            )
    return _strings(value)


def _runtimes(value: Any) -> tuple[str, ...]:
    for item in _strings(value):
        if item not in RUNTIMES:
            raise ValueError(f"there is no runtime {item!r:.80}; there is {', '.join(RUNTIMES)}")
    if not value:
        raise ValueError(f"is empty, which would let no agent run; there is {', '.join(RUNTIMES)}")
    return _strings(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false, without quotes")
    return value


def _number(minimum: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < minimum:
            raise ValueError(f"must be a number of at least {minimum:g}, without quotes")
        return float(value)

    return check


def _whole(minimum: int, maximum: int = 2**53) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ValueError(f"must be a whole number of at least {minimum}, without quotes")
        return value

    return check


def _limit(row: LimitRow) -> Callable[[Any], float | None]:
    def check(value: Any) -> float:
        return row.check(value)

    return check


def _agent_name(name: str, read: Callable[[str, Any], AgentPolicy]) -> Callable[[Any], AgentPolicy]:
    def check(value: Any) -> AgentPolicy:
        if not _AGENT_NAME.fullmatch(name):
            raise ValueError("is not the name of an agent: 1 to 255 letters, digits, _ or -")
        return read(name, value)

    return check


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or ".." in value.split("/"):
        raise ValueError("must be an absolute path without ..")
    return os.path.normpath(value).replace("//", "/")


def _target(value: Any) -> str:
    path = _path(value)
    if path == "/" or any(_is_inside(path, place) or _is_inside(place, path) for place in _OWN_PLACES):
        raise ValueError(f"{path} is where a sandbox has something of its own ({', '.join(_OWN_PLACES)}); choose another place")
    return path


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
