from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ash.config import Secret
from ash.errors import NotFound, StoreFailed
from ash.keys import Keys
from ash.store import Store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with Store(str(tmp_path / "ash.db")) as opened:
        yield opened


@pytest.fixture
def keys(store: Store) -> Keys:
    return Keys(store)


@pytest.fixture
def initial(tmp_path: Path) -> Path:
    return tmp_path / "initial-api-key"


async def labels(store: Store) -> list[str]:
    return [key.label for key in await store.list_keys("default")]


async def test_a_created_key_is_accepted_until_it_is_deleted(keys: Keys) -> None:
    record, text = await keys.create("tenant", "mine")
    assert text.startswith("ash_")
    assert len(text) == 36
    assert await keys.check(text) == record
    assert await keys.list("tenant") == [record]
    await keys.delete("tenant", record.id)
    assert await keys.check(text) is None
    with pytest.raises(NotFound):
        await keys.delete("tenant", record.id)


@pytest.mark.parametrize("text", ["", "ash_", "ash_" + "A" * 32, "ü", "\ud800", "x" * 100_000])
async def test_any_other_text_is_no_key(keys: Keys, text: str) -> None:
    await keys.create("default", "mine")
    assert await keys.check(text) is None


async def test_only_a_hash_of_a_key_is_stored(keys: Keys, tmp_path: Path) -> None:
    _, text = await keys.create("default", "mine")
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert text.encode() not in stored
    assert b"mine" in stored


async def test_the_key_of_the_settings_is_accepted_without_a_record(store: Store, tmp_path: Path, initial: Path) -> None:
    keys = Keys(store, Secret("s3cret"))
    assert await keys.bootstrap(str(tmp_path)) is None
    found = await keys.check("s3cret")
    assert found is not None
    assert found.tenant_id == "default"
    assert await keys.check("s3cre") is None
    assert not initial.exists()
    assert await store.count_keys() == 0


async def test_a_first_start_writes_a_private_key_that_works_and_logs_no_key(
    keys: Keys, store: Store, tmp_path: Path, initial: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert await keys.bootstrap(str(tmp_path)) == str(initial)
    text = initial.read_text()
    assert initial.stat().st_mode & 0o777 == 0o600
    assert await keys.check(text) is not None
    assert await labels(store) == ["auto-generated"]
    assert text not in caplog.text
    assert sorted(path for path in os.listdir(tmp_path) if path.startswith("initial")) == ["initial-api-key"]


async def test_further_starts_make_no_key_while_the_owner_has_one(keys: Keys, store: Store, tmp_path: Path, initial: Path) -> None:
    await keys.bootstrap(str(tmp_path))
    text = initial.read_text()
    assert await keys.bootstrap(str(tmp_path)) is None  # the file waits to be taken
    initial.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"server_url": "x", "api_key": text}))
    assert await keys.bootstrap(str(tmp_path)) is None  # the command line took it
    assert await labels(store) == ["auto-generated"]
    assert not initial.exists()


@pytest.mark.parametrize("config", [None, "{}", "[]", "broken", '{"api_key": "ash_wrong"}', '{"api_key": 1}'])
async def test_an_owner_without_a_key_gets_a_new_one(keys: Keys, store: Store, tmp_path: Path, initial: Path, config: str | None) -> None:
    await keys.bootstrap(str(tmp_path))
    initial.unlink()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert await keys.bootstrap(str(tmp_path)) == str(initial)
    assert await keys.check(initial.read_text()) is not None
    assert await labels(store) == ["auto-generated", "cli-recovery"]


async def test_a_file_with_a_deleted_key_is_replaced(keys: Keys, tmp_path: Path, initial: Path) -> None:
    await keys.bootstrap(str(tmp_path))
    [record] = await keys.list("default")
    await keys.delete("default", record.id)
    stale = initial.read_text()
    assert await keys.bootstrap(str(tmp_path)) == str(initial)
    assert initial.read_text() != stale


async def test_a_link_in_the_place_of_the_file_is_replaced_not_followed(keys: Keys, tmp_path: Path, initial: Path) -> None:
    (tmp_path / "elsewhere").write_text("untouched")
    initial.symlink_to(tmp_path / "elsewhere")
    await keys.bootstrap(str(tmp_path))
    assert (tmp_path / "elsewhere").read_text() == "untouched"
    assert not initial.is_symlink()


async def test_a_file_that_cannot_be_written_is_an_error_in_words(keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match="initial-api-key cannot be written"):
        await keys.bootstrap(str(tmp_path / "nowhere"))
