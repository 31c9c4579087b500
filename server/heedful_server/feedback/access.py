"""Which log a caller writes to and reads from, and what proves that it may judge an answer.

Owns the two rules that every door of feedback shares: a project of one's own tenant, and either
the scope `feedback:any` or the token that came with the answer. Pure functions.
"""

from heedful_store import DEFAULT_PROJECT, SCOPE_NAME_RULE, NotFound, Scope, is_scope_name

from heedful_server import errors
from heedful_server.feedback.tokens import BadToken, Claims, TokenKind, Tokens
from heedful_server.identity import FEEDBACK_ANY, Caller

# One wording for what does not exist and for what is somebody else's.
UNKNOWN_TARGET = "the answer or comparison that is judged"


def scope_of(caller: Caller, project: str) -> Scope:
    """Return the log of a project; nothing names "default" or the only one that a key opens.

    A project exists from its first request on, for callers that may act in all of their tenant's.

    Raises:
        NotFound: it is not the caller's.
        InvalidRequest: names `project`: it cannot be a name of a project.
    """
    if caller.project is not None:
        if project not in ("", DEFAULT_PROJECT, caller.project):
            raise errors.NotFound(f"no project {project[:80]!r}; the key opens {caller.project!r}")
        return Scope(caller.tenant, caller.project)
    name = project or DEFAULT_PROJECT
    if not is_scope_name(name):
        raise errors.InvalidRequest("project", f"must be {SCOPE_NAME_RULE}")
    return Scope(caller.tenant, name)


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
