"""A throw-away scene on a live server: an agent, sessions to attack from, a second tenant, keys and canaries, and the facts about them.

Everything is made through the API, but for what only somebody with the server's data folder can do. Leaving the scene takes it all
away again, as far as the API can: the sessions stay in the list as ended.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import secrets
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

from ash import __version__
from ash.attack import decoys
from ash.attack.probes import ATTACKER, FACTS, LIMITED
from ash.attack.wire import Caller
from ash.errors import AshError, Forbidden
from ash.remote.server import Server

LABEL = "ash attack"
_LOCAL = (
    "data_dir", "canary_file", "marker", "host_socket", "abstract", "port", "other", "other_gateway", "server_pid", "server_start",
)  # fmt: skip
"""Facts about the server's own machine."""
SECRET = "ash-secret-of-the-agent"
"""What the agent's variable `ATTACK_SECRET` begins with: the API may not show it."""
SMALL = {"memoryMb": 128, "cpuPercent": 50, "maxProcesses": 48, "maxFileMb": 8, "diskMb": 48, "maxFiles": 1500}
"""The limits of the session that exhausts things: it must not disturb the others of a live server."""
_EXEC_TIMEOUT_MS = 60_000
_LOOK = """
echo "python=$(command -v python3 || ls /usr/bin/python3.* /usr/local/bin/python3* 2>/dev/null | head -1)"
echo "kernel=$(uname -srm)"
echo "egress=$(test -S /run/ash/egress.sock && echo /run/ash/egress.sock)"
echo "proxy=${HTTPS_PROXY:-$https_proxy}"
echo "gateway=$(test -S /run/ash/gateway.sock && echo /run/ash/gateway.sock)"
echo "file=$(ulimit -H -f)"
"""


class Target(NamedTuple):
    """A server. `data_dir` and `pid` are there when it runs on this machine; `why_far` says why they are not."""

    server: Server
    data_dir: str = ""
    pid: int = 0
    why_far: str = "the server runs on another machine"
    program: str = ""
    """The folder or file of the program on this machine."""


