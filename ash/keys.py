"""API keys: made, hashed, checked. A key's text is shown once, to whoever makes it; only its hash is kept.

It writes one secret to the disk, the bootstrap key in `initial-api-key`, and nothing secret to a log.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import secrets
from contextlib import suppress

from ash import models
from ash.config import Secret
from ash.errors import StoreFailed
from ash.models import DEFAULT_TENANT, ApiKey
from ash.store import Store

log = logging.getLogger(__name__)

INITIAL_KEY_FILE = "initial-api-key"
CLIENT_CONFIG_FILE = "config.json"

_PREFIX = "ash_"
STATIC_KEY_ID = "env"
_STATIC_KEY = ApiKey(STATIC_KEY_ID, DEFAULT_TENANT, "configured", "1970-01-01T00:00:00.000Z")


class Keys:
    """The keys in the database, and the one from the settings where there is one."""

    def __init__(self, store: Store, static_key: Secret | None = None) -> None:
        self._store = store
        self._static_hash = _hash(static_key.reveal()) if static_key else None

    async def bootstrap(self, data_dir: str) -> str | None:
        """See to it that whoever owns `data_dir` has a key or can find one. Returns the path of the file if one was written.

        A first start makes a key and writes it to `initial-api-key`, from where the command line takes it into its config.json; it
        deletes the file only if config.json is in the same folder. A later start makes another key only if the owner would be locked
        out: neither the file nor a config.json in the same folder holds a key that is valid. With a key in the settings nothing is needed.
        """
        if self._static_hash is not None:
            return None
        for key in await asyncio.to_thread(_local_keys, data_dir):
            if await self.check(key) is not None:
                return None
        label = "cli-recovery" if await self._store.count_keys() else "auto-generated"
        _, key = await self.create(DEFAULT_TENANT, label)
        path = os.path.join(data_dir, INITIAL_KEY_FILE)
        await asyncio.to_thread(_write_private, path, key)
        log.info("an API key (%s) was written to %s", label, path)
        return path

    async def check(self, key: str) -> ApiKey | None:
        """The record of a valid key, None for any other text. Asked of the database each time, so that a deleted key is refused at once."""
        hashed = _hash(key)
        if self._static_hash is not None and hmac.compare_digest(hashed, self._static_hash):
            return _STATIC_KEY
        return await self._store.find_key(hashed)

    async def create(self, tenant_id: str, label: str) -> tuple[ApiKey, str]:
        """The record and the key's text, which cannot be had again."""
        text = _PREFIX + secrets.token_urlsafe(24)
        key = ApiKey(models.new_id(), tenant_id, label, models.now())
        await self._store.add_key(key, _hash(text))
        return key, text

    async def list(self, tenant_id: str) -> list[ApiKey]:
        return await self._store.list_keys(tenant_id)

    async def delete(self, tenant_id: str, id: str) -> None:
        """From here on the key is refused."""
        await self._store.delete_key(tenant_id, id)


def _hash(key: str) -> str:
    """Keys are random and long, so that a plain hash is as good as a slow one. Text that is no valid Unicode is no key either."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _local_keys(data_dir: str) -> list[str]:
    """The keys that the owner of the data folder finds there: in `initial-api-key`, and in the command line's config.json."""
    keys: list[object] = []
    with suppress(OSError, UnicodeDecodeError), open(os.path.join(data_dir, INITIAL_KEY_FILE), encoding="utf-8") as file:
        keys.append(file.read(1000).strip())
    with suppress(OSError, ValueError), open(os.path.join(data_dir, CLIENT_CONFIG_FILE), encoding="utf-8") as file:
        config = json.load(file)
        keys += [config.get("api_key"), config.get("local_api_key")] if isinstance(config, dict) else []
    return [key for key in keys if isinstance(key, str) and key]


def _write_private(path: str, text: str) -> None:
    """Readable by the owner alone from the first moment, and never half written: made beside its place, then renamed."""
    temporary = f"{path}.{secrets.token_hex(8)}"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise StoreFailed(f"{INITIAL_KEY_FILE} cannot be written in the data folder: {error.strerror}") from error
