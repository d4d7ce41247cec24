"""What Alembic runs the migrations with: the connection and the transaction that `storage.py` hands it."""

from alembic import context

from gateway.tables import Table

context.configure(connection=context.config.attributes["connection"], target_metadata=Table.metadata)
with context.begin_transaction():
    context.run_migrations()
