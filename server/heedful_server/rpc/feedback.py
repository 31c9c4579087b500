"""FeedbackService: a thin layer between messages and the application layer.

Owns no rules and no state: messages are validated by feedback_rules.py and its neighbours, answered
by heedful_server.feedback and turned back by feedback_convert.py; the interceptor turns exceptions
into statuses. Runs on the event loop.
"""
# ruff: noqa: N802 - the contract names the methods

from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio
import structlog
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1.feedback_pb2_grpc import FeedbackServiceServicer

from heedful_server.errors import HeedfulServerError, InvalidRequest
from heedful_server.feedback import erasing
from heedful_server.feedback.access import scope_of
from heedful_server.feedback.comparing import Comparing
from heedful_server.feedback.desk import FeedbackDesk
from heedful_server.feedback.importing import Importer
from heedful_server.feedback.opening import FeedbackParts
from heedful_server.feedback.reading import FeedbackReader, LoggedAnswer
from heedful_server.feedback.submission import ImportedItem, Submission
from heedful_server.identity import Caller
from heedful_server.rpc import compare_rules, feedback_convert, feedback_rules, import_rules
from heedful_server.rpc.call import caller, current_call
from heedful_server.security.quota import Quota
from heedful_server.setting_groups import LimitSettings

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_SOURCE = "rpc"


