"""The store that server and trainer share: what was answered, and what people said about it.

Owns the public names of the package; ``store`` holds the object behind them. It imports nothing
else of ours, no torch and no gRPC. See ``Store`` for threads.
"""

from heedful_store.ack import Ack
from heedful_store.adapter_files import AdapterInfo, AdapterManifest
from heedful_store.completions import PruneReport, prompt_hash
from heedful_store.database import DatabaseOptions, downgrade, migrate, sqlite_warning
from heedful_store.deployments import Action, Alias, Deployment
from heedful_store.eligibility import Counts, Fate, Profile, Reason, RunUse, Tier, fate_of
from heedful_store.erasure import ErasureReport
from heedful_store.errors import (
    AdapterDamaged,
    AliasMoved,
    AlreadyExists,
    ForeignAdapter,
    Invalid,
    LeaseLost,
    NotFound,
    Rejected,
    SchemaMismatch,
    StoreBusy,
    StoreClosed,
    StoreDead,
    StoreError,
    StoreFault,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
    Unready,
)
from heedful_store.failpoints import FailpointError, Failpoints
from heedful_store.fates import Judged
from heedful_store.ids import is_uuid7, now_ms, uuid7
from heedful_store.judgements import (
    LABEL_FLAGS,
    Correction,
    Critique,
    Judgement,
    Label,
    Ranking,
    Rating,
    Retraction,
    Thumb,
)
from heedful_store.keys import KEY_SCOPES, ApiKey, NewKey
from heedful_store.policies import BASE_VERSION, PolicyState, PolicyVersion, Role
from heedful_store.projects import Project
from heedful_store.records import (
    DEFAULT_PROJECT,
    DEFAULT_TENANT,
    SCOPE_NAME_RULE,
    Candidate,
    Comparison,
    Completion,
    CompletionPayload,
    Consent,
    FeedbackEvent,
    FeedbackFilter,
    Receipt,
    Scope,
    StoredFeedback,
    is_scope_name,
)
from heedful_store.runs import Control, Run, RunChanges, RunInput, RunKind, RunStatus, Split
from heedful_store.store import Store, open_store
from heedful_store.summary import Agreement, Approval, PromptScore, Summary
from heedful_store.waiting import SweepReport
from heedful_store.writer import GroupReport, WriterOptions, WriterStats

__all__ = [
    "BASE_VERSION",
    "DEFAULT_PROJECT",
    "DEFAULT_TENANT",
    "KEY_SCOPES",
    "LABEL_FLAGS",
    "SCOPE_NAME_RULE",
    "Ack",
    "Action",
    "AdapterDamaged",
    "AdapterInfo",
    "AdapterManifest",
    "Agreement",
    "Alias",
    "AliasMoved",
    "AlreadyExists",
    "ApiKey",
    "Approval",
    "Candidate",
    "Comparison",
    "Completion",
    "CompletionPayload",
    "Consent",
    "Control",
    "Correction",
    "Counts",
    "Critique",
    "DatabaseOptions",
    "Deployment",
    "ErasureReport",
    "FailpointError",
    "Failpoints",
    "Fate",
    "FeedbackEvent",
    "FeedbackFilter",
    "ForeignAdapter",
    "GroupReport",
    "Invalid",
    "Judged",
    "Judgement",
    "Label",
    "LeaseLost",
    "NewKey",
    "NotFound",
    "PolicyState",
    "PolicyVersion",
    "Profile",
    "Project",
    "PromptScore",
    "PruneReport",
    "Ranking",
    "Rating",
    "Reason",
    "Receipt",
    "Rejected",
    "Retraction",
    "Role",
    "Run",
    "RunChanges",
    "RunInput",
    "RunKind",
    "RunStatus",
    "RunUse",
    "SchemaMismatch",
    "Scope",
    "Split",
    "Store",
    "StoreBusy",
    "StoreClosed",
    "StoreDead",
    "StoreError",
    "StoreFault",
    "StoreFull",
    "StoreLocked",
    "StoreUnavailable",
    "StoredFeedback",
    "Summary",
    "SweepReport",
    "Thumb",
    "Tier",
    "Unready",
    "WriterOptions",
    "WriterStats",
    "downgrade",
    "fate_of",
    "is_scope_name",
    "is_uuid7",
    "migrate",
    "now_ms",
    "open_store",
    "prompt_hash",
    "sqlite_warning",
    "uuid7",
]
