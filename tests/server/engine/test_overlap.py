"""A step that is launched before the text of the last one is made changes nothing that is said."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from heedful_server.engine.engine import Engine
from heedful_server.engine.runner import Runner, StepResult
from heedful_server.engine.sampler import SamplerRow
from heedful_server.engine.scheduler import Scheduler, SchedulerConfig, StepPlan
from heedful_server.model.decoder import TorchDecoder
from heedful_server.model.loader import load_decoder
from heedful_server.protocol import Delta, Failed, SamplingParams, Score, Scored, ScoreItem, Submit
from heedful_server.text.tokenizer import Tokenizer


class OverlappingRunner(Runner):
    """Says of itself that steps compute beside the engine, as they do on a GPU."""

    launches = 0
    fails_at = -1

    @property
    def overlaps(self) -> bool:
        return True

    def launch(self, plan: StepPlan, rows: list[SamplerRow]) -> Callable[[], StepResult]:
        self.launches += 1
        if self.launches == self.fails_at:
            raise RuntimeError("out of memory")
        return super().launch(plan, rows)


@dataclass
class Answers:
    """What an engine has said."""

    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    texts: dict[tuple[str, int], str] = field(default_factory=dict)
    ends: dict[tuple[str, int], tuple[Any, ...]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    scored: dict[str, list[list[float]]] = field(default_factory=dict)

    def take(self, engine: Engine) -> None:
        for report in engine.take_reports():
            match report:
                case Delta():
                    key = (report.request_id, report.index)
                    assert key not in self.ends, "nothing is said after the end"
                    self.tokens.setdefault(key, []).extend(report.token_ids)
                    self.texts[key] = self.texts.get(key, "") + report.text
                    if report.finish is not None:
                        finish = report.finish
                        self.ends[key] = (finish.reason, finish.stop, finish.completion_tokens)
                case Failed():
                    self.failed[report.request_id] = report.message
                case Scored():
                    self.scored[report.request_id] = report.logprobs


@pytest.fixture(scope="module")
def decoder(tiny_model_dir: Path) -> TorchDecoder:
    return load_decoder(tiny_model_dir, "float32", "cpu", lambda stage, share: None)


@pytest.fixture
def make_engine(decoder: TorchDecoder, tiny_model_dir: Path) -> Callable[[type[Runner]], Any]:
    def make(kind: type[Runner], num_blocks: int = 60) -> tuple[Engine, Runner]:
        config = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=4,
            max_sequences=12,
            max_batch_tokens=32,
            max_model_len=128,
        )
        runner = kind(decoder, num_blocks, 4)
        return Engine(runner, Scheduler(config), Tokenizer.load(tiny_model_dir), 128), runner

    return make


def ask(engine: Engine, request_id: str, n: int = 1, prompt: int = 6, **params: Any) -> None:
    settings = {"max_tokens": 12, "seed": len(request_id) + prompt, "ignore_eos": True} | params
    prompt_ids = [(7 * i + prompt) % 250 for i in range(prompt)]
    engine.submit(Submit(request_id, prompt_ids, n, SamplingParams(**settings)))


def ask_much(engine: Engine, stops: tuple[str, ...]) -> None:
    ask(engine, "plain")
    ask(engine, "many", n=3, prompt=9, top_p=0.9)
    ask(engine, "stops", n=2, prompt=5, stop=stops, max_tokens=40)
    ask(engine, "late", prompt=5, stop=stops, min_tokens=6, max_tokens=40)
    ask(engine, "one", prompt=3, max_tokens=1)
    ask(engine, "ids", prompt=8, stop_token_ids=tuple(range(0, 250, 3)))
    ask(engine, "eos", prompt=4, ignore_eos=False, logit_bias=((258, 9.0),))
    ask(engine, "penalised", prompt=20, repetition_penalty=1.3, frequency_penalty=0.5)


def run(engine: Engine, answers: Answers) -> None:
    while engine.has_work:
        engine.step()
        answers.take(engine)
    engine.check_integrity()


# Blocks for all at once, and so few that sequences are preempted.
@pytest.mark.parametrize("num_blocks", [80, 34])
def test_the_same_is_said_with_and_without_overlap(make_engine, num_blocks: int) -> None:
    said = []
    probe, _ = make_engine(Runner)
    ask(probe, "stops", n=2, prompt=5, max_tokens=40)
    first = Answers()
    run(probe, first)
    # A piece of the text that is sure to come, in the middle.
    stops = (first.texts["stops", 0][5:7],)
    for kind in (Runner, OverlappingRunner):
        engine, _ = make_engine(kind, num_blocks)
        ask_much(engine, stops)
        answers = Answers()
        run(engine, answers)
        said.append(answers)
    assert said[0] == said[1]
    assert said[0].ends["stops", 0][:2] == ("stop", stops[0])
    assert {reason for reason, _, _ in said[0].ends.values()} == {"stop", "length"}


def test_a_request_that_is_cancelled_while_its_step_computes_says_no_more(make_engine) -> None:
    engine, _ = make_engine(OverlappingRunner)
    ask(engine, "goes")
    ask(engine, "stays", prompt=7)
    answers = Answers()
    for _ in range(4):
        engine.step()
        answers.take(engine)
    engine.cancel("goes", "cancelled")
    # Its blocks are free at once, and somebody else takes them.
    ask(engine, "comes", prompt=30)
    run(engine, answers)
    assert answers.ends["goes", 0][0] == "cancelled"
    alone, _ = make_engine(Runner)
    ask(alone, "stays", prompt=7)
    ask(alone, "comes", prompt=30)
    expected = Answers()
    run(alone, expected)
    for name in ("stays", "comes"):
        assert answers.tokens[name, 0] == expected.tokens[name, 0]


def test_a_launch_that_fails_fails_its_requests_and_the_engine_goes_on(make_engine) -> None:
    engine, runner = make_engine(OverlappingRunner)
    runner.fails_at = 4
    ask(engine, "unlucky")
    answers = Answers()
    run(engine, answers)
    assert answers.failed == {"unlucky": "the step failed: RuntimeError"}
    ask(engine, "next")
    run(engine, answers)
    assert answers.ends["next", 0][0] == "length"


def test_scores_beside_answers(make_engine) -> None:
    said = []
    for kind in (Runner, OverlappingRunner):
        engine, _ = make_engine(kind)
        ask(engine, "plain")
        answers = Answers()
        for _ in range(3):
            engine.step()
            answers.take(engine)
        engine.score(Score("score", [ScoreItem([5, 6, 7], [8, 9, 10, 11])]))
        run(engine, answers)
        said.append(answers)
    assert said[0].tokens == said[1].tokens
    assert said[0].scored["score"][0] == pytest.approx(said[1].scored["score"][0], abs=1e-4)
