"""The database: migrations, transactions, and what happens when it is locked or gone. On SQLite and on PostgreSQL."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select

from gateway.errors import StorageUnavailableError
from gateway.storage import Storage
from gateway.stored_responses import KeptResponse, StoredResponses
from gateway.tables import StoredFile, Table, new_id
from tests.gateway.postgres import Postgres


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "new" / "gateway.db")
    return request.getfixturevalue("postgres").make_database(f"test{new_id('')}")


@pytest.fixture
async def storage(place: str) -> AsyncIterator[Storage]:
    storage = Storage(place)
    yield storage
    await storage.close()


def a_file(file_id: str) -> StoredFile:
    return StoredFile(id=file_id, filename="a.jsonl", purpose="batch", bytes=1, created_at=1)


async def file_ids(storage: Storage) -> list[str]:
    async with storage.reading() as session:
        return list(await session.scalars(select(StoredFile.id).order_by(StoredFile.id)))


async def test_the_migrations_make_the_tables_that_the_code_has(storage: Storage):
    async with storage.reading() as session:
        connection = await session.connection()
        differences = await connection.run_sync(
            lambda plain: compare_metadata(MigrationContext.configure(plain), Table.metadata)
        )
    assert differences == []


async def test_gateways_that_start_together_migrate_one_after_the_other(place: str):
    several = [Storage(place) for _ in range(4)]
    assert await asyncio.gather(*map(file_ids, several)) == [[]] * 4
    for storage in several:
        await storage.close()


async def test_a_change_is_there_for_another_gateway_and_after_a_restart(place: str, storage: Storage):
    async with storage.writing() as session:
        session.add(a_file("file-1"))
    other = Storage(place)
    assert await file_ids(other) == ["file-1"]
    await other.close()


async def test_a_block_that_raises_changes_nothing(storage: Storage):
    with pytest.raises(ZeroDivisionError):
        async with storage.writing() as session:
            session.add(a_file("file-1"))
            await session.flush()
            raise ZeroDivisionError
    assert await file_ids(storage) == []


async def test_writers_wait_for_one_another(storage: Storage):
    async def write(number: int) -> None:
        async with storage.writing() as session:
            await session.scalars(select(StoredFile))
            session.add(a_file(f"file-{number}"))

    await asyncio.gather(*(write(number) for number in range(12)))
    assert len(await file_ids(storage)) == 12


async def test_an_sqlite_file_is_made_only_when_it_is_needed(tmp_path: Path):
    storage = Storage(str(tmp_path / "gateway.db"))
    assert not storage.exists
    await storage.close()
    assert not (tmp_path / "gateway.db").exists()


async def test_a_locked_database_is_unavailable_and_then_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gateway.storage.WAIT_S", 0.1)
    storage = Storage(str(tmp_path / "gateway.db"))
    assert await file_ids(storage) == []
    other = sqlite3.connect(tmp_path / "gateway.db")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageUnavailableError) as refusal:
        async with storage.writing() as session:
            session.add(a_file("file-1"))
    assert refusal.value.status == 503 and refusal.value.retry_after_s
    assert str(tmp_path) not in refusal.value.message
    other.rollback()
    other.close()
    async with storage.writing() as session:
        session.add(a_file("file-1"))
    assert await file_ids(storage) == ["file-1"]
    await storage.close()


async def test_a_place_that_cannot_be_written_is_unavailable(tmp_path: Path):
    (tmp_path / "file").touch()
    storage = Storage(str(tmp_path / "file" / "gateway.db"))
    with pytest.raises(StorageUnavailableError):
        await file_ids(storage)
    await storage.close()


async def test_tables_of_a_later_version_are_left_alone(tmp_path: Path):
    database = tmp_path / "gateway.db"
    storage = Storage(str(database))
    assert await file_ids(storage) == []
    await storage.close()
    with sqlite3.connect(database) as later:
        later.execute("UPDATE alembic_version SET version_num = '9999'")
    later.close()
    storage = Storage(str(database))
    with pytest.raises(StorageUnavailableError):
        await file_ids(storage)
    await storage.close()


async def test_postgresql_may_go_and_come_back(postgres: Postgres):
    storage = Storage(postgres.make_database("mortal"))
    async with storage.writing() as session:
        session.add(a_file("file-1"))
    postgres.stop()
    with pytest.raises(StorageUnavailableError):
        await file_ids(storage)
    postgres.start()
    assert await file_ids(storage) == ["file-1"]
    await storage.close()


async def test_a_connection_that_dies_in_a_transaction_changes_nothing(postgres: Postgres):
    storage = Storage(postgres.make_database("dying"))
    assert await file_ids(storage) == []
    with pytest.raises(StorageUnavailableError):
        async with storage.writing() as session:
            session.add(a_file("file-1"))
            await session.flush()
            postgres.stop()
    postgres.start()
    assert await file_ids(storage) == []
    await storage.close()


def kept(response_id: str, **more) -> KeptResponse:
    return KeptResponse(response_id, b'{"text": "\\u0000 \xc3\xa9"}', 100, **more)


async def test_a_response_is_kept_replaced_and_deleted(storage: Storage):
    responses = StoredResponses(storage)
    assert await responses.get("resp_1") is None
    await responses.put(kept("resp_1"))
    assert await responses.get("resp_1") == kept("resp_1")
    await responses.put(KeptResponse("resp_1", b"{}", 100))
    assert (await responses.get("resp_1")) == KeptResponse("resp_1", b"{}", 100)
    assert await responses.delete("resp_1")
    assert not await responses.delete("resp_1")
    assert await responses.get("resp_1") is None


async def test_a_response_belongs_to_its_owner_until_it_expires(storage: Storage):
    now = 150.0
    responses = StoredResponses(storage, now=lambda: now)
    await responses.put(kept("resp_1", expires_at=200), owner="a")
    assert await responses.get("resp_1", owner="b") is None
    assert not await responses.delete("resp_1", owner="b")
    assert await responses.get("resp_1", owner="a") == kept("resp_1", expires_at=200)
    now = 200.0
    assert await responses.get("resp_1", owner="a") is None
    await responses.delete_expired()
    now = 150.0
    assert await responses.get("resp_1", owner="a") is None


async def test_a_chain_begins_where_the_conversation_did(storage: Storage):
    responses = StoredResponses(storage)
    for number in range(1, 4):
        await responses.put(kept(f"resp_{number}", previous_id=f"resp_{number - 1}" if number > 1 else None))
    assert [each.id for each in await responses.chain("resp_3")] == ["resp_1", "resp_2", "resp_3"]
    await responses.delete("resp_1")
    assert [each.id for each in await responses.chain("resp_3")] == ["resp_2", "resp_3"]
    assert await responses.chain("resp_1") == []