class FeedbackService(FeedbackServiceServicer):
    """Records judgements and says what became of them."""

    def __init__(
        self,
        parts: FeedbackParts,
        desk: FeedbackDesk,
        reader: FeedbackReader,
        comparing: Comparing,
        importer: Importer,
        limits: LimitSettings,
        quota: Quota,
    ) -> None:
        self._parts = parts
        self._desk = desk
        self._reader = reader
        self._comparing = comparing
        self._importer = importer
        self._limits = limits
        self._quota = quota

    async def Compare(self, request: pb.CompareRequest, context: Context) -> pb.CompareResponse:
        """Generate a blind set of candidates."""
        wanted = compare_rules.comparison_request(request, self._limits)
        question = await self._comparing.compare(wanted, current_call.get())
        return pb.CompareResponse(comparison=feedback_convert.comparison(question))

    async def SubmitFeedback(
        self, request: pb.SubmitFeedbackRequest, context: Context
    ) -> pb.SubmitFeedbackResponse:
        """Record one judgement."""
        who = caller()
        scope = scope_of(who, request.project)
        said = feedback_rules.submission(request.event, "event.", scope, _SOURCE, who.key_id)
        self._quota.take(who.tenant)
        receipt = await self._desk.submit(who, said)
        return pb.SubmitFeedbackResponse(receipt=feedback_convert.receipt(receipt))

    async def SubmitFeedbackBatch(
        self, request: pb.SubmitFeedbackBatchRequest, context: Context
    ) -> pb.SubmitFeedbackBatchResponse:
        """Record several judgements, each with its own outcome."""
        who = caller()
        feedback_rules.require_batch(len(request.events))
        self._quota.take(who.tenant, len(request.events))
        outcomes = await self._desk.submit_batch(who, _submissions(request, who))
        items = [feedback_convert.batch_item(outcome) for outcome in outcomes]
        return pb.SubmitFeedbackBatchResponse(items=items)

    async def RetractFeedback(
        self, request: pb.RetractFeedbackRequest, context: Context
    ) -> pb.RetractFeedbackResponse:
        """Withdraw a judgement."""
        who = caller()
        scope = scope_of(who, request.project)
        feedback_rules.require_id("retraction_id", request.retraction_id)
        feedback_rules.require_id("feedback_id", request.feedback_id)
        if request.retraction_id == request.feedback_id:
            raise InvalidRequest("retraction_id", "must be an id of its own")
        self._quota.take(who.tenant)
        receipt = await self._desk.retract(
            who, scope, request.retraction_id, request.feedback_id, request.token
        )
        return pb.RetractFeedbackResponse(receipt=feedback_convert.receipt(receipt))

    async def GetFeedback(
        self, request: pb.GetFeedbackRequest, context: Context
    ) -> pb.GetFeedbackResponse:
        """Return a judgement and what became of it."""
        who = caller()
        scope = scope_of(who, request.project)
        feedback_rules.require_id("feedback_id", request.feedback_id)
        found = await self._reader.get(who, scope, request.feedback_id, request.token)
        return pb.GetFeedbackResponse(record=feedback_convert.record(found))

    async def ListFeedback(
        self, request: pb.ListFeedbackRequest, context: Context
    ) -> pb.ListFeedbackResponse:
        """List judgements in the order of the log."""
        wanted = feedback_rules.page(request, scope_of(caller(), request.project))
        found = await self._reader.page(wanted)
        is_last = len(found) < wanted.size
        return pb.ListFeedbackResponse(
            records=[feedback_convert.record(record) for record in found],
            next_page_token="" if is_last else str(found[-1].stored.seq),
        )

    async def ExportFeedback(
        self, request: pb.ExportFeedbackRequest, context: Context
    ) -> AsyncGenerator[pb.ExportFeedbackResponse, None]:
        """Stream the log, oldest first."""
        scope = scope_of(caller(), request.project)
        after_seq = feedback_rules.cursor("after_seq", request.after_seq)
        criteria = feedback_rules.criteria(request.filter, scope)
        async for record in self._reader.export(criteria, after_seq):
            message = pb.ExportFeedbackResponse(record=feedback_convert.record(record))
            for answer in record.answers if request.include_completions else ():
                logged = LoggedAnswer(answer, answer.completion_id in record.blind)
                message.completions.append(feedback_convert.logged_completion(logged))
            yield message

    async def NextQuestion(
        self, request: pb.NextQuestionRequest, context: Context
    ) -> pb.NextQuestionResponse:
        """Return the oldest comparison without a vote."""
        who = caller()
        scope = scope_of(who, request.project)
        end_user = feedback_rules.require_name("end_user", request.end_user)
        question, num_open = await self._comparing.next_question(who, scope, end_user)
        response = pb.NextQuestionResponse(open_count=num_open)
        if question is not None:
            response.comparison.CopyFrom(feedback_convert.comparison(question))
        return response

    async def EraseUser(
        self, request: pb.EraseUserRequest, context: Context
    ) -> pb.EraseUserResponse:
        """Remove a person's content."""
        who = caller()
        scope = scope_of(who, request.project) if request.project or who.project else None
        end_user = feedback_rules.require_name("end_user", request.end_user)
        report = await erasing.erase(self._parts, who.tenant, scope, end_user)
        log.info("erased a user", erasure_id=report.erasure_id, scrubbed=report.scrubbed)
        return feedback_convert.erasure(report)

    async def ImportFeedback(
        self, request: pb.ImportFeedbackRequest, context: Context
    ) -> pb.ImportFeedbackResponse:
        """Record existing data, each record with its own outcome."""
        who = caller()
        scope = scope_of(who, request.project)
        feedback_rules.require_batch(len(request.items), "items")
        source = import_rules.require_source(request.source)
        self._quota.take(who.tenant, len(request.items))
        items = [self._import_item(item, i) for i, item in enumerate(request.items)]
        outcomes = await self._importer.import_items(scope, source, who.key_id, items)
        return pb.ImportFeedbackResponse(items=map(feedback_convert.batch_item, outcomes))

    async def SummarizeFeedback(
        self, request: pb.SummarizeFeedbackRequest, context: Context
    ) -> pb.SummarizeFeedbackResponse:
        """Return the log in numbers."""
        scope = scope_of(caller(), request.project)
        found, backlog = await self._reader.summary(scope)
        return feedback_convert.summary(found, backlog)

    def _import_item(self, item: pb.ImportItem, index: int) -> ImportedItem | HeedfulServerError:
        try:
            return import_rules.item(item, f"items[{index}].", self._limits)
        except InvalidRequest as error:
            return error


def _submissions(
    request: pb.SubmitFeedbackBatchRequest, who: Caller
) -> list[Submission | HeedfulServerError]:
    scope = scope_of(who, request.project)
    found: list[Submission | HeedfulServerError] = []
    for i, event in enumerate(request.events):
        try:
            path = f"events[{i}]."
            found.append(feedback_rules.submission(event, path, scope, _SOURCE, who.key_id))
        except InvalidRequest as error:
            found.append(error)
    return found