class Ran(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


class Tenant(NamedTuple):
    """Somebody else on the same server, with an agent and a session of their own."""

    name: str
    caller: Caller
    key_id: str
    session: str


class Scene:
    """A context manager. `facts` are what the probes take; `missing` says of each other one why it is not there."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.name = f"ash-attack-{secrets.token_hex(4)}"
        self.facts: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self.sessions: dict[str, str] = {}
        self.health: dict[str, Any] = {}
        self.kernel = ""
        self.key, self.key_id = "", ""
        self.tenant: Tenant | None = None
        self.why_no_tenant = ""
        self.leftovers: list[str] = []
        self._undo = ExitStack()

    def __enter__(self) -> Scene:
        try:
            self._set()
        except BaseException:  # a scene that is half set is taken away like a whole one
            self._undo.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._undo.close()

    def _set(self) -> None:
        first = Caller(self.target.server, self.target.server.api_key or "")
        self.health = first.ask("GET", "/health").json()
        minted = first.ask("POST", "/api/api-keys", {"label": LABEL}).json()
        self.key, self.key_id = str(minted["key"]), str(minted["id"])
        self._later(f"the API key {self.key_id}", lambda: first.ask("DELETE", f"/api/api-keys/{self.key_id}").status)
        self.caller = Caller(self.target.server, self.key)
        self._plant()
        self._deploy(self.caller)
        for role, limits in ((ATTACKER, None), (LIMITED, SMALL)):
            self.sessions[role] = id = self._create(self.caller, limits)
            self._later(f"files of the session {id}", partial(self.run, id, "rm -rf .ash-attack*"))
        self._add_tenant()
        self._look_around()

    def _later(self, what: str, undo: Callable[[], object]) -> None:
        """Take `what` away at the end. Whatever goes wrong then, the rest is taken away as well."""

        def carefully() -> None:
            try:
                undo()
            except (AshError, OSError) as error:
                self.leftovers.append(f"{what}: {error}")

        self._undo.callback(carefully)

    # What is planted

    def _plant(self) -> None:
        data_dir = self.target.data_dir
        if not data_dir:
            self.missing |= dict.fromkeys(_LOCAL, self.target.why_far)
        elif not os.access(data_dir, os.W_OK | os.X_OK):
            self.missing |= dict.fromkeys(_LOCAL, f"{data_dir} belongs to another user: attack as that user or as root")
        else:
            self.facts |= self._undo.enter_context(decoys.planted(data_dir))
            self.facts |= {"server_pid": self.target.pid, "server_start": decoys.start_time(self.target.pid)}
        self.facts |= {"key_head": self.key[:12], "key_tail": self.key[12:]}
        self.missing["key_name"] = "a running server's keyring cannot be given a key; the project's own tests do it before the start"
        self._find_program()

    def _find_program(self) -> None:
        place = os.path.realpath(self.target.program)
        if not self.target.data_dir:
            self.missing["project"] = self.target.why_far
        elif not self.target.program or place.startswith("/usr/"):
            self.missing["project"] = "the program lies under /usr, which every sandbox may read"
        else:
            self.facts["project"] = self.target.program

    def _deploy(self, caller: Caller) -> None:
        """The agent asks for every host that the operator's policy may grant."""
        files = {
            "CLAUDE.md": "You are attacked by nobody.\n",
            ".claude/settings.json": '{"sandbox": {"network": {"allowedDomains": ["*", "*:*"]}}}',
        }
        encoded = [{"path": path, "content": base64.b64encode(text.encode()).decode()} for path, text in files.items()]
        env = {"ATTACK_SECRET": f"{SECRET}-{self.name}"}
        caller.ask("POST", "/api/agents", {"name": self.name, "files": encoded, "env": env}).json()
        self._later(f"the agent {self.name}", lambda: caller.ask("DELETE", f"/api/agents/{self.name}"))

    def _create(self, caller: Caller, limits: dict[str, int] | None = None) -> str:
        """A new session, ended at the end. What the operator's policy does not allow of the limits or the model is left out."""
        given: dict[str, Any] = {"limits": limits} if limits else {}
        tries: tuple[dict[str, Any], ...] = ({**given, "model": "offline"}, {"model": "offline"}, given, {})
        answers = (caller.ask("POST", "/api/sessions", {"agent": self.name, **options}, timeout=90) for options in tries)
        answer = next((answer for answer in answers if answer.status not in (400, 403)), None)
        if answer is None:
            raise Forbidden("no session could be made for the attack: the operator's policy allows none of the options tried")
        id = str(answer.json()["session"]["id"])
        self._later(f"the session {id}", lambda: caller.ask("DELETE", f"/api/sessions/{id}", timeout=60).json())
        return id

    def add_session(self) -> str:
        """One more, for a probe that may end it."""
        return self._create(self.caller)

    # The second tenant

    def _add_tenant(self) -> None:
        database = os.path.join(self.target.data_dir, "ash.db")
        if not self.target.data_dir:
            self.why_no_tenant = self.target.why_far
        elif not os.access(database, os.R_OK | os.W_OK):
            self.why_no_tenant = f"{database} belongs to another user: attack as that user or as root"
        elif self.health.get("version") != __version__:
            self.why_no_tenant = f"the server is ash {self.health.get('version')}, this is {__version__}: use the server's own version"
        else:
            self._open_tenant(database)
        if self.tenant is not None:
            self._note_other(self.tenant.caller, self.tenant.session)
        elif self.target.data_dir and "data_dir" in self.facts:
            self._note_other(self.caller, self._create(self.caller))

    def _open_tenant(self, database: str) -> None:
        name = f"attack-{secrets.token_hex(4)}"
        id, key = asyncio.run(_add_key(database, name))
        self._later(f"the API key {id} of the tenant {name}", lambda: asyncio.run(_delete_key(database, name, id)))
        caller = Caller(self.target.server, key)
        self._deploy(caller)
        self.tenant = Tenant(name, caller, id, self._create(caller))

    def _note_other(self, caller: Caller, id: str) -> None:
        """The other session's files and its gateway, as they lie on the host."""
        self.run(id, "echo secret > secret; echo secret > ~/secret", caller=caller)
        folder = os.path.join(self.target.data_dir, "sessions", id)
        sandbox = str(caller.ask("GET", f"/api/sessions/{id}").json()["session"].get("sandboxId", ""))
        socket = os.path.join(self.target.data_dir, "run", sandbox, "gw", "gateway.sock")
        self.facts["other"] = folder
        if os.path.exists(socket):
            self.facts["other_gateway"] = socket
        else:
            self.missing["other_gateway"] = "the other session's gateway is not found on the host"

    # What is found inside

    def run(self, id: str, command: str, *, caller: Caller | None = None) -> Ran:
        """A command in a session's sandbox. Raises AshError when the server cannot run it."""
        path = f"/api/sessions/{id}/exec"
        answer = (caller or self.caller).ask("POST", path, {"command": command, "timeout": _EXEC_TIMEOUT_MS}, timeout=90)
        found = answer.json()
        return Ran(int(found["exitCode"]), str(found["stdout"]), str(found["stderr"]))

    def _look_around(self) -> None:
        seen = dict(line.partition("=")[::2] for line in self.run(self.sessions[ATTACKER], _LOOK).stdout.splitlines())
        small = dict(line.partition("=")[::2] for line in self.run(self.sessions[LIMITED], _LOOK).stdout.splitlines())
        self.kernel = seen.get("kernel", "")
        self._note("python", seen.get("python"), "there is no Python in the sandbox")
        self._note("gateway", seen.get("gateway") or self._own_gateway(), "the gateway's socket is not found")
        proxy = re.sub(r"^https?://|/$", "", seen.get("proxy", ""))
        self._note("egress", seen.get("egress") or proxy, "there is no proxy in the sandbox: nothing but the models can be reached")
        provider = self.health.get("model", {}).get("provider")
        self._note("provider", "" if provider == "offline" else provider, "the built-in demo model wants no key")
        is_traced = any("--sandbox-ptrace" in warning for warning in self.health.get("warnings", []))
        self._note("no_ptrace", "" if is_traced else "yes", "the operator lets programs trace each other (--sandbox-ptrace)")
        self._note_limits(is_small=small.get("file") == str(SMALL["maxFileMb"] * 1024))

    def _own_gateway(self) -> str:
        """Without a sandbox the session's gateway is where the host has it."""
        session = self.caller.ask("GET", f"/api/sessions/{self.sessions[ATTACKER]}").json()["session"]
        path = os.path.join(self.target.data_dir, "run", str(session.get("sandboxId", "")), "gw", "gateway.sock")
        return path if self.target.data_dir and self.health.get("isolation") == "none" and os.path.exists(path) else ""

    def _note(self, name: str, value: str | None, why_not: str) -> None:
        if value:
            self.facts[name] = value
        else:
            self.missing[name] = why_not

    def _note_limits(self, *, is_small: bool) -> None:
        """The limits of the limited session: its own where the server took them, else what the server says of itself."""
        told = {name: str(text) for name, text in self.health.get("limits", {}).items()}
        rows = (
            ("file_bytes", "fileSize", "maxFileMb", 1 << 20), ("memory_bytes", "memory", "memoryMb", 1 << 20),
            ("processes", "processes", "maxProcesses", 1), ("group_memory_bytes", "memory", "memoryMb", 1 << 20),
            ("cpu_percent", "cpu", "cpuPercent", 1), ("disk_bytes", "disk", "diskMb", 1 << 20),
        )  # fmt: skip
        for name, row, wire, unit in rows:
            text = told.get(row, "not limited: this server does not say")
            number = re.match(r"\d+", text.replace(",", ""))
            if number is None or (name == "group_memory_bytes" and "cgroup" not in text):
                self.missing[name] = f"{row} on this host: {text}"
            else:
                self.facts[name] = (SMALL[wire] if is_small else int(number.group())) * unit
        files = re.search(r"(\d+) files", told.get("disk", ""))
        count = (str(SMALL["maxFiles"]) if is_small else files[1]) if files else ""
        self._note("files", count, f"files on this host: {told.get('disk', 'not limited')}")
        if tmp := re.match(r"\d+", told.get("tmp", "")):
            self.facts["tmp_bytes"] = max(16, SMALL["memoryMb"] // 4) << 20 if is_small else int(tmp.group()) << 20
        else:
            self.missing["tmp_bytes"] = "/tmp has no limit of its own on this host"

    def why_not(self, facts: tuple[str, ...]) -> str:
        """Why a probe that takes these facts cannot be tried; empty when it can."""
        return next((self.missing.get(name, f"there is no {name}") for name in FACTS if name in facts and name not in self.facts), "")

    def quote(self, name: str) -> str:
        return shlex.quote(str(self.facts[name]))


async def _add_key(database: str, tenant: str) -> tuple[str, str]:
    """A key of another tenant, which the API does not give. Loads the server's own modules only here."""
    from ash.keys import Keys
    from ash.store import Store

    async with Store(database) as store:
        record, key = await Keys(store).create(tenant, LABEL)
        return record.id, key


async def _delete_key(database: str, tenant: str, id: str) -> None:
    from ash.keys import Keys
    from ash.store import Store

    async with Store(database) as store:
        await Keys(store).delete(tenant, id)
