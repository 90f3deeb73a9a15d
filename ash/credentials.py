"""Credentials: secrets that Ash uses upstream for agents, sealed in the database, opened only for the session that may use them.

The secret goes to the gateway (a model's key) or to the egress proxy (a header for one host), never into a sandbox, an answer or a
log. The library that seals is loaded on first need, in a thread.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ash import models
from ash.agents import check_env
from ash.config import Secret
from ash.egress.injection import HTTPS, VALUE, BoundCredential, split_host
from ash.egress.interception import CA_VARIABLES
from ash.egress.rules import parse_host, shown
from ash.errors import Conflict, CredentialNotFound, CredentialUnusable, InvalidRequest
from ash.models import Credential, Session
from ash.store import Store

log = logging.getLogger(__name__)

ANTHROPIC, OPENAI, BEDROCK, CUSTOM = TYPES = ("anthropic", "openai", "bedrock", "custom")
MASTER_KEY_FILE = "master.key"
MIN_SECRET = 8
"""Characters. What is shorter could not be kept from coming back in answers without spoiling them."""
MAX_SECRET = 16 * 1024
MAX_OF_TENANT = 1000
MAX_OF_AGENT = 32
"""Each of them is opened for every session of the agent, and looked for in what hosts answer."""
INACCESSIBLE = "Invalid or inaccessible credential"

_MIN_KEY = 32
_NONCE_BYTES = 12
_FORMAT = b"\x01"
_PRINTABLE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_FRAMING = frozenset((
    "host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect", "accept-encoding", "keep-alive",
    "proxy-authorization", "proxy-connection", "proxy-authenticate",
))  # fmt: skip
"""Headers that say how a message is read; a secret in one would break it."""


_RESTORE = "Put it back from your backup, or delete the credentials and store them again"
IsRevoked = Callable[[], bool]
Pairs = list[tuple[Credential, Secret]]


class Binding(NamedTuple):
    """Where a credential is put in."""

    agent: str | None = None
    host: str | None = None
    header: str | None = None
    template: str | None = None
    variable: str | None = None


NOWHERE = Binding()


class Opened(NamedTuple):
    """What one session may use."""

    model_key: Secret | None
    is_revoked: IsRevoked
    """Of the model's key."""
    bound: tuple[BoundCredential, ...]


class Credentials:
    """`master_key_file` is empty for the one in the data folder, which is made when the first credential is stored."""

    def __init__(self, store: Store, data_dir: str, master_key_file: str = "") -> None:
        self._store = store
        self._key_path = master_key_file or os.path.join(data_dir, MASTER_KEY_FILE)
        self._is_own_key = not master_key_file
        self._key: bytes | None = None
        self._lock, self._storing = asyncio.Lock(), asyncio.Lock()
        self._deleted: set[str] = set()

    # Records

    async def create(self, tenant_id: str, type: str, secret: Secret, label: str = "", binding: Binding = NOWHERE) -> Credential:
        """Store a secret. Raises InvalidRequest, Conflict, CredentialUnusable."""
        bound = _checked(type, binding)
        _check_secret(type, secret)
        if bound.agent is not None:
            _ = await self._store.get_agent(tenant_id, bound.agent)
        credential = Credential(models.new_id(), tenant_id, type, label, *bound, models.now())
        async with self._storing:
            stored = await self._store.list_credentials(tenant_id)
            _check_number(credential, stored)
            _check_unambiguous(credential, stored)
            key = await self._master_key(create=True)
            await self._store.add_credential(credential, await asyncio.to_thread(_seal, key, credential, secret))
        return credential

    async def list(self, tenant_id: str) -> list[Credential]:
        return await self._store.list_credentials(tenant_id)

    async def delete(self, tenant_id: str, id: str) -> None:
        """From here on it is used no more, in running sessions neither."""
        await self._store.delete_credential(tenant_id, id)
        self._deleted.add(id)

    # Use

    async def check(self, tenant_id: str, agent: str, id: str) -> None:
        """Raise InvalidRequest when no session of the agent can be given this credential."""
        for credential, _ in await self._store.find_credentials(tenant_id, agent, id):
            if credential.id == id:
                if not _is_usable(credential):
                    raise InvalidRequest(_not_usable(credential))
                return
        raise InvalidRequest(INACCESSIBLE)

    async def open(self, session: Session) -> Opened:
        """What the session may use: the credential that it names, and those of its agent. Raises CredentialNotFound, CredentialUnusable."""
        named = session.options.get("credentialId")
        found = await self._store.find_credentials(session.tenant_id, session.agent_name, named)
        if named and all(credential.id != named for credential, _ in found):
            raise CredentialNotFound(f"The credential {named} of this session was deleted; create a new session with another one")
        found = _without_overruled([pair for pair in found if _is_usable(pair[0])], named)
        if not found:
            return Opened(None, _never, ())
        key = await self._master_key(create=False)
        opened = await asyncio.to_thread(lambda: [(credential, _unseal(key, credential, sealed)) for credential, sealed in found])
        await self._store.touch_credentials([credential.id for credential, _ in found])
        return self._sorted(key, opened)

    def _sorted(self, key: bytes, opened: Pairs) -> Opened:
        bound = tuple(
            BoundCredential(
                credential.id, credential.host, credential.header or "", credential.template,
                _placeholder(key, credential), credential.variable, secret, self._revoked(credential.id),
            )
            for credential, secret in opened if credential.host is not None
        )  # fmt: skip
        for credential, secret in opened:
            if credential.host is None:
                return Opened(secret, self._revoked(credential.id), bound)
        return Opened(None, _never, bound)

    def _revoked(self, id: str) -> IsRevoked:
        return lambda: id in self._deleted

    # The master key

    async def _master_key(self, *, create: bool) -> bytes:
        async with self._lock:
            if self._key is None:
                is_first = create and self._is_own_key and not await self._store.count_credentials()
                self._key = await asyncio.to_thread(self._read_key, is_first)
            return self._key

    def _read_key(self, is_first: bool) -> bytes:
        if is_first and not os.path.exists(self._key_path):
            _write_key(self._key_path)
        try:
            with open(self._key_path, "rb") as file:
                text, mode = file.read(4096).strip(), os.fstat(file.fileno()).st_mode
        except FileNotFoundError as error:
            raise CredentialUnusable(f"{self._name} is missing, without which no stored credential can be opened. {_RESTORE}") from error
        except OSError as error:
            raise CredentialUnusable(f"{self._name} cannot be read: {error.strerror}. Let the server's user read it") from error
        if len(text) < _MIN_KEY:
            raise CredentialUnusable(
                f"{self._name} is too short: {_MIN_KEY} characters are the least; `openssl rand -base64 32` makes a good one"
            )
        if stat.S_IMODE(mode) & 0o007:
            log.warning("%s can be read by every user of this machine: take that right away (chmod o-rwx)", self._name)
        return text

    @property
    def _name(self) -> str:
        return "master.key in the data folder" if self._is_own_key else "The file that master_key_file names"


