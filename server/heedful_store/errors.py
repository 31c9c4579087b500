"""What the store can answer instead of a result.

Owns the exception tree below; each docstring is the message that a caller sees. It knows no
status codes of gRPC or HTTP: the server maps the classes. Raised in any thread or process.

StoreError
├── Rejected              this item only; the same request will be refused again
│   ├── NotFound          unknown here, or somebody else's: the two look alike
│   ├── AlreadyExists     the id was used before with another payload
│   ├── Invalid           a field breaks a rule (has .field and .reason)
│   ├── AliasMoved        an alias does not point where the caller thought
│   ├── LeaseLost         another worker has the run
│   ├── AdapterDamaged    a file of an adapter is missing, altered or too much (.path .file .reason)
│   └── ForeignAdapter    an adapter belongs to another base model or template
├── Unready               nothing was acknowledged; the same request may be retried with its id
│   ├── StoreBusy         queue full
│   ├── StoreLocked       another process holds the database
│   ├── StoreFull         no space left
│   ├── StoreUnavailable  connection to PostgreSQL lost
│   ├── StoreDead         an I/O error ended this writer; reopen the store
│   └── StoreClosed       closed by its owner
├── SchemaMismatch        the database belongs to another version of heedful
└── StoreFault            a defect: an unexpected exception while one item was written
"""
# ruff: noqa: N818 - the names say the condition, as the design and the status mapping do

from __future__ import annotations

from pathlib import Path


class StoreError(Exception):
    """The store could not do what was asked."""

    def __init__(self, detail: str = "") -> None:
        self.detail = detail
        headline = (type(self).__doc__ or "").strip()
        super().__init__(f"{headline} {detail}".strip())


class Rejected(StoreError):
    """The request was refused."""


class NotFound(Rejected):
    """There is no such row."""


class AlreadyExists(Rejected):
    """This id is already taken by another payload."""


class Invalid(Rejected):
    """The request breaks a rule."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(f"{field}: {reason}")


class AliasMoved(Rejected):
    """The alias was moved meanwhile."""


class LeaseLost(Rejected):
    """The run is not leased to this worker."""


class AdapterDamaged(Rejected):
    """The adapter's files are not what was published."""

    def __init__(self, path: Path, file: str, reason: str) -> None:
        self.path = path
        self.file = file
        self.reason = reason
        super().__init__(f"{path}: {file}: {reason}")


class ForeignAdapter(Rejected):
    """The adapter belongs to another base model."""


class Unready(StoreError):
    """The store cannot write now; nothing was acknowledged."""


class StoreBusy(Unready):
    """The store's queue is full; retry later with the same id."""


class StoreLocked(Unready):
    """The database is locked by another process; retry later with the same id."""


class StoreFull(Unready):
    """The disk of the store is full; nothing was stored."""


class StoreUnavailable(Unready):
    """The database cannot be reached; retry with the same id, the write may have happened."""


class StoreDead(Unready):
    """The store stopped writing after an I/O error; reopen it once the disk is sound."""


class StoreClosed(Unready):
    """The store is closed."""


class SchemaMismatch(StoreError):
    """The database was made by another version of heedful."""


class StoreFault(StoreError):
    """The store failed on this request for a reason that it does not know."""
