"""FeedbackService in memory, on the small server of the client's tests.

Keeps the promises that a client relies on: one event per id, the same receipt for a repetition,
numbers that grow, tombstones, blind comparisons; nothing is durable. It is the other side of the
wire, not a stand-in for any part of the client.
"""

import asyncio
import re
from collections import Counter
from dataclasses import dataclass, field

import grpc
import heedful
import pytest
from heedful.cli.app import build_app
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import feedback_pb2_grpc, inference_pb2
from typer.testing import CliRunner

UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
VERSIONS = ("base", "v1")


class Refused(Exception):  # noqa: N818 - a status, not a fault
    """A status with the field that is wrong."""

    def __init__(self, code: grpc.StatusCode, message: str, field: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.field = code, message, field


def invalid(field: str, message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, message, field)


@dataclass
class Memory(feedback_pb2_grpc.FeedbackServiceServicer):
    """The log, what was asked, and answers that are to be lost after the event was recorded."""

    script: object
    refuse: object
    refusal: type
    records: dict[str, pb.FeedbackRecord] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)
    comparisons: dict[str, pb.Comparison] = field(default_factory=dict)
    voted: set[str] = field(default_factory=set)
    imported: dict[str, pb.ImportItem] = field(default_factory=dict)
    requests: list[object] = field(default_factory=list)
    lost_answers: int = 0
    hanging_answers: int = 0
    fail_export_after: int | None = None
    hide_completions: bool = False

    def of(self, kind: type) -> list:
        return [request for request in self.requests if isinstance(request, kind)]

    @property
    def events(self) -> list[pb.FeedbackEvent]:
        return [record.event for record in self.records.values()]

    async def _begin(self, request, context) -> None:
        self.script.attempts += 1
        self.requests.append(request)
        if self.script.refusals:
            await self.refuse(context, self.script.refusals.pop(0))

    async def _end(self, context) -> None:
        """Loses the answer to something that has already happened, where a test asks for it."""
        if self.hanging_answers:
            self.hanging_answers -= 1
            await asyncio.sleep(30)
        if self.lost_answers:
            self.lost_answers -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")

    async def _refuse(self, context, refused: Refused) -> None:
        await self.refuse(context, self.refusal(refused.code, refused.message, field=refused.field))

    def _receipt(self, record: pb.FeedbackRecord, status: int) -> pb.Receipt:
        receipt = pb.Receipt()
        receipt.CopyFrom(record.receipt)
        receipt.status = status
        return receipt

    def _append(self, key: str, payload: bytes, record: pb.FeedbackRecord) -> pb.Receipt:
        if key in self.records:
            if self.payloads[key] != payload:
                raise Refused(grpc.StatusCode.ALREADY_EXISTS, "same id, other payload")
            return self._receipt(self.records[key], pb.RECEIPT_STATUS_DUPLICATE)
        if not UUID7.fullmatch(key):
            raise invalid("event.feedback_id", "must be a UUIDv7")
        record.receipt.feedback_id = key
        record.receipt.seq = len(self.records) + 1
        record.receipt.server_time.FromSeconds(86_400 * len(self.records))
        record.receipt.status = pb.RECEIPT_STATUS_STORED
        record.current = True
        record.fate.kind = pb.FATE_KIND_WAITING
        self.records[key], self.payloads[key] = record, payload
        return self._receipt(record, pb.RECEIPT_STATUS_STORED)

    def _record(self, event: pb.FeedbackEvent) -> pb.Receipt:
        said = pb.FeedbackEvent()
        said.CopyFrom(event)
        for name in ("completion_token", "comparison_token"):
            said.ClearField(name)
        payload = pb.FeedbackEvent()
        payload.CopyFrom(said)
        payload.ClearField("client_time")
        record = pb.FeedbackRecord(event=said)
        if event.feedback_id not in self.records:
            record.policy_version = self._check(event)
        receipt = self._append(event.feedback_id, payload.SerializeToString(), record)
        if event.supersedes_id:
            self._close(event.supersedes_id, pb.FATE_KIND_SUPERSEDED)
        if event.comparison_id:
            self.voted.add(event.comparison_id)
        return receipt

    def _check(self, event: pb.FeedbackEvent) -> str:
        """Returns the version of what is judged."""
        match event.WhichOneof("kind"):
            case "ranking":
                self._check_ranking(event)
                return ""
            case "rating" if not 1 <= event.rating.value <= 7:
                raise invalid("event.rating.value", "must be 1 to 7")
            case "correction" if not event.correction.text.strip():
                raise invalid("event.correction.text", "is empty")
            case "critique" if len(event.critique.text) > 16 * 1024:
                raise invalid("event.critique.text", "is too long")
            case "label" if not event.label.ListFields():
                raise invalid("event.label", "says nothing")
            case None:
                raise invalid("event.kind", "is missing")
        logged = self._logged(event.completion_id)
        if event.completion_token not in ("", logged.completion.completion_token):
            raise invalid("event.completion_token", "is forged")
        return logged.served_by.policy_version

    def _check_ranking(self, event: pb.FeedbackEvent) -> None:
        named = [name for group in event.ranking.groups for name in group.completion_ids]
        if len(set(named)) != len(named):
            raise invalid("event.ranking.groups", "names a completion twice")
        if not event.comparison_id:
            for name in named:
                self._logged(name)
            return
        comparison = self.comparisons.get(event.comparison_id)
        if comparison is None:
            raise Refused(grpc.StatusCode.NOT_FOUND, "unknown comparison")
        if event.comparison_token not in ("", comparison.comparison_token):
            raise invalid("event.comparison_token", "is forged")
        if set(named) != {item.completion_id for item in comparison.candidates}:
            raise invalid("event.ranking.groups", "must name every completion shown once")

    def _logged(self, completion_id: str) -> inference_pb2.LoggedCompletion:
        if completion_id not in self.script.logged:
            raise Refused(grpc.StatusCode.NOT_FOUND, "unknown completion")
        return self.script.logged[completion_id]

    def _close(self, key: str, fate: int) -> None:
        if key not in self.records:
            raise Refused(grpc.StatusCode.NOT_FOUND, "unknown feedback")
        self.records[key].current = False
        self.records[key].fate.kind = fate

    async def SubmitFeedback(self, request, context):  # noqa: N802
        await self._begin(request, context)
        try:
            receipt = self._record(request.event)
        except Refused as refused:
            await self._refuse(context, refused)
        await self._end(context)
        return pb.SubmitFeedbackResponse(receipt=receipt)

    async def SubmitFeedbackBatch(self, request, context):  # noqa: N802
        await self._begin(request, context)
        response = pb.SubmitFeedbackBatchResponse()
        for event in request.events:
            self._outcome(response.items.add(), lambda event=event: self._record(event))
        await self._end(context)
        return response

    def _outcome(self, item: pb.BatchItem, record) -> None:
        try:
            item.receipt.CopyFrom(record())
        except Refused as refused:
            item.error.code = refused.code.value[0]
            item.error.message = refused.message
            item.error.field = refused.field

    async def RetractFeedback(self, request, context):  # noqa: N802
        await self._begin(request, context)
        try:
            receipt = self._append(
                request.retraction_id,
                request.SerializeToString(),
                pb.FeedbackRecord(retracts_id=request.feedback_id),
            )
            self._close(request.feedback_id, pb.FATE_KIND_RETRACTED)
        except Refused as refused:
            self.records.pop(request.retraction_id, None)
            await self._refuse(context, refused)
        await self._end(context)
        return pb.RetractFeedbackResponse(receipt=receipt)

    async def GetFeedback(self, request, context):  # noqa: N802
        await self._begin(request, context)
        record = self.records.get(request.feedback_id)
        if record is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown feedback")
        return pb.GetFeedbackResponse(record=record)

    def _matching(self, criteria: pb.FeedbackFilter) -> list[pb.FeedbackRecord]:
        def fits(record: pb.FeedbackRecord) -> bool:
            event = record.event
            return (
                criteria.completion_id in ("", event.completion_id)
                and criteria.comparison_id in ("", event.comparison_id)
                and criteria.rater_id in ("", event.rater_id)
                and criteria.policy_version in ("", record.policy_version)
                and (not criteria.tag or criteria.tag in event.tags)
                and (not criteria.kinds or event.WhichOneof("kind") in criteria.kinds)
                and (record.current or not criteria.current_only)
            )

        return [record for record in self.records.values() if fits(record)]

    async def ListFeedback(self, request, context):  # noqa: N802
        await self._begin(request, context)
        found = self._matching(request.filter)
        start, size = int(request.page_token or 0), request.page_size or 100
        more = str(start + size) if start + size < len(found) else ""
        return pb.ListFeedbackResponse(records=found[start : start + size], next_page_token=more)

    async def ExportFeedback(self, request, context):  # noqa: N802
        await self._begin(request, context)
        found = [r for r in self._matching(request.filter) if r.receipt.seq > request.after_seq]
        for count, record in enumerate(found):
            if count == self.fail_export_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
            response = pb.ExportFeedbackResponse(record=record)
            if request.include_completions and record.event.completion_id:
                response.completions.append(self._logged(record.event.completion_id))
            yield response

    async def Compare(self, request, context):  # noqa: N802
        await self._begin(request, context)
        number = len(self.comparisons)
        messages = request.prompt.chat.messages
        comparison = pb.Comparison(
            comparison_id=f"cmp-{number}",
            comparison_token=f"cmp-token-{number}",
            prompt_text=request.prompt.text,
            prompt_messages=messages,
        )
        prompt = messages[-1].content if messages else request.prompt.text
        for candidate_idx in range(request.k or 2):
            logged = inference_pb2.LoggedCompletion(
                completion=inference_pb2.Completion(
                    completion_id=f"cand-{number}-{candidate_idx}",
                    completion_token=f"cand-token-{number}-{candidate_idx}",
                    text=f"{prompt} {candidate_idx}",
                    finish_reason=inference_pb2.FINISH_REASON_STOP,
                    rateable=True,
                ),
                end_user=request.end_user,
            )
            logged.served_by.policy_version = VERSIONS[candidate_idx % 2]
            if not self.hide_completions:
                self.script.logged[logged.completion.completion_id] = logged
            comparison.candidates.add(
                completion_id=logged.completion.completion_id,
                completion_token=logged.completion.completion_token,
                text=logged.completion.text,
                finish_reason=logged.completion.finish_reason,
            )
        self.comparisons[comparison.comparison_id] = comparison
        return pb.CompareResponse(comparison=comparison)

    async def NextQuestion(self, request, context):  # noqa: N802
        await self._begin(request, context)
        unanswered = [c for key, c in self.comparisons.items() if key not in self.voted]
        response = pb.NextQuestionResponse(open_count=len(unanswered))
        if unanswered:
            response.comparison.CopyFrom(unanswered[0])
        return response

    async def EraseUser(self, request, context):  # noqa: N802
        await self._begin(request, context)
        gone = [c for c in self.script.logged.values() if c.end_user == request.end_user]
        ids = {item.completion.completion_id for item in gone}
        judged = [r for r in self.records.values() if r.event.completion_id in ids]
        for record in judged:
            record.event.ClearField("thumb")
            record.fate.kind = pb.FATE_KIND_ERASED
        for name in ids:
            del self.script.logged[name]
        return pb.EraseUserResponse(
            completions=len(gone),
            feedback_events=len(judged),
            tainted_versions=["v1"] if judged else [],
        )

    async def ImportFeedback(self, request, context):  # noqa: N802
        await self._begin(request, context)
        response = pb.ImportFeedbackResponse()
        for item in request.items:
            self._outcome(response.items.add(), lambda item=item: self._import(item))
        await self._end(context)
        return response

    def _import(self, item: pb.ImportItem) -> pb.Receipt:
        if any("REFUSE" in text for text in item.completions):
            raise invalid("completions", "is not wanted here")
        known = item.import_id in self.imported
        if known and self.imported[item.import_id] != item:
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, "same id, other payload")
        self.imported[item.import_id] = item
        status = pb.RECEIPT_STATUS_DUPLICATE if known else pb.RECEIPT_STATUS_STORED
        return pb.Receipt(feedback_id=item.import_id, seq=len(self.imported), status=status)

    async def SummarizeFeedback(self, request, context):  # noqa: N802
        await self._begin(request, context)
        current = [record for record in self.records.values() if record.current]
        kinds = Counter(record.event.WhichOneof("kind") for record in current)
        kinds.pop(None, None)
        thumbs = [record.event.thumb for record in current if record.event.HasField("thumb")]
        up = sum(thumb.up for thumb in thumbs)
        response = pb.SummarizeFeedbackResponse(events_by_kind=kinds, backlog=len(current))
        if thumbs:
            figures = {"up": up, "down": len(thumbs) - up, "share": up / len(thumbs)}
            response.by_version.add(key="base", low=0.25, high=0.75, **figures)
            response.by_week.add(key="1970-W01", low=0.25, high=0.75, **figures)
            response.worst_prompts.add(prompt="bad\nprompt", up=up, down=len(thumbs) - up)
        reasons = Counter(reason for thumb in thumbs if not thumb.up for reason in thumb.reasons)
        for reason, count in reasons.most_common():
            response.top_reasons.add(reason=reason, count=count)
        if len(thumbs) > 1:
            response.rater_agreement, response.rater_agreement_pairs = 0.5, 2
        return response


@pytest.fixture
def memory(server, script, refuse, refusal) -> Memory:
    script.unique_ids = True
    memory = Memory(script, refuse, refusal)
    server.stop()
    server.more_services.append(
        lambda grpc_server: feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(
            memory, grpc_server
        )
    )
    server.start()
    return memory


@pytest.fixture
async def client(server, memory):
    async with heedful.AsyncClient(server.target, timeout_s=10) as client:
        yield client


@pytest.fixture
async def completion(client) -> heedful.Completion:
    return (await client.generate("hello", end_user="ann")).completions[0]


@pytest.fixture
def run(server, memory):
    """Runs a command in this process against the small server."""
    environment = {"HEEDFUL_TARGET": server.target, "COLUMNS": "200", "EDITOR": "", "VISUAL": ""}

    def run(*arguments: str, stdin: str | None = None):
        result = CliRunner().invoke(build_app(), arguments, input=stdin, env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