def _never() -> bool:
    return False


def _write_key(path: str) -> None:
    """Whole or not at all, and readable by nobody else from the first moment. One that is there already stays."""
    fresh = f"{path}.{secrets.token_hex(8)}"
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(fresh, path)
    except OSError as error:
        raise CredentialUnusable(f"{MASTER_KEY_FILE} cannot be written in the data folder: {error.strerror}") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(fresh)


def _derive(key: bytes, purpose: str) -> bytes:
    return hmac.digest(key, purpose.encode(), "sha256")


def _sealed_with(credential: Credential) -> bytes:
    """All that a secret must not be moved away from: a changed host would send it elsewhere."""
    return json.dumps(credential._replace(last_used_at=None), separators=(",", ":")).encode()


def _seal(key: bytes, credential: Credential, secret: Secret) -> bytes:
    nonce = os.urandom(_NONCE_BYTES)
    return _FORMAT + nonce + bytes(_cipher(key).encrypt(nonce, secret.reveal().encode(), _sealed_with(credential)))


def _unseal(key: bytes, credential: Credential, sealed: bytes) -> Secret:
    cipher = _cipher(key)
    from cryptography.exceptions import InvalidTag

    nonce, text = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
    try:
        if sealed[:1] != _FORMAT:
            raise InvalidTag
        return Secret(cipher.decrypt(nonce, text, _sealed_with(credential)).decode())
    except InvalidTag as error:
        raise CredentialUnusable(
            f"The credential {credential.id} cannot be opened: it was sealed with another master key, or its row was changed. "
            "Put the former key back, or delete the credential and store it again"
        ) from error


