"""Tables of the log: projects, completions, comparisons, feedback, erasures, API keys.

Owns names, types, indexes and the meaning of each column; ``registry_schema`` holds the tables
of training and deployment. Migrations are written by hand and tested to give exactly this.
Types are those that SQLite and PostgreSQL share: text, 64-bit integers, doubles, bytes; JSON is
kept as canonical text. Times are milliseconds since 1970 (UTC). Import-time only, no threads.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)

SCHEMA_REVISION = "0003"  # newest migration; a test holds it equal to Alembic's head

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite makes only a column declared INTEGER the row id itself; BIGINT would cost a second index.
RowId = BigInteger().with_variant(Integer(), "sqlite")

projects = Table(
    "projects",
    metadata,
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("profile", Text, nullable=False),  # personal, team, public
    Column("retention_days", Integer),  # payloads of unrated answers; NULL keeps them
    Column("settings", Text, nullable=False),  # JSON object
    PrimaryKeyConstraint("tenant", "project"),
)

# One row per sequence; taking its lock first makes the order of ``seq`` the order of commits.
counters = Table(
    "counters",
    metadata,
    Column("name", Text, primary_key=True),  # "feedback", "deployments"
    Column("value", BigInteger, nullable=False),  # last number given
)

completions = Table(
    "completions",
    metadata,
    Column("completion_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("end_user", Text, nullable=False),  # empty when unknown, a pseudonym once erased
    Column("conversation_id", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("sample_idx", Integer, nullable=False),
    Column("origin", Text, nullable=False),
    Column("policy_version", Text, nullable=False),
    Column("policy_hash", Text, nullable=False),
    Column("base_id", Text, nullable=False),
    Column("template_hash", Text, nullable=False),
    Column("quantization", Text, nullable=False),
    Column("kernel_path", Text, nullable=False),
    Column("sampling", Text, nullable=False),  # JSON object
    Column("seed", BigInteger),
    Column("finish_reason", Text, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("consent_log", Text, nullable=False),  # metadata or full
    Column("consent_train", Boolean, nullable=False),
    Column("tags", Text, nullable=False),  # JSON array
    Column("prompt_hash", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("payload_removed_at_ms", BigInteger),  # by retention or on request
    Column("erased_at_ms", BigInteger),
    Index(None, "tenant", "project", "created_at_ms"),
    Index(None, "tenant", "end_user"),
)

completion_payloads = Table(
    "completion_payloads",
    metadata,
    Column("completion_id", Text, primary_key=True),
    Column("prompt_ids", LargeBinary, nullable=False),  # blobs.py says how these are packed
    Column("completion_ids", LargeBinary, nullable=False),
    Column("prompt_text", Text, nullable=False),
    Column("completion_text", Text, nullable=False),
    Column("messages", Text),  # JSON array
    Column("logprobs", LargeBinary, nullable=False),
    Column("sampling_logprobs", LargeBinary, nullable=False),
    Column("kept_mass", LargeBinary, nullable=False),
)

comparisons = Table(
    "comparisons",
    metadata,
    Column("comparison_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("end_user", Text, nullable=False),
    Column("conversation_id", Text, nullable=False),
    Column("purpose", Text, nullable=False),  # gate or learn
    Column("tags", Text, nullable=False),  # JSON array
    Column("created_at_ms", BigInteger, nullable=False),
    Column("voted_at_ms", BigInteger),  # never unset: the versions were revealed then
    Column("erased_at_ms", BigInteger),
    Index(None, "tenant", "end_user"),
    Index(
        "ix_comparisons_unanswered",
        "tenant",
        "project",
        "created_at_ms",
        sqlite_where=text("voted_at_ms IS NULL"),
        postgresql_where=text("voted_at_ms IS NULL"),
    ),
)

comparison_candidates = Table(
    "comparison_candidates",
    metadata,
    Column("comparison_id", Text, nullable=False),
    Column("candidate_idx", Integer, nullable=False),  # order of generation
    Column("completion_id", Text, nullable=False),
    Column("policy_version", Text, nullable=False),
    Column("position", Integer, nullable=False),  # order shown
    Column("propensity", Double, nullable=False),
    PrimaryKeyConstraint("comparison_id", "candidate_idx"),
    Index(None, "completion_id"),
)

# Append-only: after the insert only log_seq and the dead_* columns are set, once, and an erasure
# empties the row.
feedback = Table(
    "feedback",
    metadata,
    Column("seq", RowId, primary_key=True, autoincrement=False),
    Column("log_seq", BigInteger),  # NULL while the target is not visible
    Column("feedback_id", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("rater_id", Text, nullable=False),  # empty is anonymous
    Column("rater_kind", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("completion_id", Text),
    Column("comparison_id", Text),
    Column("target_id", Text, nullable=False),  # what the judgement is about; see feedback.py
    Column("value", Text, nullable=False),  # JSON of the judgement without its free text
    Column("supersedes_id", Text),
    Column("root_id", Text, nullable=False),  # first event of the chain of edits
    Column("consent_train", Boolean, nullable=False),
    Column("tags", Text, nullable=False),  # JSON array
    Column("client_time_ms", BigInteger),
    Column("server_time_ms", BigInteger, nullable=False),
    Column("source", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False),  # SHA-256 of the payload
    Column("owner", Text),  # a waiting event's target must belong to this end user
    Column("dead_at_ms", BigInteger),
    Column("dead_reason", Text),
    Column("erased_at_ms", BigInteger),
    # The id first: a group is looked up by its ids alone, across scopes.
    Index("uq_feedback_id", "feedback_id", "tenant", "project", unique=True),
    Index("uq_feedback_log_seq", "log_seq", unique=True),
    Index("ix_feedback_target", "target_id", "rater_id"),
    Index("ix_feedback_rater", "tenant", "rater_id"),
    Index(
        "ix_feedback_supersedes",
        "supersedes_id",
        sqlite_where=text("supersedes_id IS NOT NULL"),
        postgresql_where=text("supersedes_id IS NOT NULL"),
    ),
    Index(
        "ix_feedback_chain",
        "root_id",
        sqlite_where=text("supersedes_id IS NOT NULL"),
        postgresql_where=text("supersedes_id IS NOT NULL"),
    ),
    Index(
        "ix_feedback_waiting",
        "server_time_ms",
        sqlite_where=text("log_seq IS NULL AND dead_at_ms IS NULL"),
        postgresql_where=text("log_seq IS NULL AND dead_at_ms IS NULL"),
    ),
)

# The completions that a ranking names; other kinds have theirs in feedback.completion_id.
feedback_targets = Table(
    "feedback_targets",
    metadata,
    Column("seq", BigInteger, nullable=False),
    Column("completion_id", Text, nullable=False),
    PrimaryKeyConstraint("seq", "completion_id"),
    Index(None, "completion_id"),
)

feedback_payloads = Table(
    "feedback_payloads",
    metadata,
    Column("seq", RowId, primary_key=True, autoincrement=False),
    Column("text", Text),  # corrected answer or critique
    Column("comment", Text),
)

# A proof that an erasure happened, and the work that it leaves: scrubbing bytes, rebuilding.
erasures = Table(
    "erasures",
    metadata,
    Column("erasure_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("pseudonym", Text, nullable=False),  # stands where the user's id stood
    Column("erased_at_ms", BigInteger, nullable=False),
    Column("completions", Integer, nullable=False),  # rows emptied
    Column("feedback", Integer, nullable=False),  # rows emptied
    Column("tainted_runs", Text, nullable=False),  # JSON array of run ids
    Column("tainted_policies", Text, nullable=False),  # JSON array of version names
    Column("scrubbed_at_ms", BigInteger),  # when the bytes had left the files
    Index(None, "tenant", "erased_at_ms"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("prefix", Text, nullable=False, unique=True),  # public part, finds the row
    Column("salt", LargeBinary, nullable=False),
    Column("secret_hash", LargeBinary, nullable=False),  # HMAC-SHA-256 of the secret under salt
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),  # for people
    Column("scopes", Text, nullable=False),  # JSON array
    Column("created_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger),
    Column("revoked_at_ms", BigInteger),
    Index(None, "tenant", "project"),
)
