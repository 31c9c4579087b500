"""Lists, exports, summaries, imports and erasure over a real port."""

import sqlite3
from pathlib import Path

import grpc
import grpc.aio
import pytest
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import inference_pb2
from heedful_server.errors import PreconditionFailed
from heedful_server.feedback import erasing, reading
from heedful_server.feedback.submission import Page
from heedful_server.identity import FEEDBACK_OWN, Caller
from heedful_server.rpc import feedback_convert
from heedful_store import Completion, FeedbackFilter, Scope, uuid7
from heedful_store.registry_schema import deployments, run_inputs, runs

S = grpc.StatusCode
UP, DOWN = pb.Thumb(up=True), pb.Thumb(up=False, reasons=["wrong"])
OWN = Caller("local", "key", frozenset({FEEDBACK_OWN}))
SCOPE = Scope("local", "default")


@pytest.fixture
async def log(generate, submit, said) -> list[pb.FeedbackEvent]:
    """Five events, the second one edited by the third."""
    one, two = (await generate("prompt", n=2, tags=["new"], end_user="ann")).completions
    events = [said(one, thumb=UP), said(two, thumb=DOWN)]
    events.append(said(two, thumb=UP, supersedes_id=events[1].feedback_id))
    events.append(said(one, thumb=DOWN, rater_id="bob", tags=["beta"]))
    events.append(said(one, rating=pb.Rating(value=3)))
    for event in events:
        await submit(event)
    return events


def ids(records) -> list[str]:
    return [record.event.feedback_id for record in records]


async def test_pages_follow_the_order_of_the_log(log, feedback_stub):
    found, token = [], ""
    while True:
        request = pb.ListFeedbackRequest(page_size=2, page_token=token)
        page = await feedback_stub.ListFeedback(request)
        assert len(page.records) <= 2
        found += page.records
        token = page.next_page_token
        if not token:
            break
    assert ids(found) == [event.feedback_id for event in log]
    assert [record.current for record in found] == [True, False, True, True, True]
    assert [record.fate.kind for record in found][:2] == [
        pb.FATE_KIND_WAITING,
        pb.FATE_KIND_SUPERSEDED,
    ]
    seqs = [record.receipt.seq for record in found]
    assert seqs == sorted(seqs)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rater_id": "bob"}, [3]),
        ({"tag": "beta"}, [3]),
        ({"kinds": ["rating"]}, [4]),
        ({"current_only": True}, [0, 2, 3, 4]),
        ({"policy_version": "v9"}, []),
        ({"policy_version": "base", "kinds": ["thumb"], "current_only": True}, [0, 2, 3]),
    ],
)
async def test_filters_narrow(log, feedback_stub, fields, expected):
    criteria = pb.FeedbackFilter(**fields)
    page = await feedback_stub.ListFeedback(pb.ListFeedbackRequest(filter=criteria))
    assert ids(page.records) == [log[i].feedback_id for i in expected]
    call = feedback_stub.ExportFeedback(pb.ExportFeedbackRequest(filter=criteria))
    exported = [message.record async for message in call]
    assert ids(exported) == ids(page.records)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": 1001}, "page_size"),
        ({"page_token": "x"}, "page_token"),
        ({"filter": pb.FeedbackFilter(kinds=["smile"])}, "filter.kinds[0]"),
    ],
)
async def test_a_bad_list_is_refused_by_field(feedback_stub, violation, fields, field):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await feedback_stub.ListFeedback(pb.ListFeedbackRequest(**fields))
    assert violation(caught.value)[0] == field


async def test_an_export_crosses_pages_and_starts_at_a_cursor(log, feedback_stub, monkeypatch):
    monkeypatch.setattr(reading, "_EXPORT_PAGE", 2)
    request = pb.ExportFeedbackRequest(include_completions=True)
    exported = [message async for message in feedback_stub.ExportFeedback(request)]
    assert ids(message.record for message in exported) == [event.feedback_id for event in log]
    assert exported[0].completions[0].prompt_text == "prompt"
    assert exported[0].completions[0].completion.text == "prom"
    request = pb.ExportFeedbackRequest(after_seq=exported[2].record.receipt.seq)
    rest = [message async for message in feedback_stub.ExportFeedback(request)]
    assert len(rest) == 2
    assert not rest[0].completions


