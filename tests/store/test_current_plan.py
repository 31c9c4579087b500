"""What is current is found at the same price however much one rater has said."""

from heedful_store import current, open_store
from heedful_store.schema import feedback
from sqlalchemy import func, select, text
from sqlalchemy.dialects import sqlite

SELECTIVE = (
    "ix_feedback_supersedes (supersedes_id=?)",
    "ix_feedback_chain (root_id=?)",
    "rowid>?",
)


def test_chains_are_found_by_their_own_indexes_not_by_the_raters(sqlite_url: str) -> None:
    # A busy rater's events, read once for each of them, take time by their square.
    query = select(func.count()).select_from(feedback).where(current.is_current(feedback))
    sql = query.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
    with open_store(sqlite_url) as store, store.read() as connection:
        steps = [row[3] for row in connection.execute(text(f"EXPLAIN QUERY PLAN {sql}"))]
    searches = [step for step in steps if step.startswith("SEARCH")]
    assert len(searches) == 4
    for step in searches:
        assert any(words in step for words in SELECTIVE), step
