"""Runs the migrations on the connection that ``database`` hands over, inside its transaction.

Owns nothing but the hand-over: Alembic executes this file, it is never imported.
"""

from alembic import context

from heedful_store.registry_schema import policies
from heedful_store.schema import metadata

# Importing the registry's tables adds them to the metadata that Alembic compares with.
assert policies.metadata is metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