async def test_the_summary_counts_what_is_current(log, feedback_stub):
    found = await feedback_stub.SummarizeFeedback(pb.SummarizeFeedbackRequest())
    assert dict(found.events_by_kind) == {"thumb": 3, "rating": 1}
    (base,) = found.by_version
    assert (base.key, base.up, base.down) == ("base", 2, 1)
    assert base.share == pytest.approx(2 / 3)
    # statsmodels.stats.proportion.proportion_confint(2, 3, method="wilson")
    assert (base.low, base.high) == pytest.approx((0.20765, 0.93851), abs=1e-5)
    assert {item.key for item in found.by_tag} == {"beta", "new"}
    assert [(item.reason, item.count) for item in found.top_reasons] == [("wrong", 1)]
    assert found.worst_prompts[0].prompt == "prompt"
    assert (found.rater_agreement, found.rater_agreement_pairs) == (0.0, 1)
    assert found.backlog == 4


async def test_reading_is_for_those_who_hold_the_token(generate, submit, said, server):
    mine, other = (await generate(end_user="ann", n=2)).completions
    event = said(mine)
    await submit(event)
    parts = server.feedback
    reader = reading.FeedbackReader(parts.store, parts.tokens, "public")
    get = event.feedback_id
    record = await reader.get(OWN, SCOPE, get, mine.completion_token)
    assert record.fate.reason == "too_few_raters"
    with pytest.raises(Exception, match="feedback"):
        await reader.get(OWN, SCOPE, get, other.completion_token)
    found = await reader.completion(OWN, SCOPE, mine.completion_id, mine.completion_token)
    assert found.completion.completion_id == mine.completion_id
    foreign = server.feedback.tokens.sign(
        "completion", mine.completion_id, tenant="local", project="default", end_user="bob"
    )
    messages = set()
    for id, token in [(mine.completion_id, foreign), (mine.completion_id, other.completion_token)]:
        with pytest.raises(Exception, match="completion") as caught:
            await reader.completion(OWN, SCOPE, id, token)
        messages.add(str(caught.value))
    assert len(messages) == 1


async def test_a_capped_list_leaves_open_what_only_get_knows(log, server, feedback_stub):
    reader = reading.FeedbackReader(server.feedback.store, server.feedback.tokens, "team")
    records = await reader.page(Page(FeedbackFilter(scope=SCOPE), 0, 10))
    kinds = [feedback_convert.fate(record).kind for record in records]
    assert kinds[:2] == [pb.FATE_KIND_UNSPECIFIED, pb.FATE_KIND_SUPERSEDED]


async def test_an_erasure_leaves_nothing_of_a_person(
    generate, submit, said, feedback_stub, stub, config, server
):
    completion = (
        await generate("canary-prompt", end_user="canary-user", conversation_id="canary-talk")
    ).completions[0]
    kept = (await generate("hello", end_user="bob")).completions[0]
    events = [
        said(completion, correction=pb.Correction(text="canary-correction")),
        said(completion, critique=pb.Critique(text="canary-critique"), rater_id="bob"),
        said(completion, thumb=pb.Thumb(reasons=["canary-reason"]), tags=["canary-tag"]),
        said(kept, thumb=UP),
    ]
    for event in events:
        await submit(event)
    request = pb.CompareRequest(
        prompt=inference_pb2.Prompt(text="canary-question"), end_user="canary-user", k=2
    )
    await feedback_stub.Compare(request)
    erased = await feedback_stub.EraseUser(pb.EraseUserRequest(end_user="canary-user"))
    assert (erased.completions, erased.feedback_events) == (3, 3)
    with sqlite3.connect(config.home / "heedful.db") as connection:
        assert "canary" not in "\n".join(connection.iterdump())
    for file in Path(config.home).iterdir():
        assert b"canary" not in file.read_bytes(), file.name
    call = feedback_stub.ExportFeedback(pb.ExportFeedbackRequest(include_completions=True))
    exported = [message async for message in call]
    assert "canary" not in str(exported)
    kinds = [message.record.fate.kind for message in exported]
    assert kinds == [pb.FATE_KIND_ERASED] * 3 + [pb.FATE_KIND_WAITING]
    get = inference_pb2.GetCompletionRequest(completion_id=completion.completion_id)
    found = (await stub.GetCompletion(get)).completion
    assert (found.completion.text, found.prompt_text, found.end_user) == ("", "", "")
    assert not (await feedback_stub.NextQuestion(pb.NextQuestionRequest())).open_count
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await submit(said(completion))
    assert caught.value.code() is S.NOT_FOUND
    with sqlite3.connect(config.home / "heedful.db") as connection:
        assert "canary" not in "\n".join(connection.iterdump())


