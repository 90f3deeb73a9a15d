"""Every setting of the server, once: name, type, default, help. The only module that reads the environment.

A row of SETTINGS gives the flag (`--warm-sandboxes`), the variable (`ASH_WARM_SANDBOXES`), the line in the docs and in
`ash config`. A value that is unknown or malformed stops the start with the name and the reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from ash.errors import ConfigError


class Secret:
    """A value that must not appear in a log, a repr or a traceback; `reveal()` gives it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret('***')"

    __str__ = __repr__


class Setting(NamedTuple):
    """One setting. `kind` is int, float, bool, str, Secret, or a tuple of the words allowed."""

    name: str
    kind: Any
    default: Any
    help: str
    variable: str = ""
    minimum: float | None = None
    maximum: float | None = None

    @property
    def env(self) -> str:
        return self.variable or f"ASH_{self.name.upper()}"

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


SETTINGS = (
    Setting("host", str, "127.0.0.1", "address to listen on; beyond loopback every caller needs a key"),
    Setting("port", int, 4100, "port to listen on; 0 takes a free one", minimum=0, maximum=65535),
    Setting("data_dir", str, "~/.ash", "folder that holds everything the server keeps"),
    Setting("auth", ("local", "always"), "local", "local: the server's own user and root need no key over loopback; always: everyone does"),
    Setting("api_key", Secret, None, "an API key that is always accepted, besides those in the database"),
    Setting("allowed_origins", str, "", "browser origins that may call the API, separated by commas"),
    Setting("sandbox", ("bwrap", "none"), "bwrap", "how agents are isolated; none runs them unprotected as the server's user"),
    Setting("sandbox_python", str, "", "interpreter for the sandboxes (3.10 or newer); found by itself when empty"),
    Setting("rootfs", str, "", "folder with a root file system that agents see instead of this machine's programs"),
    Setting("sandbox_ptrace", bool, False, "let agents' programs trace each other, as debuggers do, within their own sandbox"),
    Setting("cgroup_root", str, "", "cgroup v2 folder that Ash may use for its sandboxes; found by itself when empty"),
    Setting("warm_sandboxes", int, 2, "sandboxes kept ready before anyone asks", minimum=0),
    Setting("max_sandboxes", int, 1000, "most sandboxes alive at once, warm ones included", minimum=1),
    Setting("max_waiting_starts", int, 100, "most sessions that wait for others to start; further ones are answered 429", minimum=1),
    Setting("min_free_memory_mb", int, 256, "MiB of memory to keep free: below, no session is started and idle ones give way", minimum=0),
    Setting(
        "min_free_disk_mb", int, 512, "MiB of disk to keep free: below, no session is created; below half, no sandbox writes", minimum=0
    ),
    Setting("memory_mb", int, 2048, "memory of one sandbox in MiB", minimum=32),
    Setting("cpu_percent", int, 100, "CPU of one sandbox; 100 is one core", minimum=1),
    Setting("max_processes", int, 256, "processes and threads of one sandbox", minimum=8),
    Setting("max_file_mb", int, 1024, "largest file a sandbox may write, in MiB", minimum=1),
    Setting("disk_mb", int, 10240, "disk of one session, workspace and home together, in MiB; 0 sets no limit", minimum=0),
    Setting("max_files", int, 500000, "files and folders of one session; 0 sets no limit", minimum=0),
    Setting("cpu_weight", int, 100, "share of the CPU that a sandbox gets when all want it", minimum=1, maximum=10000),
    Setting("io_mb_per_second", int, 0, "MiB a sandbox may read and as many it may write per second; 0 sets no limit", minimum=0),
    Setting("tool_timeout", float, 600.0, "most seconds that one tool call may take", minimum=1),
    Setting("policy_file", str, "", "the operator's policy; `policy.toml` in the data folder, if there is one, when empty"),
    Setting("master_key_file", str, "", "file with the key that seals stored credentials; `master.key` in the data folder when empty"),
    Setting("egress_ca_file", str, "", "certificates, in PEM, of private authorities that hosts with credentials may be signed by"),
    Setting("idle_timeout", float, 1800.0, "seconds without a turn after which a session gives up its processes", minimum=0.1),
    Setting("orphan_timeout", float, 60.0, "seconds after which a bridge that lost its server ends itself", minimum=1),
    Setting("start_timeout", float, 20.0, "seconds a sandbox may take to become ready", minimum=0.1),
    Setting("turn_timeout", float, 3600.0, "seconds one turn may take in all", minimum=1),
    Setting("max_turn_mb", int, 256, "MiB of events one turn may record before it is ended", minimum=1),
    Setting("hang_timeout", float, 660.0, "seconds a running turn's bridge may be silent before it counts as hung", minimum=1),
    Setting("max_body_mb", int, 256, "largest request body in MiB; an agent upload is base64, so 3/4 of this is content", minimum=1),
    Setting("max_agent_mb", int, 190, "largest agent folder in MiB, unpacked", minimum=1),
    Setting("max_workspace_mb", int, 2048, "largest workspace archive that is taken or given, in MiB of unpacked files", minimum=1),
    Setting("max_agent_files", int, 20000, "most files in an agent folder", minimum=1),
    Setting("keepalive_interval", float, 15.0, "seconds between comments on a silent stream", minimum=0.1),
    Setting("shutdown_timeout", float, 10.0, "seconds running turns get to finish when the server stops", minimum=0),
    Setting("model", str, "", "model for agents that name none; `offline` is the built-in demo model"),
    Setting("offline_script", str, "", "JSON file of replies for the offline model"),
    Setting("log_level", ("debug", "info", "warning", "error"), "info", "least severe message that is logged"),
    Setting("anthropic_api_key", Secret, None, "key for the Anthropic API", "ANTHROPIC_API_KEY"),
    Setting("anthropic_auth_token", Secret, None, "bearer token for the Anthropic API or a compatible server", "ANTHROPIC_AUTH_TOKEN"),
    Setting("anthropic_base_url", str, "https://api.anthropic.com", "base URL of a compatible server", "ANTHROPIC_BASE_URL"),
    Setting("use_bedrock", bool, False, "reach the models through Amazon Bedrock (AWS_* variables)", "CLAUDE_CODE_USE_BEDROCK"),
    Setting(
        "use_vertex",
        bool,
        False,
        "reach the models through Vertex AI (CLOUD_ML_REGION, ANTHROPIC_VERTEX_PROJECT_ID)",
        "CLAUDE_CODE_USE_VERTEX",
    ),
)

