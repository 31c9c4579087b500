"""Training and deployment: policies, aliases, deployments, runs, run inputs, jobs.

Owns this one step of the schema and its way back; ``schema`` explains the columns. Written once:
a later change is a later step.
"""

from alembic import op
from sqlalchemy import BigInteger, Boolean, Column, Integer, PrimaryKeyConstraint, Text

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLES = ("aliases", "deployments", "jobs", "policies", "run_inputs", "runs")


def upgrade() -> None:
    """Create the tables and their first rows."""
    op.create_table(
        "aliases",
        Column("tenant", Text(), nullable=False),
        Column("project", Text(), nullable=False),
        Column("base_id", Text(), nullable=False),
        Column("alias", Text(), nullable=False),
        Column("version", Text(), nullable=False),
        Column("moved_at_ms", BigInteger(), nullable=False),
        PrimaryKeyConstraint("tenant", "project", "base_id", "alias", name="pk_aliases"),
    )
    op.create_table(
        "deployments",
        Column(
            "deployment_id",
            BigInteger().with_variant(Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        Column("tenant", Text(), nullable=False),
        Column("project", Text(), nullable=False),
        Column("action", Text(), nullable=False),
        Column("version", Text(), nullable=False),
        Column("previous_version", Text()),
        Column("actor", Text(), nullable=False),
        Column("approved", Boolean(), nullable=False),
        Column("evidence", Text(), nullable=False),
        Column("at_ms", BigInteger(), nullable=False),
        PrimaryKeyConstraint("deployment_id", name="pk_deployments"),
    )
    op.create_index(
        "ix_deployments_tenant_project_at_ms", "deployments", ["tenant", "project", "at_ms"]
    )
    op.create_index(
        "ix_deployments_tenant_project_version", "deployments", ["tenant", "project", "version"]
    )
    op.create_table(
        "jobs",
        Column("job_id", Text(), nullable=False),
        Column("tenant", Text(), nullable=False),
        Column("project", Text(), nullable=False),
        Column("kind", Text(), nullable=False),
        Column("status", Text(), nullable=False),
        Column("arguments", Text(), nullable=False),
        Column("attempts", Integer(), nullable=False),
        Column("run_after_ms", BigInteger(), nullable=False),
        Column("lease_owner", Text()),
        Column("lease_until_ms", BigInteger()),
        Column("created_at_ms", BigInteger(), nullable=False),
        Column("finished_at_ms", BigInteger()),
        Column("failure", Text()),
        PrimaryKeyConstraint("job_id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_status_run_after_ms", "jobs", ["status", "run_after_ms"])
    op.create_table(
        "policies",
        Column("tenant", Text(), nullable=False),
        Column("project", Text(), nullable=False),
        Column("version", Text(), nullable=False),
        Column("content_hash", Text(), nullable=False),
        Column("base_id", Text(), nullable=False),
        Column("template_hash", Text(), nullable=False),
        Column("role", Text(), nullable=False),
        Column("path", Text(), nullable=False),
        Column("manifest", Text(), nullable=False),
        Column("parent_version", Text()),
        Column("inherits_lineage", Boolean(), nullable=False),
        Column("run_id", Text()),
        Column("state", Text(), nullable=False),
        Column("card", Text(), nullable=False),
        Column("created_at_ms", BigInteger(), nullable=False),
        Column("tainted_at_ms", BigInteger()),
        PrimaryKeyConstraint("tenant", "project", "version", name="pk_policies"),
    )
    op.create_index("ix_policies_content_hash", "policies", ["content_hash"])
    op.create_index("ix_policies_run_id", "policies", ["run_id"])
    op.create_table(
        "run_inputs",
        Column("run_id", Text(), nullable=False),
        Column("feedback_seq", BigInteger(), nullable=False),
        Column("split", Text(), nullable=False),
        Column("reason", Text()),
        PrimaryKeyConstraint("run_id", "feedback_seq", name="pk_run_inputs"),
    )
    op.create_index("ix_run_inputs_feedback_seq", "run_inputs", ["feedback_seq"])
    op.create_table(
        "runs",
        Column("run_id", Text(), nullable=False),
        Column("tenant", Text(), nullable=False),
        Column("project", Text(), nullable=False),
        Column("method", Text(), nullable=False),
        Column("stage", Text(), nullable=False),
        Column("status", Text(), nullable=False),
        Column("dataset_id", Text()),
        Column("from_log_seq", BigInteger()),
        Column("to_log_seq", BigInteger()),
        Column("start_version", Text()),
        Column("policy_version", Text()),
        Column("config", Text(), nullable=False),
        Column("seeds", Text(), nullable=False),
        Column("code_version", Text(), nullable=False),
        Column("evidence", Text(), nullable=False),
        Column("lease_owner", Text()),
        Column("lease_until_ms", BigInteger()),
        Column("created_at_ms", BigInteger(), nullable=False),
        Column("finished_at_ms", BigInteger()),
        Column("failure", Text()),
        Column("tainted_at_ms", BigInteger()),
        PrimaryKeyConstraint("run_id", name="pk_runs"),
    )
    op.create_index(
        "ix_runs_tenant_project_created_at_ms", "runs", ["tenant", "project", "created_at_ms"]
    )


def downgrade() -> None:
    """Drop the tables with all their rows."""
    for table in TABLES:
        op.drop_table(table)
