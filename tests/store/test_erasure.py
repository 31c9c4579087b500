"""A person is forgotten: no byte of what they said is left in any table, file or export."""

import sqlite3
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from heedful_store import (
    AlreadyExists,
    Correction,
    Critique,
    DatabaseOptions,
    FeedbackFilter,
    Invalid,
    NotFound,
    Ranking,
    Scope,
    Store,
    Thumb,
    now_ms,
)
from heedful_store import erasure as erasing
from heedful_store.registry_schema import policies, run_inputs, runs
from heedful_store.schema import metadata
from sqlalchemy import insert, select, text

USER = "CANARY-person@example.org"
EVERYTHING = FeedbackFilter(states=("stored", "pending", "dead", "erased"))
# As bytes of int32 and of UTF-8: a payload leaves in both forms.
TOKENS = [0x5A5A1234, 0x5A5A4321, 0x5A5A7777]
TOKEN_BYTES = array("i", TOKENS).tobytes()


def fill(store: Store, make) -> list[str]:
    """Let the person and others talk and judge; return the person's event ids."""
    events: list[str] = []
    for number in range(30):
        answer = make.completion(
            end_user=USER,
            conversation_id=f"CANARY-talk-{number}",
            request_id=f"CANARY-request-{number}",
            tags=("CANARY-tag",),
            sampling={"stop": ["CANARY-stop"]},
            payload=payload(make, number),
        )
        other = make.completion(end_user="bob", payload=make.payload("innocent " * number))
        store.append_completion(answer).result()
        store.append_completion(other).result()
        blind = make.comparison(answer.completion_id, other.completion_id, end_user=USER)
        store.create_comparison(blind).result()
        said = [
            make.event(completion_id=answer.completion_id, judgement=Thumb(False, ("CANARY-why",))),
            make.event(
                completion_id=answer.completion_id,
                judgement=Correction("CANARY-fix " * (1 + 40 * number)),
                comment="CANARY-comment",
                tags=("CANARY-tag",),
            ),
            make.event(
                judgement=Ranking(((answer.completion_id,), (other.completion_id,))),
                comparison_id=blind.comparison_id,
            ),
            # Somebody else repeats what the person was told.
            make.event(
                completion_id=answer.completion_id, judgement=Critique("CANARY-quote"), rater_id="x"
            ),
        ]
        for event in said:
            theirs = event if event.rater_id == "x" else _by(event)
            store.append_feedback(theirs).result()
            events.append(event.feedback_id)
        store.append_feedback(
            make.event(completion_id=other.completion_id, rater_id="bob", comment="kept")
        ).result()
    return events


def _by(event):
    return replace(event, rater_id=USER)


def payload(make, number: int):
    text_ = "CANARY-text " * (1 + 60 * (number % 5))
    return replace(make.payload(text_, text_), prompt_ids=TOKENS * 3, messages="CANARY-messages")


def traces(folder: Path) -> list[str]:
    """Return the files below ``folder`` that still hold a canary."""
    found = []
    for path in folder.iterdir():
        raw = path.read_bytes()
        found += [path.name for needle in (b"CANARY", TOKEN_BYTES) if needle in raw]
    return found


def test_an_erasure_leaves_no_byte_in_any_file(sqlite_url: str, tmp_path: Path, make) -> None:
    with Store(sqlite_url) as store:
        fill(store, make)
        assert traces(tmp_path)
        report = store.erase_user("default", USER).result()
        assert report.scrubbed
        assert traces(tmp_path) == []
    assert traces(tmp_path) == []


def test_an_erasure_leaves_no_trace_in_any_table_or_export(store: Store, make) -> None:
    events = fill(store, make)
    report = store.erase_user("default", USER).result()
    assert (report.completions, report.feedback) == (30, 120)
    with store.read() as connection:
        for table in metadata.sorted_tables:
            rows = [str(tuple(row)) for row in connection.execute(select(table))]
            assert not [row for row in rows if "CANARY" in row], table.name
    exported = list(store.export_feedback(EVERYTHING))
    assert "CANARY" not in str(exported)
    assert {s.feedback_id for s in exported if s.state == "erased"} == set(events)
    kept = [s.event.comment for s in exported if s.event is not None]
    assert kept == ["kept"] * 30
    assert store.erase_user("default", USER).result().feedback == 0


def test_others_keep_their_answers_and_other_tenants_their_users(store: Store, make) -> None:
    fill(store, make)
    theirs = make.completion(end_user=USER, scope=Scope("other"))
    store.append_completion(theirs).result()
    store.erase_user("default", USER).result()
    with store.read() as connection:
        kept = connection.execute(text("SELECT count(*) FROM completion_payloads")).scalar_one()
    assert kept == 31
    assert store.get_completion(theirs.scope, theirs.completion_id).end_user == USER


def test_an_erased_event_cannot_be_replayed(store: Store, make, answered) -> None:
    event = make.event(completion_id=answered().completion_id)
    store.append_feedback(event).result()
    store.erase_user("default", "ann").result()
    with pytest.raises(AlreadyExists):
        store.append_feedback(event).result()