CLIENT_VARIABLES = ("ASH_SERVER_URL", "ASH_HOME", "ASH_CACHE_DIR")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


class Config(SimpleNamespace):
    """The settings in force, one attribute per row of SETTINGS; `sources` says where each came from."""

    sources: dict[str, str]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def load_config(flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Settings from `flags` (by name; None means not given), then the environment, then the defaults.

    Raises ConfigError for an unknown flag or `ASH_` variable, and for a value that does not fit its row.
    """
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    known = {setting.name: setting for setting in SETTINGS}
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}; the settings are {', '.join(known)}")
    variables = {setting.env for setting in SETTINGS}.union(CLIENT_VARIABLES)
    for variable in environ:
        if variable.startswith("ASH_") and variable not in variables:
            raise ConfigError(f"unknown variable {variable}; `ash config` lists the variables that exist")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in SETTINGS:
        if setting.name in given:
            values[setting.name], sources[setting.name] = _parse(setting, given[setting.name], setting.flag), "flag"
        elif environ.get(setting.env):
            values[setting.name], sources[setting.name] = _parse(setting, environ[setting.env], setting.env), setting.env
        else:
            values[setting.name], sources[setting.name] = setting.default, "default"
    if not values["data_dir"]:
        raise ConfigError("--data-dir is empty; name a folder")
    values["data_dir"] = os.path.abspath(os.path.expanduser(values["data_dir"]))
    return Config(sources=sources, **values)


def _parse(setting: Setting, raw: Any, where: str) -> Any:
    text = str(raw).strip()
    if setting.kind is Secret:
        return raw if isinstance(raw, Secret) else Secret(text)
    if setting.kind is str:
        return text
    if setting.kind is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise ConfigError(f"{where}={text!r}: must be one of 1, true, yes, on, 0, false, no, off")
    if isinstance(setting.kind, tuple):
        if text in setting.kind:
            return text
        raise ConfigError(f"{where}={text!r}: must be one of {', '.join(setting.kind)}")
    try:
        number = setting.kind(text)
    except ValueError as error:
        raise ConfigError(f"{where}={text!r}: must be {'a whole number' if setting.kind is int else 'a number'}") from error
    if setting.minimum is not None and not number >= setting.minimum:
        raise ConfigError(f"{where}={text!r}: must be at least {setting.minimum:g}")
    if setting.maximum is not None and not number <= setting.maximum:
        raise ConfigError(f"{where}={text!r}: must be at most {setting.maximum:.0f}")
    return number


def client_environ(name: str) -> str | None:
    """One of CLIENT_VARIABLES or a setting's variable, as the command line reads it; None when unset or empty."""
    return os.environ.get(name) or None


def child_environ(names: tuple[str, ...], extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """An environment for a child process built from nothing: only `names` are passed on, then `extra`."""
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return {**kept, **(extra or {})}


def server_environ(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server that the command line starts: its own, where the server's settings are, then `extra`."""
    return {**os.environ, **extra}


def markdown() -> str:
    """The table of docs/settings.md."""
    lines = ["| flag | variable | default | what it does |", "|---|---|---|---|"]
    for row in SETTINGS:
        words = " or ".join(row.kind) if isinstance(row.kind, tuple) else ""
        default = "" if row.default in (None, "") else f"`{row.default}`"
        lines.append(f"| `{row.flag}`{f' ({words})' if words else ''} | `{row.env}` | {default} | {row.help} |")
    return "\n".join(lines)


def drop_secrets() -> None:
    """Take the secrets out of this process's environment once they are read, so that nothing started from here inherits one."""
    for setting in SETTINGS:
        if setting.kind is Secret:
            os.environ.pop(setting.env, None)
