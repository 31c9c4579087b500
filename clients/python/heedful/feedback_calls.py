"""What people think of completions: the half of the client that records and reads it.

Owns those methods and the ids of what they submit; `client.py` owns the rest and builds on this
class. `transport.py` owns retries: every judgement carries its id, so a repeated attempt is
recognised and its duplicate receipt is success. Lives on the event loop of its client.
"""

import dataclasses
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import TypeAlias, Unpack

import grpc.aio
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import inference_pb2

from heedful import feedback_replies as replies
from heedful import feedback_requests as requests
from heedful.errors import HeedfulError, error_from_rpc
from heedful.feedback_types import (
    CompareOptions,
    Comparison,
    Correction,
    Critique,
    Erasure,
    Event,
    ExportedFeedback,
    FeedbackFilter,
    FeedbackOptions,
    FeedbackRecord,
    FeedbackSummary,
    ImportItem,
    Judged,
    LabelOptions,
    LoggedCompletion,
    OpenQuestion,
    Placed,
    Rating,
    Receipt,
    Thumb,
)
from heedful.ids import IdSource
from heedful.requests import assign
from heedful.transport import Transport
from heedful.types import Prompt

ATTEMPT_TIMEOUT_S = 10.0
"""Seconds after which an attempt to record something counts as lost and is repeated."""
BATCH_ATTEMPT_TIMEOUT_S = 60.0

_ExportCall: TypeAlias = grpc.aio.UnaryStreamCall[
    pb.ExportFeedbackRequest, pb.ExportFeedbackResponse
]


