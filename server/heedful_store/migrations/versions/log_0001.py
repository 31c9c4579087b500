"""The log: projects, completions, comparisons, feedback, erasures, API keys.

Owns this one step of the schema and its way back; ``schema`` explains the columns. Written once:
a later change is a later step.
"""

import time

from alembic import op
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    Text,
    UniqueConstraint,
    text,
)

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    "api_keys",
    "comparison_candidates",
    "comparisons",
    "completion_payloads",
    "completions",
    "counters",
    "erasures",
    "feedback",
    "feedback_payloads",
    "feedback_targets",
    "projects",
)


def upgrade() -> None:
    """Create the tables and their first rows."""
    op.create_table(
        "api_keys",
        Column("key_id", Text(), nullable=False),
        Column("prefix", Text(), nullable=False),
        Column("salt", LargeBinary(), nullable=False),
        Column("secret_hash", LargeBinary(), nullable=False),
        Column("tenant", Text(), nullable=False),
        Column("project", Text(), nullable=False),
        Column("name", Text(), nullable=False),
        Column("scopes", Text(), nullable=False),
        Column("created_at_ms", BigInteger(), nullable=False),
        Column("expires_at_ms", BigInteger()),
        Column("revoked_at_ms", BigInteger()),
        PrimaryKeyConstraint("key_id", name="pk_api_keys"),
        UniqueConstraint("prefix", name="uq_api_keys_prefix"),
    )
    op.create_index("ix_api_keys_tenant_project", "api_keys", ["tenant", "project"])
    op.create_table(
        "comparison_candidates",
        Column("comparison_id", Text(), nullable=False),
        Column("candidate_idx", Integer(), nullable=False),
        Column("completion_id", Text(), nullable=False),
        Column("policy_version", Text(), nullable=False),
        Column("position", Integer(), nullable=False),
        Column("propensity", Double(), nullable=False),
        PrimaryKeyConstraint("comparison_id", "candidate_idx", name="pk_comparison_candidates"),
    )
    op.create_index(
        "ix_comparison_candidates_completion_id", "comparison_candidates", ["completion_id"]
    )
    op.create_table(
        "comparisons",
        Column("comparison_id", Text(), nullable=False),
        Column("tenant", Text(), nullable=False),
        Column("project", Text(), nullable=False),
        Column("end_user", Text(), nullable=False),
        Column("conversation_id", Text(), nullable=False),
        Column("purpose", Text(), nullable=False),
        Column("tags", Text(), nullable=False),
        Column("created_at_ms", BigInteger(), nullable=False),
        Column("voted_at_ms", BigInteger()),
        Column("erased_at_ms", BigInteger()),
        PrimaryKeyConstraint("comparison_id", name="pk_comparisons"),
    )
    op.create_index("ix_comparisons_tenant_end_user", "comparisons", ["tenant", "end_user"])
    op.create_index(
        "ix_comparisons_unanswered",
        "comparisons",
        ["tenant", "project", "created_at_ms"],
        sqlite_where=text("voted_at_ms IS NULL"),
        postgresql_where=text("voted_at_ms IS NULL"),
    )
    op.create_table(
        "completion_payloads",
        Column("completion_id", Text(), nullable=False),
        Column("prompt_ids", LargeBinary(), nullable=False),
        Column("completion_ids", LargeBinary(), nullable=False),
        Column("prompt_text", Text(), nullable=False),
        Column("completion_text", Text(), nullable=False),
        Column("messages", Text()),
        Column("logprobs", LargeBinary(), nullable=False),
        Column("sampling_logprobs", LargeBinary(), nullable=False),
        Column("kept_mass", LargeBinary(), nullable=False),
        PrimaryKeyConstraint("completion_id", name="pk_completion_payloads"),
    )
    op.create_table(
        "completions",
        Column("completion_id", Text(), nullable=False),
        Column("tenant", Text(), nullable=False),
        Column("project", Text(), nullable=False),
        Column("end_user", Text(), nullable=False),
        Column("conversation_id", Text(), nullable=False),
        Column("request_id", Text(), nullable=False),
        Column("sample_idx", Integer(), nullable=False),
        Column("origin", Text(), nullable=False),
        Column("policy_version", Text(), nullable=False),
        Column("policy_hash", Text(), nullable=False),
        Column("base_id", Text(), nullable=False),
        Column("template_hash", Text(), nullable=False),
        Column("quantization", Text(), nullable=False),
        Column("kernel_path", Text(), nullable=False),
        Column("sampling", Text(), nullable=False),
        Column("seed", BigInteger()),
        Column("finish_reason", Text(), nullable=False),
        Column("prompt_tokens", Integer(), nullable=False),
        Column("completion_tokens", Integer(), nullable=False),
        Column("consent_log", Text(), nullable=False),
        Column("consent_train", Boolean(), nullable=False),
        Column("tags", Text(), nullable=False),
        Column("prompt_hash", Text(), nullable=False),
        Column("created_at_ms", BigInteger(), nullable=False),
        Column("payload_removed_at_ms", BigInteger()),
        Column("erased_at_ms", BigInteger()),
        PrimaryKeyConstraint("completion_id", name="pk_completions"),
    )
    op.create_index("ix_completions_tenant_end_user", "completions", ["tenant", "end_user"])
    op.create_index(
        "ix_completions_tenant_project_created_at_ms",
        "completions",
        ["tenant", "project", "created_at_ms"],
    )
    op.create_table(
        "counters",
        Column("name", Text(), nullable=False),
        Column("value", BigInteger(), nullable=False),
        PrimaryKeyConstraint("name", name="pk_counters"),
    )
    op.create_table(
        "erasures",
        Column("erasure_id", Text(), nullable=False),
        Column("tenant", Text(), nullable=False),
        Column("pseudonym", Text(), nullable=False),
        Column("erased_at_ms", BigInteger(), nullable=False),
        Column("completions", Integer(), nullable=False),
        Column("feedback", Integer(), nullable=False),
        Column("tainted_runs", Text(), nullable=False),
        Column("tainted_policies", Text(), nullable=False),
        Column("scrubbed_at_ms", BigInteger()),
        PrimaryKeyConstraint("erasure_id", name="pk_erasures"),
    )
    op.create_index("ix_erasures_tenant_erased_at_ms", "erasures", ["tenant", "erased_at_ms"])
    op.create_table(
        "feedback",
        Column(
            "seq",
            BigInteger().with_variant(Integer(), "sqlite"),
            autoincrement=False,
            nullable=False,
        ),
        Column("log_seq", BigInteger()),
        Column("feedback_id", Text(), nullable=False),
        Column("tenant", Text(), nullable=False),
        Column("project", Text(), nullable=False),
        Column("rater_id", Text(), nullable=False),
        Column("rater_kind", Text(), nullable=False),
        Column("kind", Text(), nullable=False),
        Column("completion_id", Text()),
        Column("comparison_id", Text()),
        Column("target_id", Text(), nullable=False),
        Column("value", Text(), nullable=False),
        Column("supersedes_id", Text()),
        Column("root_id", Text(), nullable=False),
        Column("consent_train", Boolean(), nullable=False),
        Column("tags", Text(), nullable=False),
        Column("client_time_ms", BigInteger()),
        Column("server_time_ms", BigInteger(), nullable=False),
        Column("source", Text(), nullable=False),
        Column("key_id", Text(), nullable=False),
        Column("digest", LargeBinary(), nullable=False),
        Column("owner", Text()),
        Column("dead_at_ms", BigInteger()),
        Column("dead_reason", Text()),
        Column("erased_at_ms", BigInteger()),
        PrimaryKeyConstraint("seq", name="pk_feedback"),
    )
    op.create_index(
        "ix_feedback_chain",
        "feedback",
        ["root_id"],
        sqlite_where=text("supersedes_id IS NOT NULL"),
        postgresql_where=text("supersedes_id IS NOT NULL"),
    )
    op.create_index("ix_feedback_rater", "feedback", ["tenant", "rater_id"])
    op.create_index(
        "ix_feedback_supersedes",
        "feedback",
        ["supersedes_id"],
        sqlite_where=text("supersedes_id IS NOT NULL"),
        postgresql_where=text("supersedes_id IS NOT NULL"),
    )
    op.create_index("ix_feedback_target", "feedback", ["target_id", "rater_id"])
    op.create_index(
        "ix_feedback_waiting",
        "feedback",
        ["server_time_ms"],
        sqlite_where=text("log_seq IS NULL AND dead_at_ms IS NULL"),
        postgresql_where=text("log_seq IS NULL AND dead_at_ms IS NULL"),
    )
    op.create_index("uq_feedback_id", "feedback", ["feedback_id", "tenant", "project"], unique=True)
    op.create_index("uq_feedback_log_seq", "feedback", ["log_seq"], unique=True)
    op.create_table(
        "feedback_payloads",
        Column(
            "seq",
            BigInteger().with_variant(Integer(), "sqlite"),
            autoincrement=False,
            nullable=False,
        ),
        Column("text", Text()),
        Column("comment", Text()),
        PrimaryKeyConstraint("seq", name="pk_feedback_payloads"),
    )
    op.create_table(
        "feedback_targets",
        Column("seq", BigInteger(), nullable=False),
        Column("completion_id", Text(), nullable=False),
        PrimaryKeyConstraint("seq", "completion_id", name="pk_feedback_targets"),
    )
    op.create_index("ix_feedback_targets_completion_id", "feedback_targets", ["completion_id"])
    op.create_table(
        "projects",
        Column("tenant", Text(), nullable=False),
        Column("project", Text(), nullable=False),
        Column("created_at_ms", BigInteger(), nullable=False),
        Column("profile", Text(), nullable=False),
        Column("retention_days", Integer()),
        Column("settings", Text(), nullable=False),
        PrimaryKeyConstraint("tenant", "project", name="pk_projects"),
    )

    now_ms = time.time_ns() // 1_000_000
    op.execute("INSERT INTO counters (name, value) VALUES ('feedback', 0)")
    op.execute(
        "INSERT INTO projects (tenant, project, created_at_ms, profile, settings) "
        f"VALUES ('default', 'default', {now_ms}, 'personal', '{{}}')"
    )


def downgrade() -> None:
    """Drop the tables with all their rows."""
    for table in TABLES:
        op.drop_table(table)
