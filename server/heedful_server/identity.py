"""Who calls, and what they may do.

Owns the record that authentication produces and every door consumes; knows neither keys nor gRPC.
Plain data, read on the server's event loop.
"""

from dataclasses import dataclass
from typing import Final

from heedful_server.errors import PermissionDenied

GENERATE: Final = "generate"
FEEDBACK_OWN: Final = "feedback:own"
FEEDBACK_ANY: Final = "feedback:any"
TRAIN: Final = "train"
DEPLOY: Final = "deploy"
ADMIN: Final = "admin"
ERASE: Final = "erase"
ALL_SCOPES: Final = frozenset({GENERATE, FEEDBACK_OWN, FEEDBACK_ANY, TRAIN, DEPLOY, ADMIN, ERASE})


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller; a project of None may act in every project of its tenant."""

    tenant: str
    key_id: str
    scopes: frozenset[str]
    project: str | None = None

    def require(self, *scopes: str) -> None:
        """Raise PermissionDenied unless the caller has one of the scopes.

        "feedback:any" includes "feedback:own".
        """
        includes_own = FEEDBACK_OWN in scopes and FEEDBACK_ANY in self.scopes
        if not includes_own and not self.scopes.intersection(scopes):
            wanted = " or ".join(repr(scope) for scope in scopes)
            raise PermissionDenied(f"this needs the scope {wanted}")


# Without keys, on loopback, whoever can connect is the operator.
LOCAL_CALLER: Final = Caller(tenant="local", key_id="", scopes=ALL_SCOPES)
