"""The process is killed while it writes; what it acknowledged is there, once."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from heedful_store import FeedbackFilter, Store, uuid7

CHILD = Path(__file__).parent / "chaos_child.py"


def run_child(url: str, names: list[str], failpoints: str = "") -> tuple[int, dict[str, tuple]]:
    """Append ``names`` in a child; return its exit status and what it acknowledged."""
    done = subprocess.run(
        [sys.executable, str(CHILD), url, "full"],
        input="\n".join(names),
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"HEEDFUL_FAILPOINTS": failpoints},
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("acked")]
    return done.returncode, {name: (int(seq), dup == "1") for _, name, seq, dup in lines}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.timeout(180)
def test_every_acknowledged_event_survives_kills_exactly_once(url: str, seed: int) -> None:
    chance = random.Random(seed)
    acked: dict[str, int] = {}
    unsure: list[str] = []
    kills = 0
    for _ in range(6):
        names = unsure + [uuid7() for _ in range(60)]
        place = chance.choice(["before_commit", "after_commit", "before_ack"])
        code, receipts = run_child(url, names, f"{place}={chance.randint(2, 6)}:kill")
        kills += code == -signal.SIGKILL
        for name, (seq, _) in receipts.items():
            assert acked.setdefault(name, seq) == seq
        unsure = [name for name in names if name not in receipts]
        with Store(url) as store:
            stored = [s.feedback_id for s in store.list_feedback(FeedbackFilter(), limit=9999)]
        assert len(stored) == len(set(stored))
        assert set(acked) <= set(stored)
    assert kills >= 5
    everything = [*acked, *unsure]
    code, receipts = run_child(url, everything)
    assert code == 0
    assert set(receipts) == set(everything)
    assert all(receipts[name] == (seq, True) for name, seq in acked.items())
    with Store(url) as store:
        stored = [s.feedback_id for s in store.list_feedback(FeedbackFilter(), limit=9999)]
    assert sorted(stored) == sorted(everything)


@pytest.mark.parametrize(
    ("place", "is_stored"), [("before_commit", False), ("after_commit", True), ("before_ack", True)]
)
def test_a_retry_after_a_kill_is_a_duplicate_exactly_when_it_was_committed(
    sqlite_url: str, place: str, is_stored: bool
) -> None:
    name = uuid7()
    # The first commit is the answer's, the second the event's.
    code, receipts = run_child(sqlite_url, [name], f"{place}=2:kill")
    assert (code, receipts) == (-signal.SIGKILL, {})
    _, receipts = run_child(sqlite_url, [name])
    assert receipts == {name: (1, is_stored)}


def test_a_migration_that_is_killed_starts_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    code, _ = run_child(url, [], "before_migration_commit=1:kill")
    assert code == -signal.SIGKILL
    code, receipts = run_child(url, [uuid7()])
    assert (code, len(receipts)) == (0, 1)
