"""The database: engine, sessions, migrations; SQLite in a file, or PostgreSQL. Knows no table.

Nothing is opened before it is needed, so a gateway that is never asked for a file leaves none, and one whose database is
away serves everything else: only what needs the database is refused with 503, until it is back.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from gateway.config import is_uri
from gateway.errors import StorageUnavailableError

WAIT_S = 5
"""For a lock, a connection or a free place in the pool."""
RETRY_AFTER_S = 2.0
MIGRATION_LOCK = 5_077_117
"""Of PostgreSQL's advisory locks: gateways that start together migrate one after the other."""

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Storage:
    """Sessions on the gateway's database.

    Args:
        place: The path of an SQLite file, or a `postgresql://` URL.
    """

    def __init__(self, place: str) -> None:
        self._file = None if is_uri(place) else Path(place)
        self._engine = _sqlite_engine(self._file) if self._file else _postgres_engine(place)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._migrated = False
        self._migrating = asyncio.Lock()

    @property
    def exists(self) -> bool:
        """Whether there can be anything in it: a file that nobody has made holds nothing."""
        return self._file is None or self._file.exists()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """A session that only reads.

        Raises:
            StorageUnavailableError: the database is locked or gone.
        """
        async with self._session(writes=False) as session:
            yield session

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """A session whose changes are durable once the block has ended, or undone when it raises.

        Raises:
            StorageUnavailableError: the database is locked or gone; nothing was changed, unless its answer to the
                commit was lost on the way.
        """
        async with self._session(writes=True) as session:
            yield session

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def _session(self, *, writes: bool) -> AsyncIterator[AsyncSession]:
        try:
            await self._migrate()
            async with self._sessions.begin() as session:
                await session.connection(execution_options={"writes": writes})
                yield session
        except (OperationalError, InterfaceError, PoolTimeoutError, OSError) as error:
            raise _unavailable(error) from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise _unavailable(error) from error
            raise

    async def _migrate(self) -> None:
        """Bring the tables up to date, once; again with the next session when it fails."""
        if self._migrated:
            return
        async with self._migrating:
            if self._migrated:
                return
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                async with self._engine.connect() as plain:
                    connection = await plain.execution_options(writes=True)
                    async with connection.begin():
                        if self._file is None:
                            await connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
                        await connection.run_sync(_upgrade)
            except CommandError as error:
                # Its tables are those of a later version.
                raise _unavailable(error) from error
            self._migrated = True


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _sqlite_engine(file: Path) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{file}", connect_args={"timeout": WAIT_S}, pool_timeout=WAIT_S
    )

    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection, _) -> None:
        connection.isolation_level = None  # transactions are begun below, not guessed by the driver
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Connection) -> None:
        # A reader that turns writer halfway could not wait for its turn.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgres_engine(url: str) -> AsyncEngine:
    return create_async_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        connect_args={
            "connect_timeout": WAIT_S,
            "tcp_user_timeout": WAIT_S * 1000,
            "options": f"-c lock_timeout={WAIT_S}s",
        },
        pool_timeout=WAIT_S,
        pool_pre_ping=True,
    )


def _unavailable(error: Exception) -> StorageUnavailableError:
    """What the caller is told; the reason, which may name places, is for the log."""
    reason = str(error.orig if isinstance(error, DBAPIError) else error)
    log.warning("storage_unavailable", reason=reason.splitlines()[0] if reason else type(error).__name__)
    return StorageUnavailableError(
        "The storage of this server is not available at the moment. Nothing was changed: please try again.",
        retry_after_s=RETRY_AFTER_S,
    )