def _cipher(key: bytes) -> Any:
    """AES-256-GCM. Loads some megabytes of library the first time."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise CredentialUnusable(f"Credentials need the Python package cryptography, which cannot be used here: {error}") from error
    return AESGCM(_derive(key, "ash credential seal 1"))


def _placeholder(key: bytes, credential: Credential) -> str:
    """The same in every session, fork and successor: workspaces keep it, as in the URL of a clone. It opens nothing by itself."""
    text = json.dumps([credential.tenant_id, credential.host, (credential.header or "").lower()])
    return "ash-placeholder-" + hmac.digest(_derive(key, "ash placeholder 1"), text.encode(), "sha256").hex()[:32]


# What may be stored and used


def _check_secret(type: str, secret: Secret) -> None:
    """What is wrong is said without showing it."""
    text = secret.reveal()
    if not MIN_SECRET <= len(text) <= MAX_SECRET:
        raise InvalidRequest(f"key must have {MIN_SECRET} to {MAX_SECRET:,} characters; it has {len(text):,}")
    if type != BEDROCK and not _PRINTABLE.fullmatch(text):  # Bedrock's is JSON
        raise InvalidRequest("key must be printable ASCII without spaces at its ends: it has to fit into a header")


def _check_number(new: Credential, stored: Sequence[Credential]) -> None:
    if len(stored) >= MAX_OF_TENANT:
        raise Conflict(f"there are {MAX_OF_TENANT} credentials, which is as many as there may be; delete some first")
    if new.agent is not None and sum(old.agent == new.agent for old in stored) >= MAX_OF_AGENT:
        raise Conflict(f"agent {new.agent} has {MAX_OF_AGENT} credentials, which is as many as it may have; delete some first")


def _check_unambiguous(new: Credential, stored: Sequence[Credential]) -> None:
    """The database holds this as well; here it can be said what is in the way."""
    for old in stored:
        if new.agent is None or old.agent != new.agent:
            continue
        if old.host == new.host and (old.header or "").lower() == (new.header or "").lower():
            what = f"{new.header} at {new.host}" if new.host else "the model"
            raise Conflict(f"agent {new.agent} has a credential for {what} already ({old.id}); delete that one first")
        if new.variable is not None and old.variable == new.variable:
            raise Conflict(f"agent {new.agent} has a credential in the variable {new.variable} already ({old.id})")


def _checked(type: str, binding: Binding) -> Binding:
    """The binding in full. Raises InvalidRequest."""
    given = [name for name in ("host", "header", "template", "variable") if getattr(binding, name) is not None]
    if type not in TYPES:
        raise InvalidRequest(f"type must be one of {', '.join(TYPES)}")
    if given and type != CUSTOM:
        raise InvalidRequest(f"{given[0]} goes with type {CUSTOM} only")
    if type == CUSTOM and binding.host is not None:
        return _checked_host(binding)
    if given:
        raise InvalidRequest(f"{given[0]} needs a host")
    if binding.agent is not None and type != ANTHROPIC:
        raise InvalidRequest(f"a credential of type {type} without a host cannot be given to an agent")
    return binding


def _checked_host(binding: Binding) -> Binding:
    try:
        host, port = split_host(binding.host or "")
    except ValueError as error:
        raise InvalidRequest(f"host: {error}") from error
    header = binding.header or "Authorization"
    if not _TOKEN.fullmatch(header) or header.lower() in _FRAMING:
        raise InvalidRequest(f"header: {header!r:.100} cannot hold a credential; Authorization and the like can")
    _check_template(binding.template)
    _check_variable(binding.variable)
    if binding.template is None and binding.variable is None:
        raise InvalidRequest("give a variable, in which tools find the placeholder, or a template, by which the header is always set")
    return binding._replace(host=shown(parse_host(host), None if port == HTTPS else port), header=header)


def _check_template(template: str | None) -> None:
    if template is not None and (template.count(VALUE) != 1 or not _PRINTABLE.fullmatch(template) or len(template) > 1000):
        raise InvalidRequest(f"template must hold {VALUE} once, as in 'Bearer {VALUE}'; what follows 'Basic ' is written as base64")


def _check_variable(variable: str | None) -> None:
    if variable is None:
        return
    if not _VARIABLE.fullmatch(variable) or variable in CA_VARIABLES:
        raise InvalidRequest(f"variable: {variable!r:.100} is not a name that can be used; use one like GITHUB_TOKEN")
    check_env({variable: ""}, "variable")


def _is_usable(credential: Credential) -> bool:
    return credential.type == ANTHROPIC or credential.host is not None


def _not_usable(credential: Credential) -> str:
    if credential.type == CUSTOM:
        return f"The credential {credential.id} names no host, so that there is nowhere to put it in; store it again with a host"
    return f"Sessions cannot use credentials of type {credential.type} yet; use one of type {ANTHROPIC}, or one for a host"


def _without_overruled(found: list[tuple[Credential, bytes]], named: str | None) -> list[tuple[Credential, bytes]]:
    """The session's own credential goes before its agent's for the same place."""
    own = next((credential for credential, _ in found if credential.id == named), None)
    if own is None:
        return found
    return [(other, sealed) for other, sealed in found if other.id == own.id or not _is_same_place(other, own)]


def _is_same_place(one: Credential, other: Credential) -> bool:
    is_same_header = (one.header or "").lower() == (other.header or "").lower()
    return (one.host == other.host and is_same_header) or (one.variable is not None and one.variable == other.variable)