async def test_an_erasure_is_never_narrower_than_it_says(server, feedback_stub, violation):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await feedback_stub.EraseUser(pb.EraseUserRequest())
    assert violation(caught.value)[0] == "end_user"
    store, elsewhere = server.feedback.store, Scope("local", "other")
    await store.append_completion(
        Completion(
            completion_id=uuid7(),
            scope=elsewhere,
            policy_version="base",
            created_at_ms=1,
            end_user="ann",
        )
    )
    with pytest.raises(PreconditionFailed, match="other projects"):
        await erasing.erase(server.feedback, "local", SCOPE, "ann")
    report = await erasing.erase(server.feedback, "local", None, "ann")
    assert report.completions == 1


def record(import_id: str, *texts: str, **fields: object) -> pb.ImportItem:
    prompt = inference_pb2.Prompt(text="question")
    return pb.ImportItem(
        **{"import_id": import_id, "prompt": prompt, "completions": texts} | fields
    )


def order(*groups: list[int]) -> pb.ImportRanking:
    return pb.ImportRanking(groups=[pb.ImportGroup(positions=group) for group in groups])


@pytest.fixture
def load(feedback_stub):
    async def call(*items: pb.ImportItem, source: str = "file") -> list[pb.BatchItem]:
        request = pb.ImportFeedbackRequest(items=items, source=source)
        return list((await feedback_stub.ImportFeedback(request)).items)

    return call


RECORDS = [
    record("1", "good", "fair", "bad", ranking=order([0], [1], [2]), rater_id="r1"),
    record("2", "nice", thumb=DOWN, tags=["old"]),
    record("3", "a demonstration", demonstration=pb.Demonstration()),
]


async def test_existing_data_is_recorded_with_its_texts(load, feedback_stub):
    items = await load(*RECORDS)
    assert [item.receipt.status for item in items] == [pb.RECEIPT_STATUS_STORED] * 3
    call = feedback_stub.ExportFeedback(pb.ExportFeedbackRequest(include_completions=True))
    ranking, thumb, demonstration = [message async for message in call]
    assert [c.completion.text for c in ranking.completions] == ["good", "fair", "bad"]
    assert ranking.completions[0].prompt_text == "question"
    ended = [*b"good", 256]
    assert list(ranking.completions[0].completion.token_ids) == ended
    groups = ranking.record.event.ranking.groups
    assert [group.completion_ids[0] for group in groups] == [
        completion.completion.completion_id for completion in ranking.completions
    ]
    assert ranking.record.event.rater_id == "r1"
    assert thumb.record.event.thumb == DOWN
    assert demonstration.record.event.correction.text == "a demonstration"
    assert demonstration.completions[0].completion.text == "a demonstration"
    fates = {message.record.fate.kind for message in (ranking, thumb, demonstration)}
    assert fates == {pb.FATE_KIND_WAITING}


