"""Rollouts: stored before use, drawn once, drawn again where damaged, and the drawer's thread."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from heedful_store import Failpoints
from heedful_trainer.errors import RunStopped, StageFailed
from heedful_trainer.methods.hooks import NoHooks, Wanted
from heedful_trainer.packing import Row
from heedful_trainer.rollouts.drawing import RolloutDrawer
from heedful_trainer.rollouts.records import Ids, Plan, Rollout, rows_of
from heedful_trainer.rollouts.store import RolloutStore

PLAN = Plan("train-000001", "ppo-000001", ((1, 2), (3,), (4, 5, 6)), 2, 8, 7)


class Parrot:
    """Answers with the place of the prompt; counts how often it is asked."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.asked: list[int] = []
        self.delay_s = delay_s
        self.was_cancelled = False

    async def draw(self, plan: Plan, start: int, prompts: Sequence[Ids]) -> list[Rollout]:
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        self.asked.append(start)
        return [
            Rollout(prompt, (start + i, sample), (-0.1, -1 / 3), bool(sample))
            for i, prompt in enumerate(prompts)
            for sample in range(plan.samples)
        ]

    async def release(self, policy: str) -> None:
        pass


class Stopping(NoHooks):
    def wanted(self) -> Wanted:
        return "stop"


def store(tmp_path: Path, failpoints: str = "") -> RolloutStore:
    return RolloutStore(tmp_path / "rollouts", Failpoints(failpoints))


def test_what_is_stored_comes_back_to_the_bit_and_is_not_drawn_again(tmp_path: Path) -> None:
    first, second = Parrot(), Parrot()
    with RolloutDrawer(first, store(tmp_path), 2) as drawer:
        drawn = drawer.take(PLAN, NoHooks())
    with RolloutDrawer(second, store(tmp_path), 2) as drawer:
        assert drawer.take(PLAN, NoHooks()) == drawn
    assert (first.asked, second.asked) == ([0, 2], [])
    assert drawn[0] == Rollout((1, 2), (0, 0), (-0.1, -1 / 3), False)
    assert [rollout.prompt for rollout in drawn] == [(1, 2)] * 2 + [(3,)] * 2 + [(4, 5, 6)] * 2


def test_only_the_missing_part_is_drawn_after_a_fault(tmp_path: Path) -> None:
    with (
        RolloutDrawer(Parrot(), store(tmp_path, "before_rollouts_rename=2:raise"), 2) as drawer,
        pytest.raises(RuntimeError, match="before_rollouts_rename"),
    ):
        drawer.take(PLAN, NoHooks())
    again = Parrot()
    with RolloutDrawer(again, store(tmp_path), 2) as drawer:
        assert len(drawer.take(PLAN, NoHooks())) == 6
    assert again.asked == [2]


@pytest.mark.parametrize("damage", ["bytes", "meta", "plan"])
def test_damaged_or_foreign_parts_are_drawn_again(tmp_path: Path, damage: str) -> None:
    with RolloutDrawer(Parrot(), store(tmp_path), 2) as drawer:
        drawer.take(PLAN, NoHooks())
    part = tmp_path / "rollouts" / PLAN.name / "part-000000"
    if damage == "bytes":
        content = bytearray((part / "rollouts.safetensors").read_bytes())
        content[-1] ^= 1
        (part / "rollouts.safetensors").write_bytes(content)
    elif damage == "meta":
        (part / "rollouts.json").write_text("{")
    else:
        meta = json.loads((part / "rollouts.json").read_text()) | {"policy": "another"}
        (part / "rollouts.json").write_text(json.dumps(meta))
    again = Parrot()
    with RolloutDrawer(again, store(tmp_path), 2) as drawer:
        drawer.take(PLAN, NoHooks())
    assert again.asked == [0]


def test_a_disk_that_takes_no_more_is_a_clean_failure(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("in the way of the directory")
    with (
        RolloutDrawer(Parrot(), store(tmp_path), 2) as drawer,
        pytest.raises(StageFailed, match="cannot be stored"),
    ):
        drawer.take(PLAN, NoHooks())


def test_a_stop_while_waiting_cancels_what_is_under_way(tmp_path: Path) -> None:
    source = Parrot(delay_s=60.0)
    with (
        RolloutDrawer(source, store(tmp_path), 2) as drawer,
        pytest.raises(RunStopped, match="train-000001"),
    ):
        drawer.take(PLAN, Stopping())
    assert source.was_cancelled


def test_a_seed_belongs_to_the_place_of_a_prompt() -> None:
    seeds = {PLAN.seed_of(i) for i in range(100)}
    assert len(seeds) == 100
    assert max(seeds) < 2**31
    assert PLAN.seed_of(3) == Plan("train-000001", "", (), 1, 1, 7).seed_of(3)


def test_answers_to_one_prompt_share_a_row() -> None:
    one, two, three = (Rollout((1, 2), (i,), (-1.0,), True) for i in (5, 6, 5))
    other = Rollout((9,), (7,), (-1.0,), True)
    rows = rows_of([one, two, other, three])
    assert [row for row, _ in rows] == [
        Row((1, 2), ((5,), (6,))),
        Row((9,), ((7,),)),
        Row((1, 2), ((5,),)),
    ]
    assert rows[0][1] == (one, two)
