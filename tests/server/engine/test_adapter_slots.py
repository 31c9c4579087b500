"""The table of adapter slots, as a state machine against a plain model of it."""

import pytest
from heedful_server.engine.adapter_slots import NO_SLOT, AdapterSlots, LoadJob, LoadOutcome
from heedful_server.errors import EngineRequestError
from heedful_server.protocol import AdapterLoaded, AdapterUnloaded, Failed, LoadAdapter
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

NAMES = ["a", "b", "c", "d"]
OUTCOME = LoadOutcome(num_bytes=10, rank=4, num_heads=0)


class SlotsMachine(RuleBasedStateMachine):
    """Loads, unloads and requests in any order; the promises are checked after each."""

    @initialize(num_slots=st.integers(1, 3))
    def start(self, num_slots: int) -> None:
        self.freed: list[int] = []
        self.slots = AdapterSlots(num_slots, self.freed.append)
        self.num_slots = num_slots
        self.jobs: dict[str, LoadJob] = {}
        self.owner: dict[int, str] = {}
        self.held: list[tuple[str, int]] = []
        self.asked: dict[str, str] = {}
        self.unloading: set[str] = set()
        self.waiting: set[str] = set()
        self.num_messages = 0

    @rule(name=st.sampled_from(NAMES))
    def load(self, name: str) -> None:
        self.num_messages += 1
        request_id = f"load-{self.num_messages}"
        job = self.slots.load(LoadAdapter(request_id, name, "/there", "policy"))
        self.asked[request_id] = name
        if job is not None:
            assert job.slot not in self.owner, "a slot that is taken was given away"
            self.jobs[name], self.owner[job.slot] = job, name
        self.unloading.discard(name)
        self.take_reports()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), succeeds=st.booleans())
    def finish(self, data: st.DataObject, succeeds: bool) -> None:
        job = self.jobs.pop(data.draw(st.sampled_from(sorted(self.jobs))))
        error = EngineRequestError("invalid", "damaged", "adapter")
        self.slots.finish(job.adapter_id, OUTCOME if succeeds else error, 0.5)
        self.take_reports()

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        self.unloading.add(name)
        self.waiting.add(name)
        self.slots.unload(name)
        self.take_reports()

    @rule(name=st.sampled_from(NAMES))
    def acquire(self, name: str) -> None:
        if name not in self.owner.values() or name in self.unloading or name in self.jobs:
            with pytest.raises(EngineRequestError, match="not loaded"):
                self.slots.acquire(name, "policy", "policy")
            return
        slot = self.slots.acquire(name, "policy", "policy")
        assert self.owner[slot] == name
        self.held.append((name, slot))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.slots.release(name)
        self.take_reports()

    def take_reports(self) -> None:
        held = {slot for _, slot in self.held}
        for slot in self.freed:
            assert slot not in held, "a slot was freed while a request has it"
            del self.owner[slot]
        self.freed.clear()
        for report in self.slots.take_reports():
            if isinstance(report, AdapterUnloaded):
                self.waiting.discard(report.adapter_id)
                self.unloading.discard(report.adapter_id)
                assert report.adapter_id not in self.owner.values()
                continue
            # Every load is answered once.
            name = self.asked.pop(report.request_id)
            if isinstance(report, AdapterLoaded):
                assert report.adapter_id == name
                assert name in self.owner.values()
                # The server knows from this that an earlier unload was overtaken.
                self.waiting.discard(name)
            elif report.kind == "resource":
                assert len(self.owner) == self.num_slots

    @invariant()
    def every_request_keeps_its_slot_and_its_adapter(self) -> None:
        if not hasattr(self, "slots"):
            return
        self.slots.check_integrity()
        assert self.slots.num_taken == len(self.owner)
        for name, slot in self.held:
            assert self.owner[slot] == name
        counts = dict.fromkeys(self.owner.values(), 0)
        for name, _ in self.held:
            counts[name] += 1
        assert self.slots.requests == counts

    def teardown(self) -> None:
        if not hasattr(self, "slots"):
            return
        for name, job in self.jobs.items():
            self.slots.finish(name, OUTCOME, 0.0)
            assert job.adapter_id == name
        self.jobs.clear()
        self.take_reports()
        for name in NAMES:
            self.unload(name)
        while self.held:
            self.slots.release(self.held.pop()[0])
            self.take_reports()
        self.take_reports()
        assert not self.asked, "a load was never answered"
        assert not self.waiting, "an unload was never answered"
        assert self.slots.num_taken == 0


SlotsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_slots_belong_to_one_adapter_as_long_as_anybody_needs_it = SlotsMachine.TestCase


def _loaded(slots: AdapterSlots, name: str, role: str = "policy") -> int:
    job = slots.load(LoadAdapter(name, name, "/there", role))
    assert job is not None
    slots.finish(name, OUTCOME, 0.1)
    return job.slot


def test_the_base_needs_no_slot() -> None:
    slots = AdapterSlots(0, lambda slot: None)
    assert slots.acquire("base", "policy", "policy") == NO_SLOT
    slots.release("base")
    assert slots.load(LoadAdapter("1", "a", "/there", "policy")) is None
    (failed,) = slots.take_reports()
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.message) == ("resource", "all 0 adapter slots are taken")


def test_roles_are_kept_apart() -> None:
    slots = AdapterSlots(2, lambda slot: None)
    _loaded(slots, "p")
    _loaded(slots, "r", "reward")
    with pytest.raises(EngineRequestError, match="is a reward model, not a policy") as caught:
        slots.acquire("r", "policy", "policy")
    assert (caught.value.kind, caught.value.field) == ("invalid", "policy")
    with pytest.raises(EngineRequestError, match="is a policy, not a reward model"):
        slots.acquire("p", "reward", "reward")
    slots.take_reports()
    assert slots.load(LoadAdapter("again", "p", "/there", "reward")) is None
    (failed,) = slots.take_reports()
    assert isinstance(failed, Failed)
    assert failed.kind == "invalid"


def test_a_load_while_the_adapter_leaves_keeps_it() -> None:
    freed: list[int] = []
    slots = AdapterSlots(1, freed.append)
    slot = _loaded(slots, "a")
    assert slots.acquire("a", "policy", "policy") == slot
    slots.unload("a")
    with pytest.raises(EngineRequestError, match="not loaded"):
        slots.acquire("a", "policy", "policy")
    assert slots.load(LoadAdapter("2", "a", "/there", "policy")) is None
    slots.release("a")
    assert slots.acquire("a", "policy", "policy") == slot
    assert freed == []
    kinds = [type(report).__name__ for report in slots.take_reports()]
    assert kinds == ["AdapterLoaded", "AdapterLoaded"]


def test_loads_are_counted_by_outcome() -> None:
    slots = AdapterSlots(2, lambda slot: None)
    _loaded(slots, "a")
    slots.load(LoadAdapter("2", "b", "/there", "policy"))
    slots.finish("b", EngineRequestError("invalid", "damaged"), 0.25)
    assert slots.loads == {"loaded": 1, "invalid": 1}
    assert slots.load_s == pytest.approx(0.35)
    assert slots.num_taken == 1
