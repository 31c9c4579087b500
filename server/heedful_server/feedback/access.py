"""Which log a caller writes to and reads from, and what proves that it may judge an answer.

Owns the two rules that every door of feedback shares: a project of one's own tenant, and either
the scope `feedback:any` or the token that came with the answer. Pure functions.
"""

from heedful_store import DEFAULT_PROJECT, NotFound, Scope

from heedful_server import errors
from heedful_server.feedback.tokens import BadToken, Claims, TokenKind, Tokens
from heedful_server.identity import FEEDBACK_ANY, Caller

# One wording for what does not exist and for what is somebody else's.
UNKNOWN_TARGET = "the answer or comparison that is judged"


def scope_of(caller: Caller, project: str) -> Scope:
    """Return the log of a project; "default" or nothing names the caller's own, where it has one.

    Raises NotFound for a project that does not exist or is not the caller's.
    """
    own = caller.project or DEFAULT_PROJECT
    if project not in ("", DEFAULT_PROJECT, own):
        raise errors.NotFound(f"no project {project[:80]!r}; this server has {own!r}")
    return Scope(caller.tenant, own)


def claims_of(
    tokens: Tokens, kind: TokenKind, token: str, id: str, field: str, caller: Caller, scope: Scope
) -> Claims | None:
    """Return what a token proves about an answer or comparison; None where none is needed.

    Raises:
        InvalidRequest: no token where one is needed, or none of this server, or an expired one.
        NotFound: it belongs to another tenant or project, or to something else than `id`.
    """
    if not token:
        if FEEDBACK_ANY in caller.scopes:
            return None
        raise errors.InvalidRequest(field, f"is needed without the scope {FEEDBACK_ANY!r}")
    try:
        claims = tokens.verify(token)
    except BadToken as refusal:
        raise errors.InvalidRequest(field, str(refusal)) from None
    if (claims.tenant, claims.project) != (scope.tenant, scope.project):
        raise NotFound(UNKNOWN_TARGET)
    if (claims.kind, claims.id) != (kind, id):
        raise NotFound(UNKNOWN_TARGET)
    return claims
