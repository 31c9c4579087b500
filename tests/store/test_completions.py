from array import array
from collections.abc import Callable
from dataclasses import replace

import pytest
from heedful_store import (
    AlreadyExists,
    Completion,
    Consent,
    Invalid,
    NotFound,
    Ranking,
    Scope,
    Store,
    now_ms,
    prompt_hash,
    uuid7,
)

OTHER = Scope("other", "default")


def test_an_answer_comes_back_as_it_was_logged(store: Store, make) -> None:
    logged = make.completion(
        seed=-(2**63),
        sampling={"temperature": 0.7, "top_k": 5},
        tags=("a", 'quo"te'),
        sample_idx=3,
        finish_reason="cancelled",
        conversation_id="c",
        consent=Consent("full", False),
        quantization="nf4",
    )
    assert store.append_completion(logged).result() is True
    found = store.get_completion(logged.scope, logged.completion_id)
    assert found.prompt_hash == prompt_hash(logged.payload.prompt_ids)
    assert found.payload.completion_ids == array("i", logged.payload.completion_ids)
    assert found.payload.logprobs == array("f", logged.payload.logprobs)
    assert found.payload.kept_mass == array("f", logged.payload.kept_mass)
    assert found.payload.prompt_text == "prompt"
    assert replace(found, payload=None, prompt_hash="") == replace(logged, payload=None)


def test_a_long_answer_survives_compression(store: Store, make) -> None:
    payload = replace(make.payload("p" * 5000), messages='[{"role":"user"}]')
    logged = make.completion(payload=payload)
    store.append_completion(logged).result()
    found = store.get_completion(logged.scope, logged.completion_id).payload
    assert found.prompt_ids == array("i", payload.prompt_ids)
    assert found.messages == payload.messages


def test_logging_twice_is_one_row_and_a_foreign_id_is_refused(store: Store, make) -> None:
    logged = make.completion()
    assert store.append_completion(logged).result() is True
    assert store.append_completion(logged).result() is False
    with pytest.raises(AlreadyExists):
        store.append_completion(replace(logged, scope=OTHER)).result()


def test_another_tenants_or_projects_answer_looks_unknown(store: Store, answered) -> None:
    logged = answered()
    messages = []
    for scope, name in (
        (OTHER, logged.completion_id),
        (Scope("default", "other"), logged.completion_id),
        (logged.scope, uuid7()),
    ):
        with pytest.raises(NotFound) as caught:
            store.get_completion(scope, name)
        messages.append(str(caught.value).replace(name, ""))
    assert len(set(messages)) == 1
    assert store.get_completions(OTHER, [logged.completion_id]) == {}


def test_content_is_refused_where_consent_does_not_cover_it(store: Store, make) -> None:
    with pytest.raises(Invalid, match="must not reach the store"):
        store.append_completion(make.completion(consent=Consent("none", False)))
    with pytest.raises(Invalid, match="only with consent full"):
        store.append_completion(make.completion(consent=Consent("metadata", True)))


def test_metadata_only_keeps_no_trace_of_the_prompt(store: Store, answered) -> None:
    logged = answered(consent=Consent("metadata", True), payload=None, prompt_tokens=7)
    found = store.get_completion(logged.scope, logged.completion_id)
    assert (found.payload, found.prompt_hash, found.prompt_tokens) == (None, "", 7)


def test_log_probs_must_match_the_tokens(store: Store, make) -> None:
    payload = replace(make.payload(), kept_mass=[1.0])
    with pytest.raises(Invalid, match="kept_mass"):
        store.append_completion(make.completion(payload=payload))


def test_removing_content_keeps_the_row(store: Store, answered) -> None:
    logged = answered()
    assert store.remove_payload(logged.scope, logged.completion_id).result() is True
    assert store.remove_payload(logged.scope, logged.completion_id).result() is False
    found = store.get_completion(logged.scope, logged.completion_id)
    assert (found.payload, found.prompt_hash, found.end_user) == (None, "", "ann")
    with pytest.raises(NotFound):
        store.remove_payload(OTHER, logged.completion_id).result()


def test_pruning_removes_old_unrated_content_only(
    store: Store, make, answered: Callable[..., Completion]
) -> None:
    old = {"created_at_ms": now_ms() - 10_000}
    rated, ranked, compared, unrated = (answered(**old) for _ in range(4))
    young, foreign = answered(), answered(scope=OTHER, **old)
    other = answered()
    store.append_feedback(make.event(completion_id=rated.completion_id)).result()
    store.append_feedback(make.event(judgement=_ranking(ranked, other))).result()
    blind = make.comparison(compared.completion_id, other.completion_id)
    store.create_comparison(blind).result()
    vote = make.event(judgement=_ranking(compared, other), comparison_id=blind.comparison_id)
    store.append_feedback(vote).result()
    report = store.prune(Scope(), now_ms() - 5_000).result()
    assert (report.payloads_removed, report.more) == (1, False)
    kept = [
        store.get_completion(c.scope, c.completion_id).payload is not None
        for c in (rated, ranked, compared, young, foreign, unrated)
    ]
    assert kept == [True] * 5 + [False]


def _ranking(*answers: Completion):
    return Ranking(tuple((answer.completion_id,) for answer in answers))
