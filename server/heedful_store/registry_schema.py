"""Tables of training and deployment: policies, aliases, deployments, runs, run inputs, jobs.

Owns columns and their meaning; ``policies``, ``deployments`` and ``runs`` own their rows, an
erasure marks what it taints. Same conventions as ``schema``.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
)

from heedful_store.schema import RowId, metadata

policies = Table(
    "policies",
    metadata,
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("version", Text, nullable=False),  # name within the project
    Column("content_hash", Text, nullable=False),  # of the adapter's files
    Column("base_id", Text, nullable=False),  # base model and tokenizer it belongs to
    Column("template_hash", Text, nullable=False),
    Column("role", Text, nullable=False),  # policy, reward, value, reference
    Column("path", Text, nullable=False),  # directory of the adapter, below the home
    Column("manifest", Text, nullable=False),  # JSON: SHA-256 per file
    Column("parent_version", Text),  # what it started from; NULL: the base
    Column("inherits_lineage", Boolean, nullable=False),  # parent's data is in these weights
    Column("run_id", Text),  # the run that made it
    Column("state", Text, nullable=False),  # policies.PolicyState
    Column("card", Text, nullable=False),  # JSON: data counts and gate evidence
    Column("created_at_ms", BigInteger, nullable=False),
    Column("tainted_at_ms", BigInteger),  # holds an erased user's words
    Column("method", Text, nullable=False, server_default=""),  # sft, dpo, kto, ppo_ptx
    Column("verdict", Text, nullable=False, server_default=""),  # the gate's
    PrimaryKeyConstraint("tenant", "project", "version"),
    Index(None, "run_id"),
    Index(None, "content_hash"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("base_id", Text, nullable=False),  # aliases are per base
    Column("alias", Text, nullable=False),  # champion, challenger
    Column("version", Text, nullable=False),
    Column("moved_at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant", "project", "base_id", "alias"),
)

# Append-only record of every move of an alias and every verdict. Ids are given under the counter's
# lock, so that one becomes visible only after every smaller one.
deployments = Table(
    "deployments",
    metadata,
    Column("deployment_id", RowId, primary_key=True, autoincrement=True),  # see deployments.py
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("action", Text, nullable=False),  # publish, canary, promote, reject, roll_back
    Column("version", Text, nullable=False),  # to this one; empty: the alias went away
    Column("previous_version", Text),  # from this one
    Column("actor", Text, nullable=False),  # key, user or "gate"
    Column("approved", Boolean, nullable=False),  # by a person, without proof
    Column("evidence", Text, nullable=False),  # JSON
    Column("at_ms", BigInteger, nullable=False),
    Column("base_id", Text, nullable=False, server_default=""),
    Column("alias", Text, nullable=False, server_default=""),  # empty: no alias moved
    Column("verdict", Text, nullable=False, server_default=""),  # proven, approved, rolled back
    Column("reason", Text, nullable=False, server_default=""),  # for people
    Index(None, "tenant", "project", "at_ms"),
    Index(None, "tenant", "project", "version"),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("method", Text, nullable=False),  # sft, dpo, kto, ppo_ptx
    Column("stage", Text, nullable=False),  # snapshot, reward, policy, gate, publish, done
    Column("status", Text, nullable=False),  # runs.RunStatus
    Column("dataset_id", Text),  # content hash of the snapshot
    Column("from_log_seq", BigInteger),  # cursor before the first event read
    Column("to_log_seq", BigInteger),  # cursor of the last event read
    Column("start_version", Text),
    Column("policy_version", Text),  # what it published
    Column("config", Text, nullable=False),  # JSON
    Column("seeds", Text, nullable=False),  # JSON
    Column("code_version", Text, nullable=False),
    Column("evidence", Text, nullable=False),  # JSON by stage
    Column("lease_owner", Text),  # process that works on it
    Column("lease_until_ms", BigInteger),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("finished_at_ms", BigInteger),
    Column("failure", Text),
    Column("tainted_at_ms", BigInteger),  # an input was erased
    Column("kind", Text, nullable=False, server_default="refresh"),  # refresh, rebuild
    Column("progress", Text, nullable=False, server_default="{}"),  # JSON: fraction, figures
    Column("control", Text, nullable=False, server_default=""),  # pause, stop: asked for, not done
    Column("verdict", Text, nullable=False, server_default=""),  # the gate's
    Index(None, "tenant", "project", "created_at_ms"),
)

run_inputs = Table(
    "run_inputs",
    metadata,
    Column("run_id", Text, nullable=False),
    Column("feedback_seq", BigInteger, nullable=False),
    Column("split", Text, nullable=False),  # train, validation, calibration, gate, excluded
    Column("reason", Text),  # why excluded
    PrimaryKeyConstraint("run_id", "feedback_seq"),
    Index(None, "feedback_seq"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("kind", Text, nullable=False),  # refresh, rebuild, import, prune
    Column("status", Text, nullable=False),  # queued, running, failed, finished
    Column("arguments", Text, nullable=False),  # JSON
    Column("attempts", Integer, nullable=False),
    Column("run_after_ms", BigInteger, nullable=False),
    Column("lease_owner", Text),
    Column("lease_until_ms", BigInteger),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("finished_at_ms", BigInteger),
    Column("failure", Text),
    Index(None, "status", "run_after_ms"),
)
