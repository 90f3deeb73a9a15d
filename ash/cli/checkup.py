"""What an installation needs besides the sandbox: data folder, database, port, model provider, policy, certificates, Python itself.

Each check gives findings as those of `ash.isolation.checks`. The database is opened read-only; nothing is sent unless `online`.
"""

from __future__ import annotations

import calendar
import os
import resource
import socket
import sqlite3
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from urllib.parse import quote

from ash import __version__
from ash.cli import local
from ash.config import Config
from ash.errors import ConfigError
from ash.isolation.machine import FAIL, OK, UNKNOWN, WARN, Finding, check_clock, nearest

_DESCRIPTORS_PER_SANDBOX = 12
_LEAST_DESCRIPTORS = 4096
_ONLINE_TIMEOUT = 15.0
_OLDEST_SQLITE = (3, 35, 0)


def check_installation(config: Config, server: local.LocalServer | None, *, online: bool) -> Iterator[Finding]:
    yield from check_python()
    yield from check_data_dir(config.data_dir)
    yield from check_database(config.data_dir)
    yield check_port(config, server)
    yield check_descriptors(config.max_sandboxes)
    yield from check_provider(config, online=online)
    yield check_policy(config)
    yield check_certificates(config)
    yield check_server(server)


def check_python() -> Iterator[Finding]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    try:
        import ctypes  # noqa: F401
    except ImportError:
        yield Finding("python", FAIL, f"Python {version} without ctypes", "use a complete Python (Debian: `apt-get install python3`)")
    else:
        yield Finding("python", OK, f"Python {version} with ctypes, {sys.executable}")
    found = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        yield Finding("sqlite", FAIL, f"SQLite {found}", "use a Python with SQLite 3.35 or newer")
    else:
        yield Finding("sqlite", OK, f"SQLite {found}")


# The data folder


def check_data_dir(path: str) -> Iterator[Finding]:
    if not os.path.isdir(path):
        parent = nearest(path)
        if os.path.lexists(path) or not os.access(parent, os.W_OK | os.X_OK):
            yield Finding("data-folder", FAIL, f"{path} cannot be made by this user", "choose another folder with --data-dir")
        else:
            yield Finding("data-folder", OK, f"{path} will be made at the first start")
        return
    about = os.stat(path)
    yield _judge_folder(path, about)
    longest = len(os.fsencode(os.path.join(path, "run", "0" * 36, "gw", "gateway.sock")))
    how = "as they are" if longest <= 107 else "through a descriptor, as their paths are longer than 107 bytes"
    yield Finding("sockets", OK, f"the sockets below {path} can be reached {how}")


def _judge_folder(path: str, about: os.stat_result) -> Finding:
    mode = f"{stat.S_IMODE(about.st_mode):04o}"
    if not os.access(path, os.W_OK | os.X_OK):
        return Finding("data-folder", UNKNOWN, f"{path} belongs to uid {about.st_uid}", "run `ash doctor` as that user or as root")
    if about.st_uid not in (os.geteuid(), 0) and os.geteuid():
        return Finding("data-folder", FAIL, f"{path} belongs to uid {about.st_uid}", f"run `chown {os.geteuid()} {path}` as root")
    if about.st_mode & 0o022:
        return Finding("data-folder", FAIL, f"others may write in {path} (mode {mode})", f"run `chmod go-w {path}`")
    if about.st_mode & 0o044:
        return Finding("data-folder", WARN, f"others may list {path} (mode {mode})", f"run `chmod go-r {path}`")
    return Finding("data-folder", OK, f"{path}, mode {mode}, can be written")


def check_database(data_dir: str) -> Iterator[Finding]:
    """WAL tried beside the database; the database itself only read. The clock is compared with what was last written."""
    place = nearest(data_dir)
    if os.access(place, os.W_OK | os.X_OK):
        yield _try_wal(place)
    path = os.path.join(data_dir, "ash.db")
    if not os.path.exists(path):
        yield Finding("database", OK, "there is none yet")
        yield check_clock()
        return
    try:
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, timeout=5)) as database:
            [last] = database.execute("SELECT max(last_active_at) FROM sessions").fetchone()
    except sqlite3.Error as error:
        is_hidden = not os.access(path, os.R_OK)
        fix = "run `ash doctor` as the server's user" if is_hidden else "restore the data folder from a backup, or look at the disk"
        yield Finding("database", UNKNOWN if is_hidden else FAIL, f"{path} cannot be read: {error}", fix)
        yield check_clock()
        return
    yield Finding("database", OK, f"{path}, {os.path.getsize(path) >> 20} MiB, can be read")
    yield check_clock(_seconds(last) if last else None)


def _seconds(moment: str) -> float | None:
    with suppress(ValueError):
        return float(calendar.timegm(time.strptime(moment[:19], "%Y-%m-%dT%H:%M:%S")))
    return None


def _try_wal(folder: str) -> Finding:
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch,
            closing(sqlite3.connect(os.path.join(scratch, "try.db"))) as database,
        ):
            [mode] = database.execute("PRAGMA journal_mode = WAL").fetchone()
            database.execute("CREATE TABLE t (x)")
            database.commit()
    except (sqlite3.Error, OSError) as error:
        return Finding("database-log", FAIL, f"SQLite does not work in {folder}: {error}", "choose a local disk with --data-dir")
    if mode != "wal":
        return Finding("database-log", FAIL, f"SQLite's WAL does not work in {folder}", "choose a local disk with --data-dir")
    return Finding("database-log", OK, f"SQLite's WAL works in {folder}")


