"""Files, batches with their results, and stored responses."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "stored_file",
        sa.Column("id", sa.String(255), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.String(255), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
    )
    op.create_index("ix_stored_file_expires_at", "stored_file", ["expires_at"])
    op.create_table(
        "batch",
        sa.Column("id", sa.String(255), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("endpoint", sa.String(255), nullable=False),
        sa.Column("input_file_id", sa.String(255), nullable=False),
        sa.Column("completion_window", sa.String(255), nullable=False),
        sa.Column("status", sa.String(255), nullable=False),
        sa.Column("metadata", sa.JSON),
        sa.Column("errors", sa.JSON),
        sa.Column("output_expires_after_s", sa.BigInteger),
        sa.Column("output_file_id", sa.String(255)),
        sa.Column("error_file_id", sa.String(255)),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("completed", sa.BigInteger, nullable=False),
        sa.Column("failed", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("in_progress_at", sa.BigInteger),
        sa.Column("finalizing_at", sa.BigInteger),
        sa.Column("completed_at", sa.BigInteger),
        sa.Column("failed_at", sa.BigInteger),
        sa.Column("expired_at", sa.BigInteger),
        sa.Column("cancelling_at", sa.BigInteger),
        sa.Column("cancelled_at", sa.BigInteger),
        sa.Column("worker", sa.String(255)),
        sa.Column("lease_until", sa.Double, nullable=False),
    )
    op.create_index("ix_batch_input_file_id", "batch", ["input_file_id"])
    op.create_index("ix_batch_status", "batch", ["status"])
    op.create_table(
        "batch_result",
        sa.Column(
            "batch_id", sa.String(255), sa.ForeignKey("batch.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("line", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("ok", sa.Boolean, nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
    )
    op.create_table(
        "stored_response",
        sa.Column("id", sa.String(255), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("previous_id", sa.String(255)),
        sa.Column("payload", sa.Text, nullable=False),
    )
    op.create_index("ix_stored_response_expires_at", "stored_response", ["expires_at"])


def downgrade() -> None:
    for table in ("stored_response", "batch_result", "batch", "stored_file"):
        op.drop_table(table)
