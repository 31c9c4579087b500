"""A run from its lease to its end: what it leaves, what stops it, and what it says then."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from heedful_store import Run, Scope, Store, adapter_files
from heedful_trainer.config_sources import Place
from heedful_trainer.runs.worker import Worker, find_run

MakeWorker = Callable[..., Worker]
LogPairs = Callable[..., None]


def test_a_refresh_leaves_versions_evidence_and_a_report(
    store: Store, place: Place, make_worker: MakeWorker, queue: Any, log_pairs: LogPairs
) -> None:
    log_pairs(store, 40)
    run = queue(config={"dpo.beta": "0.2"})
    done = make_worker().work(once=True)
    assert done is not None
    assert (done.status, done.stage, done.method, done.verdict) == (
        "finished",
        "done",
        "dpo",
        "skipped",
    )
    assert done.config["dpo.beta"] == 0.2
    assert done.code_version
    assert list(done.evidence) == ["gate", "policy", "publish", "reward", "snapshot"]
    policy = store.get_policy(Scope(), "v1")
    assert (policy.state, policy.verdict, policy.run_id) == ("candidate", "skipped", run.run_id)
    for version in ("v1", "r1"):
        row = store.get_policy(Scope(), version)
        found = adapter_files.verify(place.home / row.path, row.content_hash)
        assert found.info.role == row.role
        assert (found.info.num_layers, found.info.hidden_size) == (2, 64)
    assert policy.card["policy"] == done.evidence["policy"]["report"]
    directory = place.home / "runs" / run.run_id
    page = (directory / "report" / "report.md").read_text()
    assert "accuracy on held-out pairs" in page
    assert "Verdict: skipped" in page
    assert list((directory / "tensorboard").glob("events.*"))
    # What people wrote stays in the log alone.
    assert not (directory / "dataset.jsonl").exists()
    assert not (directory / "report" / "pairs.json").exists()
    assert not (directory / "checkpoints").exists()


def test_every_event_that_was_read_is_recorded(
    store: Store, make_worker: MakeWorker, queue: Any, log_pairs: LogPairs
) -> None:
    log_pairs(store, 30)
    run = queue()
    make_worker().work(once=True)
    rows = store.run_inputs(run.run_id)
    assert [row.feedback_seq for row in rows] == list(range(1, 31))
    assert {row.split for row in rows} == {"train", "validation", "calibration", "gate"}


def test_too_little_feedback_fails_before_training_and_says_what_is_missing(
    store: Store, make_worker: MakeWorker, queue: Any, log_pairs: LogPairs
) -> None:
    log_pairs(store, 3)
    queue()
    done = make_worker().work(once=True)
    assert done is not None
    assert (done.status, done.stage) == ("failed", "snapshot")
    assert "of 8 decided pairs" in (done.failure or "")
    assert store.find_policies(Scope()) == []


def test_all_ties_end_in_a_clear_failure(
    store: Store, make_worker: MakeWorker, queue: Any, log_pairs: LogPairs
) -> None:
    log_pairs(store, 40, ties=True)
    queue()
    done = make_worker().work(once=True)
    assert done is not None
    assert done.status == "failed"
    assert "ties alone say nothing" in (done.failure or "")


def test_a_misspelt_override_fails_the_run_with_the_nearest_name(
    store: Store, make_worker: MakeWorker, queue: Any, log_pairs: LogPairs
) -> None:
    log_pairs(store, 40)
    queue(config={"dpo.betta": "0.2"})
    done = make_worker().work(once=True)
    assert done is not None
    assert done.status == "failed"
    assert "did you mean 'dpo.beta'" in (done.failure or "")


def test_a_defect_fails_the_run_instead_of_being_retried_for_ever(
    store: Store, make_worker: MakeWorker, queue: Any, log_pairs: LogPairs
) -> None:
    log_pairs(store, 40)
    queue()
    done = make_worker("trainer_step=2:raise").work(once=True)
    assert done is not None
    assert done.status == "failed"
    assert "internal error" in (done.failure or "")


def in_background(worker: Worker) -> tuple[threading.Thread, list[Run | None]]:
    ends: list[Run | None] = []
    thread = threading.Thread(target=lambda: ends.append(worker.work(once=True)))
    thread.start()
    return thread, ends


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_pause_saves_and_waits_and_stop_ends(
    store: Store, place: Place, make_worker: MakeWorker, queue: Any, log_pairs: LogPairs
) -> None:
    log_pairs(store, 40)
    run = queue()
    # Slow steps, so that there is time to ask.
    thread, ends = in_background(make_worker("trainer_step=*:sleep_200", **{"dpo.epochs": "9"}))

    def status() -> str:
        return store.get_run(Scope(), run.run_id).status

    wait_for(lambda: store.get_run(Scope(), run.run_id).stage == "policy")
    store.control_run(Scope(), run.run_id, "pause").result()
    wait_for(lambda: status() == "paused")
    saved = place.home / "runs" / run.run_id / "checkpoints" / "policy"
    assert list(saved.glob("step-*"))
    store.control_run(Scope(), run.run_id, "").result()
    wait_for(lambda: status() == "running")
    store.control_run(Scope(), run.run_id, "stop").result()
    thread.join(60)
    assert ends[0] is not None
    assert ends[0].status == "stopped"
    assert list(saved.glob("step-*"))


def test_a_worker_that_lost_its_lease_writes_nothing_more(
    store: Store, make_worker: MakeWorker, queue: Any, log_pairs: LogPairs
) -> None:
    log_pairs(store, 40)
    run = queue()
    thread, _ = in_background(make_worker("trainer_step=*:sleep_300", **{"run.lease_s": "60"}))
    wait_for(lambda: store.get_run(Scope(), run.run_id).stage == "reward")

    def take(connection: Any) -> None:
        from heedful_store.registry_schema import runs

        connection.execute(runs.update().values(lease_owner="somebody else"))

    store.write(take).result()
    thread.join(60)
    assert not thread.is_alive()
    found = store.get_run(Scope(), run.run_id)
    assert (found.lease_owner, found.status) == ("somebody else", "running")
    assert store.find_policies(Scope()) == []


def test_progress_is_in_the_row_while_it_runs(
    store: Store, make_worker: MakeWorker, queue: Any, log_pairs: LogPairs
) -> None:
    log_pairs(store, 40)
    run = queue()
    thread, _ = in_background(make_worker("trainer_step=*:sleep_300"))
    seen: list[dict[str, Any]] = []

    def look() -> bool:
        progress = json.loads(json.dumps(store.get_run(Scope(), run.run_id).progress))
        if "loss" in progress.get("figures", {}):
            seen.append(progress)
        return bool(seen)

    wait_for(look)
    store.control_run(Scope(), run.run_id, "stop").result()
    thread.join(60)
    assert 0 <= seen[0]["fraction"] <= 1
    assert seen[0]["figures"]["tokens_per_second"] > 0


def test_a_run_is_found_by_its_id_in_any_project(store: Store, queue: Any) -> None:
    from heedful_store import NotFound

    run = queue()
    assert find_run(store, run.run_id).scope == Scope()
    with pytest.raises(NotFound):
        find_run(store, "nothing")


def test_published_again_it_is_the_same_version(
    store: Store, place: Place, make_worker: MakeWorker, queue: Any, log_pairs: LogPairs
) -> None:
    from heedful_trainer.publish import Publication, publish_adapter

    log_pairs(store, 40)
    queue()
    done = make_worker().work(once=True)
    assert done is not None
    directory: Path = place.home / "runs" / done.run_id / "adapters" / "policy"
    again = publish_adapter(
        store, place.home, done, directory, Publication("policy", "candidate", "dpo", "", {})
    )
    assert again.version == "v1"
    # A directory without a row is what a killed run left, and gives way.
    leftover = place.home / "policies" / "default" / "default" / "v2"
    leftover.mkdir()
    (leftover / "MANIFEST.json").write_text("{}")
    other = Run(run_id="other", scope=Scope())
    second = publish_adapter(
        store, place.home, other, directory, Publication("policy", "candidate", "dpo", "", {})
    )
    assert second.version == "v2"
    adapter_files.verify(leftover, second.content_hash)