# The server's surroundings


def check_port(config: Config, server: local.LocalServer | None) -> Finding:
    at = f"port {config.port} on {config.host}"
    if server is not None and server.url.endswith(f":{config.port}"):
        return Finding("port", OK, f"{at}: this data folder's server listens there")
    if not config.port:
        return Finding("port", OK, "any free port")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((config.host or "0.0.0.0", config.port))
    except OSError as error:
        if server is not None:
            return Finding("port", OK, f"{at} is taken; this data folder's server listens at {server.url}")
        return Finding(
            "port", FAIL, f"{at} cannot be used: {error.strerror}", "stop the program that has it, or choose another with --port"
        )
    return Finding("port", OK, f"{at} is free")


def check_descriptors(max_sandboxes: int) -> Finding:
    """The server raises its own limit as far as it may."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= _DESCRIPTORS_PER_SANDBOX * max_sandboxes:
        return Finding("descriptors", OK, f"up to {'any number' if hard == resource.RLIM_INFINITY else f'{hard:,}'} of open files")
    found = f"{hard:,} open files are enough for about {hard // _DESCRIPTORS_PER_SANDBOX} sandboxes of {max_sandboxes}"
    fix = "start the server with a higher `ulimit -Hn`, or with LimitNOFILE= in its systemd unit"
    return Finding("descriptors", WARN if hard < _LEAST_DESCRIPTORS else OK, found, fix if hard < _LEAST_DESCRIPTORS else "")


def check_server(server: local.LocalServer | None) -> Finding:
    if server is None:
        return Finding("server", OK, "none runs on this data folder")
    if server.version != __version__:
        fix = "`ash stop` and `ash start`, or use the program that the server was started with"
        return Finding("server", WARN, f"{server.url} (pid {server.pid}) is ash {server.version}, this is {__version__}", fix)
    return Finding("server", OK, f"{server.url} (pid {server.pid}) runs, ash {server.version}")


# Models, policy, certificates


def check_provider(config: Config, *, online: bool) -> Iterator[Finding]:
    key = config.anthropic_api_key or config.anthropic_auth_token
    address = config.anthropic_base_url
    if config.model == "offline":
        yield Finding("provider", OK, "the built-in demo model is chosen")
    elif config.use_bedrock or config.use_vertex:
        yield Finding("provider", OK, f"{'Amazon Bedrock' if config.use_bedrock else 'Vertex AI'}; its credentials are not looked at")
    elif not key and address.rstrip("/") == "https://api.anthropic.com":
        yield Finding("provider", WARN, "no key: the built-in demo model would answer", "set ANTHROPIC_API_KEY where the server is started")
    else:
        yield Finding("provider", OK, f"{address}, {'with a key' if key else 'without a key'}")
        if online:
            yield _ask_provider(config)


def _ask_provider(config: Config) -> Finding:
    """One request that costs nothing: the list of models."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    request = Request(f"{config.anthropic_base_url.rstrip('/')}/v1/models?limit=1", headers={"anthropic-version": "2023-06-01"})
    if config.anthropic_api_key:
        request.add_header("x-api-key", config.anthropic_api_key.reveal())
    elif config.anthropic_auth_token:
        request.add_header("Authorization", f"Bearer {config.anthropic_auth_token.reveal()}")
    try:
        with urlopen(request, timeout=_ONLINE_TIMEOUT):
            return Finding("provider-online", OK, "the provider takes the key")
    except HTTPError as error:
        with error:
            if error.code in (401, 403):
                return Finding("provider-online", FAIL, f"the provider refuses the key ({error.code})", "set the right ANTHROPIC_API_KEY")
            return Finding("provider-online", WARN, f"the provider answers {error.code}", "try again later")
    except (URLError, OSError, ValueError) as error:
        return Finding(
            "provider-online", FAIL, f"the provider cannot be reached: {error}", "check the network, proxy and ANTHROPIC_BASE_URL"
        )


def check_policy(config: Config) -> Finding:
    from ash.policy import open_policies

    try:
        policy = open_policies(config).current
    except ConfigError as error:
        return Finding("policy", FAIL, error.message, "mend the file; `ash policy --check FILE` reads it again")
    return Finding("policy", OK, "no policy file" if policy.source == "default" else f"{policy.source} can be used")


def check_certificates(config: Config) -> Finding:
    """What the egress proxy verifies servers with."""
    import ssl

    fix = "install the package ca-certificates, or name a file with --egress-ca-file"
    if config.egress_ca_file:
        try:
            ssl.create_default_context(cafile=config.egress_ca_file)
        except (OSError, ssl.SSLError) as error:
            return Finding(
                "certificates", FAIL, f"{config.egress_ca_file} cannot be used: {error}", "name a file of certificates in PEM form"
            )
    paths = ssl.get_default_verify_paths()
    roots = len(ssl.create_default_context().get_ca_certs())
    if not roots and not (paths.capath and os.listdir(paths.capath)):
        return Finding("certificates", WARN, "no root certificates are installed: no server outside can be verified", fix)
    return Finding("certificates", OK, f"{roots or 'a folder of'} root certificates")