def test_nothing_new_can_be_said_about_an_erased_answer(store: Store, make, answered) -> None:
    a, b = answered(), answered()
    blind = make.comparison(a.completion_id, b.completion_id)
    store.create_comparison(blind).result()
    store.erase_user("default", "ann").result()
    groups = ((a.completion_id,), (b.completion_id,))
    for event in (
        make.event(completion_id=a.completion_id, rater_id="x", judgement=Correction("again")),
        make.event(judgement=Ranking(groups), rater_id="x"),
        make.event(judgement=Ranking(groups), rater_id="x", comparison_id=blind.comparison_id),
    ):
        with pytest.raises(NotFound):
            store.append_feedback(event).result()


def test_a_waiting_event_is_erased_and_never_resolves(store: Store, make) -> None:
    late = make.completion(end_user="bob")
    event = make.event(completion_id=late.completion_id, comment="CANARY")
    store.append_feedback(event, hold_unknown=True).result()
    store.erase_user("default", "ann").result()
    store.append_completion(late).result()
    store.sweep_pending(lifetime_ms=-1000).result()
    assert store.get_feedback(Scope(), event.feedback_id).state == "erased"
    assert store.list_feedback(FeedbackFilter(current_only=True)) == []


def test_a_nameless_user_cannot_be_erased(store: Store) -> None:
    with pytest.raises(Invalid, match="end_user"):
        store.erase_user("default", "").result()


def test_an_erasure_cut_off_before_its_scrub_is_finished_at_the_next_start(
    sqlite_url: str, tmp_path: Path, make
) -> None:
    store = Store(sqlite_url)
    fill(store, make)
    copy = tmp_path / "copy"
    copy.mkdir()
    # The tables are emptied and committed, the files not scrubbed: as if killed in between.
    store.write(lambda c: erasing._erase(c, "default", USER)).result()
    for path in tmp_path.glob("store.db*"):
        (copy / path.name).write_bytes(path.read_bytes())
    store.close()
    assert traces(copy)
    with Store(f"sqlite:///{copy / 'store.db'}") as reopened:
        reopened.write(lambda _: None).result()
        assert traces(copy) == []


def test_a_reader_in_the_way_delays_the_scrub_and_is_reported(
    sqlite_url: str, tmp_path: Path, make
) -> None:
    with Store(sqlite_url, database=DatabaseOptions(lock_timeout_s=0.1)) as store:
        store.append_completion(make.completion(end_user=USER)).result()
        reader = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM completions").fetchall()
        assert not store.erase_user("default", USER).result().scrubbed
        reader.close()
        assert store.erase_user("default", USER).result().scrubbed
        assert traces(tmp_path) == []


def test_retention_removes_the_bytes_too_once_the_log_is_checkpointed(
    sqlite_url: str, tmp_path: Path, make
) -> None:
    with Store(sqlite_url) as store:
        old = make.completion(created_at_ms=1, payload=payload(make, 3))
        store.append_completion(old).result()
        assert store.prune(Scope(), now_ms()).result().payloads_removed == 1
    assert traces(tmp_path) == []


@pytest.fixture
def lineage(store: Store, make, answered) -> None:
    """One run on the user's event, a policy from it, and policies that follow from that one."""
    answer = answered(end_user=USER).completion_id
    seq = store.append_feedback(make.event(completion_id=answer)).result().seq
    other = answered(end_user="bob").completion_id
    clean = store.append_feedback(make.event(completion_id=other, rater_id="bob")).result().seq
    rows = [("r1", "v1", None, False), ("r2", "v2", "v1", True), ("r3", "v3", "v1", False)]
    rows.append(("r4", "v4", "v2", True))

    def body(connection) -> None:
        for run, version, parent, inherits in rows:
            connection.execute(insert(runs).values(**_run(run, version)))
            connection.execute(insert(policies).values(**_policy(run, version, parent, inherits)))
        for run, event, split in (
            ("r1", seq, "train"),
            ("r3", seq, "excluded"),
            ("r3", clean, "train"),
        ):
            connection.execute(
                insert(run_inputs).values(run_id=run, feedback_seq=event, split=split)
            )

    store.write(body).result()


def _run(run: str, version: str) -> dict[str, object]:
    names = {"tenant": "default", "project": "default", "run_id": run, "policy_version": version}
    rest = {"method": "dpo", "stage": "done", "status": "finished", "code_version": "1"}
    return names | rest | {"config": "{}", "seeds": "[]", "evidence": "{}", "created_at_ms": 1}


def _policy(run: str, version: str, parent: str | None, inherits: bool) -> dict[str, object]:
    names = {"tenant": "default", "project": "default", "version": version, "run_id": run}
    rest = {"content_hash": version, "base_id": "b", "template_hash": "t", "role": "policy"}
    more = {"path": version, "manifest": "{}", "state": "serving", "card": "{}"}
    lineage_ = {"parent_version": parent, "inherits_lineage": inherits, "created_at_ms": 1}
    return names | rest | more | lineage_


@pytest.mark.usefixtures("lineage")
def test_runs_and_the_policies_that_inherit_from_them_are_tainted(store: Store) -> None:
    report = store.erase_user("default", USER).result()
    assert report.tainted_runs == ("r1",)
    assert report.tainted_policies == (("default", "v1"), ("default", "v2"), ("default", "v4"))
    with store.read() as connection:
        query = select(policies.c.version).where(policies.c.tainted_at_ms.is_not(None))
        assert sorted(connection.scalars(query)) == ["v1", "v2", "v4"]
        query = select(runs.c.run_id).where(runs.c.tainted_at_ms.is_not(None))
        assert list(connection.scalars(query)) == ["r1"]
