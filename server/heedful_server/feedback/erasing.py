"""Erasing a person, as far as the server is concerned.

Owns that an erasure is not narrower than it was asked to be, and that this process forgets too;
what "erased" means in the log is the store's. Event loop.
"""

import asyncio

from heedful_store import ErasureReport, Scope

from heedful_server.errors import InvalidRequest, PreconditionFailed
from heedful_server.feedback import queries
from heedful_server.feedback.opening import FeedbackParts


async def erase(
    parts: FeedbackParts, tenant: str, scope: Scope | None, end_user: str
) -> ErasureReport:
    """Erase a person in a tenant's projects.

    Args:
        parts: the log.
        tenant: whose end user it is.
        scope: the one project to erase in; None stands for all of the tenant's.
        end_user: the app's id of the person.

    Raises:
        InvalidRequest: no person is named.
        PreconditionFailed: one project is named, and the person has data in others too.
        StoreError: as Store.erase_user does.
    """
    if not end_user:
        raise InvalidRequest("end_user", "must not be empty")
    if scope is not None and await asyncio.to_thread(_is_elsewhere, parts, scope, end_user):
        raise PreconditionFailed(
            "this person has data in other projects of the tenant too, and an erasure takes in "
            "all of them; leave the project empty, with a key for the whole tenant"
        )
    report = await parts.store.erase_user(tenant, end_user)
    parts.recent.forget_people()
    return report


def _is_elsewhere(parts: FeedbackParts, scope: Scope, end_user: str) -> bool:
    with parts.store.read() as connection:
        return queries.has_data_elsewhere(connection, scope, end_user)