class FeedbackCalls:
    """The methods of `AsyncClient` that concern feedback."""

    def __init__(self, transport: Transport, project: str) -> None:
        self.project = project
        self._transport = transport
        self._ids = IdSource()

    async def rate(
        self,
        completion: Judged,
        up: bool = True,
        reasons: Sequence[str] = (),
        **options: Unpack[FeedbackOptions],
    ) -> Receipt:
        """Records a thumb up or down; the receipt means that it is durable.

        Raises:
            HeedfulError: see `heedful.errors`.
            TypeError: an option is unknown, or `completion` is something else.
        """
        thumb = Thumb(up, _texts(reasons, "reasons"))
        return await self._submit(requests.event_about(completion, thumb, options), options)

    async def grade(
        self, completion: Judged, value: int, **options: Unpack[FeedbackOptions]
    ) -> Receipt:
        """Records a grade from 1 (worst) to 7 (best).

        Raises:
            HeedfulError, TypeError: as for `rate`.
        """
        event = requests.event_about(completion, Rating(value), options)
        return await self._submit(event, options)

    async def rank(
        self,
        shown: Comparison | Sequence[Judged],
        order: Sequence[Placed | Sequence[Placed]] | None = None,
        *,
        all_bad: bool = False,
        **options: Unpack[FeedbackOptions],
    ) -> Receipt:
        """Records an order of completions, best first; those in an inner sequence are tied.

        Args:
            shown: a comparison, or completions.
            order: completions, candidates, ids or positions in `shown`. Default: `shown` itself is
                the order; with `all_bad`, all of them tied.
            all_bad: none of them is acceptable.
            options: see `FeedbackOptions`.

        Raises:
            HeedfulError, TypeError: as for `rate`.
        """
        event = requests.event_of_ranking(shown, order, all_bad, options)
        return await self._submit(event, options)

    async def correct(
        self, completion: Judged, text: str, **options: Unpack[FeedbackOptions]
    ) -> Receipt:
        """Records what the completion should have been.

        Raises:
            HeedfulError, TypeError: as for `rate`.
        """
        event = requests.event_about(completion, Correction(text), options)
        return await self._submit(event, options)

    async def critique(
        self,
        completion: Judged,
        text: str,
        aspects: Sequence[str] = (),
        **options: Unpack[FeedbackOptions],
    ) -> Receipt:
        """Records in words what is wrong or right.

        Raises:
            HeedfulError, TypeError: as for `rate`.
        """
        critique = Critique(text, _texts(aspects, "aspects"))
        return await self._submit(requests.event_about(completion, critique, options), options)

    async def label(self, completion: Judged, **flags: Unpack[LabelOptions]) -> Receipt:
        """Records InstructGPT's metadata flags, for example `hallucination=True`; see `Label`.

        Raises:
            HeedfulError, TypeError: as for `rate`.
        """
        label, options = requests.label_and_options(flags)
        return await self._submit(requests.event_about(completion, label, options), options)

    async def compare(
        self, prompt: Prompt, k: int = 2, **options: Unpack[CompareOptions]
    ) -> Comparison:
        """Generates `k` (2 to 9) blind candidates; `rank` records which of them is better.

        Raises:
            HeedfulError, TypeError: as for `generate`.
        """
        request = requests.compare_request(prompt, k, options, self.project)
        deadline = self._transport.deadline(options.get("timeout_s"))
        response = await self._transport.unary(
            self._transport.stubs.feedback.Compare, request, deadline=deadline, repeatable=False
        )
        return replies.comparison_from_wire(response.comparison)

    async def next_question(
        self, *, end_user: str | None = None, timeout_s: float | None = None
    ) -> OpenQuestion:
        """Returns the comparison whose answer would teach most, if one is open.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        request = pb.NextQuestionRequest(project=self.project, end_user=end_user or "")
        response = await self._transport.unary(
            self._transport.stubs.feedback.NextQuestion,
            request,
            deadline=self._transport.deadline(timeout_s),
            repeatable=True,
        )
        return replies.question_from_wire(response)

    async def submit(
        self, events: Iterable[Event], *, timeout_s: float | None = None
    ) -> tuple[Receipt | HeedfulError, ...]:
        """Records judgements in batches and returns for each its receipt or why it was refused.

        Events without an id get one; to repeat a failed call safely, give them ids yourself. The
        limit `timeout_s` is for each batch.

        Raises:
            HeedfulError: a whole batch failed; those before it are recorded.
        """
        given = [self._with_id(event) for event in events]
        wires = [
            requests.event_to_wire(event, f"events[{event_idx}]")
            for event_idx, event in enumerate(given)
        ]
        items: list[pb.BatchItem] = []
        for batch in requests.batches(wires):
            request = pb.SubmitFeedbackBatchRequest(events=batch, project=self.project)
            response = await self._transport.unary(
                self._transport.stubs.feedback.SubmitFeedbackBatch,
                request,
                deadline=self._transport.deadline(timeout_s),
                repeatable=True,
                attempt_timeout_s=BATCH_ATTEMPT_TIMEOUT_S,
            )
            items += response.items
        return tuple(
            replies.outcome_from_wire(item, event.completion_token or event.comparison_token)
            for item, event in zip(items, given, strict=True)
        )

    async def retract(
        self,
        feedback: str | Receipt,
        *,
        token: str | None = None,
        retraction_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Receipt:
        """Withdraws a judgement, named by its receipt or its id.

        Args:
            feedback: the judgement.
            token: of what was judged, where only the id is given.
            retraction_id: UUIDv7 under which a repeated call is recognised; default: a new one.
            timeout_s: seconds for the call with its retries.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        feedback_id, known_token = requests.reference(feedback, token)
        request = pb.RetractFeedbackRequest(
            retraction_id=retraction_id or self._ids.next(),
            feedback_id=feedback_id,
            token=known_token,
            project=self.project,
        )
        response = await self._transport.unary(
            self._transport.stubs.feedback.RetractFeedback,
            request,
            deadline=self._transport.deadline(timeout_s),
            repeatable=True,
            attempt_timeout_s=ATTEMPT_TIMEOUT_S,
        )
        return replies.receipt_from_wire(response.receipt, known_token)

    async def feedback(
        self, feedback: str | Receipt, *, token: str | None = None, timeout_s: float | None = None
    ) -> FeedbackRecord:
        """Returns a judgement, named by its receipt or its id, and what became of it.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        feedback_id, known_token = requests.reference(feedback, token)
        request = pb.GetFeedbackRequest(
            feedback_id=feedback_id, token=known_token, project=self.project
        )
        response = await self._transport.unary(
            self._transport.stubs.feedback.GetFeedback,
            request,
            deadline=self._transport.deadline(timeout_s),
            repeatable=True,
        )
        return replies.record_from_wire(response.record)

    async def list_feedback(
        self,
        *,
        page_size: int = 100,
        timeout_s: float | None = None,
        **criteria: Unpack[FeedbackFilter],
    ) -> AsyncGenerator[FeedbackRecord, None]:
        """Yields judgements in the order of the log, page by page; `timeout_s` is for a page.

        Raises:
            HeedfulError: see `heedful.errors`.
            TypeError: a criterion is unknown.
        """
        request = pb.ListFeedbackRequest(project=self.project)
        request.filter.CopyFrom(requests.filter_to_wire(criteria))
        assign(request, "page_size", page_size, "page_size")
        while True:
            page = await self._transport.unary(
                self._transport.stubs.feedback.ListFeedback,
                request,
                deadline=self._transport.deadline(timeout_s),
                repeatable=True,
            )
            for record in page.records:
                yield replies.record_from_wire(record)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def export_feedback(
        self,
        *,
        after_seq: int = 0,
        include_completions: bool = False,
        timeout_s: float | None = None,
        **criteria: Unpack[FeedbackFilter],
    ) -> AsyncGenerator[ExportedFeedback, None]:
        """Yields the log after position `after_seq`, oldest first.

        Tried again only before the first event; afterwards go on after the `seq` of the last one.

        Raises:
            HeedfulError: see `heedful.errors`.
            TypeError: a criterion is unknown.
        """
        request = pb.ExportFeedbackRequest(
            project=self.project, include_completions=include_completions
        )
        assign(request, "after_seq", after_seq, "after_seq")
        request.filter.CopyFrom(requests.filter_to_wire(criteria))
        deadline = self._transport.deadline(timeout_s)

        async def begin() -> tuple[_ExportCall, pb.ExportFeedbackResponse | None]:
            call = self._transport.stubs.feedback.ExportFeedback(
                request, timeout=deadline.remaining_s(), metadata=self._transport.metadata
            )
            return call, await _read(call)

        call, message = await self._transport.attempts(begin, deadline=deadline, repeatable=True)
        try:
            while message is not None:
                yield replies.exported_from_wire(message)
                message = await _read(call)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        finally:
            call.cancel()

    async def import_feedback(
        self,
        items: Iterable[ImportItem],
        *,
        source: str = "",
        timeout_s: float | None = None,
    ) -> tuple[Receipt | HeedfulError, ...]:
        """Records existing data in batches; an item whose id was imported before is a duplicate.

        The limit `timeout_s` is for each batch, of at most 1000 items.

        Raises:
            HeedfulError: a whole batch failed; those before it are recorded.
        """
        wires = (
            requests.import_item_to_wire(item, f"items[{item_idx}]")
            for item_idx, item in enumerate(items)
        )
        outcomes: list[Receipt | HeedfulError] = []
        for batch in requests.batches(wires):
            request = pb.ImportFeedbackRequest(items=batch, project=self.project, source=source)
            response = await self._transport.unary(
                self._transport.stubs.feedback.ImportFeedback,
                request,
                deadline=self._transport.deadline(timeout_s),
                repeatable=True,
                attempt_timeout_s=BATCH_ATTEMPT_TIMEOUT_S,
            )
            outcomes += (replies.outcome_from_wire(item) for item in response.items)
        return tuple(outcomes)

    async def erase_user(
        self, end_user: str, *, every_project: bool = False, timeout_s: float | None = None
    ) -> Erasure:
        """Removes what an end user wrote and got, in this project or in every one of the tenant.

        Repeating it is harmless, but counts only what was left; so a lost answer is not retried.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        project = "" if every_project else self.project
        response = await self._transport.unary(
            self._transport.stubs.feedback.EraseUser,
            pb.EraseUserRequest(end_user=end_user, project=project),
            deadline=self._transport.deadline(timeout_s),
            repeatable=False,
        )
        return replies.erasure_from_wire(response)

    async def summarize_feedback(self, *, timeout_s: float | None = None) -> FeedbackSummary:
        """Returns approval, reasons, worst prompts and agreement between raters.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        response = await self._transport.unary(
            self._transport.stubs.feedback.SummarizeFeedback,
            pb.SummarizeFeedbackRequest(project=self.project),
            deadline=self._transport.deadline(timeout_s),
            repeatable=True,
        )
        return replies.summary_from_wire(response)

    async def completion(
        self, completion: Judged, *, token: str | None = None, timeout_s: float | None = None
    ) -> LoggedCompletion:
        """Returns a completion as it was logged, with prompt, sampling and version.

        Raises:
            HeedfulError: see `heedful.errors`.
        """
        completion_id, known_token = requests.name_and_token(completion)
        request = inference_pb2.GetCompletionRequest(
            completion_id=completion_id, completion_token=token or known_token, project=self.project
        )
        response = await self._transport.unary(
            self._transport.stubs.inference.GetCompletion,
            request,
            deadline=self._transport.deadline(timeout_s),
            repeatable=True,
        )
        return replies.logged_completion_from_wire(response.completion)

    async def _submit(self, event: Event, options: FeedbackOptions) -> Receipt:
        event = self._with_id(event)
        request = pb.SubmitFeedbackRequest(
            event=requests.event_to_wire(event), project=self.project
        )
        response = await self._transport.unary(
            self._transport.stubs.feedback.SubmitFeedback,
            request,
            deadline=self._transport.deadline(options.get("timeout_s")),
            repeatable=True,
            attempt_timeout_s=ATTEMPT_TIMEOUT_S,
        )
        token = event.completion_token or event.comparison_token
        return replies.receipt_from_wire(response.receipt, token)

    def _with_id(self, event: Event) -> Event:
        if event.feedback_id:
            return event
        return dataclasses.replace(event, feedback_id=self._ids.next())


async def _read(call: _ExportCall) -> pb.ExportFeedbackResponse | None:
    message = await call.read()
    return message if isinstance(message, pb.ExportFeedbackResponse) else None


def _texts(values: Sequence[str], name: str) -> tuple[str, ...]:
    if isinstance(values, str):
        raise TypeError(f"{name} is a sequence of str, not a str")
    return tuple(values)
