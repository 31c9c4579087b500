"""What a refresh and a promotion record: progress and control of runs, verdicts, reasons.

Owns this one step of the schema and its way back; ``registry_schema`` explains the columns. Written
once: a later change is a later step.
"""

from alembic import op
from sqlalchemy import Column, Text

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Rows written before this step read as these defaults.
NEW_COLUMNS = {
    "policies": {"method": "", "verdict": ""},
    "deployments": {"base_id": "", "alias": "", "verdict": "", "reason": ""},
    "runs": {"kind": "refresh", "progress": "{}", "control": "", "verdict": ""},
}


def upgrade() -> None:
    """Add the columns, and the counter whose lock orders the registry's writes."""
    for table, columns in NEW_COLUMNS.items():
        for name, default in columns.items():
            op.add_column(table, Column(name, Text(), nullable=False, server_default=default))
    op.execute(
        "INSERT INTO counters (name, value) "
        "SELECT 'deployments', COALESCE(MAX(deployment_id), 0) FROM deployments"
    )


def downgrade() -> None:
    """Drop the columns with what they hold."""
    op.execute("DELETE FROM counters WHERE name = 'deployments'")
    for table, columns in NEW_COLUMNS.items():
        for name in columns:
            op.drop_column(table, name)