async def test_an_import_can_be_repeated(load, feedback_stub):
    first, again = await load(*RECORDS), await load(*RECORDS)
    assert [item.receipt.status for item in again] == [pb.RECEIPT_STATUS_DUPLICATE] * 3
    assert [i.receipt.seq for i in again] == [i.receipt.seq for i in first]
    elsewhere = await load(*RECORDS, source="another file")
    assert {item.receipt.status for item in elsewhere} == {pb.RECEIPT_STATUS_STORED}
    page = await feedback_stub.ListFeedback(pb.ListFeedbackRequest())
    assert len(page.records) == 6


async def test_the_same_id_with_another_content_clashes_and_changes_nothing(load, feedback_stub):
    await load(*RECORDS)
    items = await load(
        record("1", "good", "other", "bad", ranking=order([0], [1], [2]), rater_id="r1"),
        record("2", "nice", thumb=UP, tags=["old"]),
        record("9", "twice", thumb=UP),
        record("9", "other", thumb=UP),
    )
    outcomes = [item.WhichOneof("outcome") for item in items]
    assert outcomes == ["error", "error", "receipt", "error"]
    codes = {item.error.code for item in items if item.HasField("error")}
    assert codes == {S.ALREADY_EXISTS.value[0]}
    call = feedback_stub.ExportFeedback(pb.ExportFeedbackRequest(include_completions=True))
    texts = [c.completion.text async for message in call for c in message.completions]
    assert "other" not in texts


@pytest.mark.parametrize(
    ("item", "field"),
    [
        (record("", "x", thumb=UP), "import_id"),
        (record("1", thumb=UP), "completions"),
        (record("1", "x"), "judgement"),
        (record("1", " ", thumb=UP), "completions[0]"),
        (record("1", "x", "y", thumb=UP), "completions"),
        (record("1", "x", "y", ranking=order([0])), "ranking.groups"),
        (record("1", "x", "y", ranking=order([0], [0, 1])), "ranking.groups[1]"),
        (record("1", "x", "y", ranking=order([0], [2])), "ranking.groups[1]"),
        (record("1", "x", "y", ranking=order([0], [], [1])), "ranking.groups[1]"),
        (record("1", "x", ranking=order([0])), "ranking.groups"),
        (record("1", "x", thumb=UP, prompt=inference_pb2.Prompt()), "prompt"),
        (record("1", "x", thumb=UP, rater_id="x" * 129), "rater_id"),
    ],
)
async def test_a_bad_record_is_refused_by_field_and_the_others_are_kept(load, item, field):
    bad, good = await load(item, RECORDS[1])
    assert (bad.error.code, bad.error.field) == (S.INVALID_ARGUMENT.value[0], f"items[0].{field}")
    assert good.receipt.status == pb.RECEIPT_STATUS_STORED


async def test_an_event_used_by_a_run_says_so(generate, submit, said, server, feedback_stub):
    event = said((await generate()).completions[0])
    seq = (await submit(event)).seq

    def train(connection) -> None:
        values = {"tenant": "local", "project": "default", "created_at_ms": 1, "method": "kto"}
        names = ("stage", "status", "config", "seeds", "code_version", "evidence")
        connection.execute(
            runs.insert().values(
                run_id="r",
                dataset_id="d1",
                policy_version="v1",
                **values,
                **dict.fromkeys(names, "x"),
            )
        )
        connection.execute(run_inputs.insert().values(run_id="r", feedback_seq=seq, split="train"))
        connection.execute(
            deployments.insert().values(
                tenant="local",
                project="default",
                action="promote",
                version="v1",
                actor="gate",
                approved=False,
                evidence="{}",
                at_ms=1_700_000_000_000,
            )
        )

    await server.feedback.store.write(train)
    get = pb.GetFeedbackRequest(feedback_id=event.feedback_id)
    fate = (await feedback_stub.GetFeedback(get)).record.fate
    assert fate.kind == pb.FATE_KIND_USED
    assert (list(fate.dataset_ids), list(fate.trained_versions)) == (["d1"], ["v1"])
    assert fate.promote_time.seconds == 1_700_000_000
