"""What the gateway keeps in its database, a class a table. Knows no query; `migrations/` makes and changes the tables.

Times are Unix seconds. Ids sort by when they were made (`new_id`), so a page of a list is a range of ids.
"""

import secrets
import time
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column


class Table(MappedAsDataclass, DeclarativeBase):
    type_annotation_map = {int: BigInteger, str: String(255)}


class FilePurpose(StrEnum):
    ASSISTANTS = "assistants"
    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"
    EVALS = "evals"
    FINE_TUNE = "fine-tune"
    USER_DATA = "user_data"
    VISION = "vision"


class BatchStatus(StrEnum):
    """
    VALIDATING -> FAILED | IN_PROGRESS -> FINALIZING -> COMPLETED | EXPIRED
    VALIDATING, IN_PROGRESS, FINALIZING --client--> CANCELLING -> CANCELLED
    """

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


CANCELLABLE = (BatchStatus.VALIDATING.value, BatchStatus.IN_PROGRESS.value, BatchStatus.FINALIZING.value)
OPEN = (*CANCELLABLE, BatchStatus.CANCELLING.value)
"""A gateway still has work to do for these."""


class StoredFile(Table, kw_only=True):
    """A file whose contents lie complete in the file store, under its id."""

    __tablename__ = "stored_file"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(default="")
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str]
    bytes: Mapped[int]
    created_at: Mapped[int]
    expires_at: Mapped[int | None] = mapped_column(default=None, index=True)


class Batch(Table, kw_only=True):
    """One batch. `worker` is the gateway that works on it, while `lease_until` has not passed."""

    __tablename__ = "batch"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(default="")
    endpoint: Mapped[str]
    input_file_id: Mapped[str] = mapped_column(index=True)
    completion_window: Mapped[str]
    status: Mapped[str] = mapped_column(default=BatchStatus.VALIDATING.value, index=True)
    labels: Mapped[dict[str, str] | None] = mapped_column("metadata", JSON(none_as_null=True), default=None)
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON(none_as_null=True), default=None)
    output_expires_after_s: Mapped[int | None] = mapped_column(default=None)
    output_file_id: Mapped[str | None] = mapped_column(default=None)
    error_file_id: Mapped[str | None] = mapped_column(default=None)
    total: Mapped[int] = mapped_column(default=0)
    completed: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[int]
    expires_at: Mapped[int]
    in_progress_at: Mapped[int | None] = mapped_column(default=None)
    finalizing_at: Mapped[int | None] = mapped_column(default=None)
    completed_at: Mapped[int | None] = mapped_column(default=None)
    failed_at: Mapped[int | None] = mapped_column(default=None)
    expired_at: Mapped[int | None] = mapped_column(default=None)
    cancelling_at: Mapped[int | None] = mapped_column(default=None)
    cancelled_at: Mapped[int | None] = mapped_column(default=None)
    worker: Mapped[str | None] = mapped_column(default=None)
    lease_until: Mapped[float] = mapped_column(default=0.0)


class BatchResult(Table, kw_only=True):
    """What came of one line of a batch that is not finished; the primary key is why no line is there twice."""

    __tablename__ = "batch_result"

    batch_id: Mapped[str] = mapped_column(ForeignKey("batch.id", ondelete="CASCADE"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Counted from 1, as in the input file."""
    ok: Mapped[bool]
    """It belongs into the results file, not into that of the errors."""
    payload: Mapped[str] = mapped_column(Text)
    """The line to write, without its end."""


class StoredResponse(Table, kw_only=True):
    """An object of the Responses API that was asked to be kept."""

    __tablename__ = "stored_response"
    __table_args__ = (Index("ix_stored_response_expires_at", "expires_at"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(default="")
    created_at: Mapped[int]
    expires_at: Mapped[int | None] = mapped_column(default=None)
    previous_id: Mapped[str | None] = mapped_column(default=None)
    payload: Mapped[str] = mapped_column(Text)
    """JSON, whatever its writer wants to find again."""


def new_id(prefix: str) -> str:
    """An id such as `batch_…`: nobody can guess it, and later ones sort behind earlier ones."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"
