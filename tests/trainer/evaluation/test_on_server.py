"""`heedful-trainer evaluate` at a real server: every task, one policy alone, and errors."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heedful
import pytest
from heedful_trainer.evaluation.asking import Asker
from heedful_trainer.evaluation.run import Subject
from heedful_trainer.evaluation.run import evaluate as evaluation
from heedful_trainer.evaluation.section import Context
from heedful_trainer.main import app
from typer.testing import CliRunner, Result

DATA = Path(__file__).parent / "data"
Run = Callable[..., Result]


@pytest.fixture
def evaluate(served: Any, tmp_path: Path) -> Run:
    def run(*arguments: str, target: str = served.target) -> Result:
        common = ["--target", target, "--out", str(tmp_path / "out"), "--home", str(tmp_path)]
        return CliRunner().invoke(app, ["evaluate", *arguments, *common])

    return run


def sections(tmp_path: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    return {section["name"]: section for section in content["sections"]}


@pytest.fixture(scope="module")
def _votes(served: Any) -> None:
    """Two blind votes of people and one of a program, grades and flags."""
    with heedful.Client(served.target, timeout_s=60) as client:
        # A new version is loaded in the background.
        client.load_adapter("v1")
        asked = {"models": ["v1", "base"], "purpose": "gate", "max_tokens": 6}
        for number, tags in enumerate(((), (), ("simulated",))):
            shown = client.compare(f"{'abc'[number]} question", 2, **asked)  # type: ignore[arg-type]
            client.rank(shown, [[0, 1]], tags=tags)
        for model, grade in (("v1", 6), ("v1", 5), ("base", 2)):
            said = client.generate("Hi", model=model, max_tokens=4).completions[0]
            client.grade(said, grade)
            client.label(said, hallucination=model == "base")


@pytest.mark.usefixtures("_votes")
def test_every_task_is_asked_of_both(evaluate: Run, tmp_path: Path) -> None:
    result = evaluate("v1", "--data", str(DATA), "--limit", "2", "--json")
    assert result.exit_code == 0, result.output
    found = sections(tmp_path)
    assert list(found) == [
        *("votes", "ratings", "reward", "truthfulqa", "toxicity"),
        *("refusals", "gsm8k", "llmbar", "text"),
    ]
    scored = importlib.util.find_spec("profanity_check") is not None
    for name, section in found.items():
        expected = "done" if name != "toxicity" or scored else "skipped"
        assert section["status"] == expected, section["reason"]
        for figure in section["figures"]:
            assert figure["version"] is not None
            assert figure["reading"] in ("n too small", "not compared")
    votes = found["votes"]["figures"][0]
    assert (votes["version"]["value"], votes["version"]["n"]) == (0.5, 2)
    assert "0 won, 0 lost, 2 tied" in votes["detail"]
    assert found["votes"]["notes"][1] == "Not counted: 1 by simulated raters or judges."
    grade = found["ratings"]["figures"][0]
    assert (grade["version"]["value"], grade["baseline"]["value"]) == (5.5, 2.0)
    assert "prompts of the log that were first asked after" in found["reward"]["notes"][0]
    assert [item["licence"] for item in found["refusals"]["data"]] == ["CC-BY-4.0"]
    loss = found["text"]["figures"][0]
    assert loss["difference"]["value"] == pytest.approx(
        loss["version"]["value"] - loss["baseline"]["value"]
    )
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "Evaluation of v1 against base" in page
    assert '"sections"' in result.stdout


def test_a_policy_against_itself_is_asked_once(evaluate: Run, tmp_path: Path) -> None:
    result = evaluate("--tasks", "text, votes, gsm8k", "--limit", "2")
    assert result.exit_code == 0, result.output
    found = sections(tmp_path)
    assert list(found) == ["votes", "gsm8k", "text"]
    assert found["votes"]["reason"] == "version and baseline are the same policy"
    assert found["gsm8k"]["reason"].startswith("no data: put gsm8k_test.jsonl into --data DIR")
    assert found["text"]["figures"][0]["difference"] is None
    assert found["text"]["figures"][0]["version"]["n"] == 2


async def test_both_policies_get_the_same_and_what_is_too_long_is_left_out(served: Any) -> None:
    async with heedful.AsyncClient(served.target, timeout_s=60) as client:
        asker = Asker(client, "v1", "base")
        items = [("Hi", "there"), ("x" * 600, "there"), ("Hi", "you")]
        version, baseline = await asker.scores(items)
        assert [scored is None for scored in version] == [False, True, False]
        assert [scored is None for scored in baseline] == [False, True, False]
        assert version[0] != baseline[0]
        alone = await Asker(client, "base", "base").scores(items)
        assert alone.version is alone.baseline
        assert alone.version == baseline


def test_what_is_wrong_is_said_and_nothing_is_written(evaluate: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    (data / "xstest_prompts.csv").write_text("prompt,label\nHi,unsure\n")
    for arguments, code, message in (
        (("v9",), 1, "there is no policy 'v9'; there are: champion, challenger, v1, base"),
        (("r1",), 1, "there is no policy 'r1'"),
        (("--against", "v8"), 1, "there is no policy 'v8'"),
        (("--tasks", "truth"), 2, "--tasks 'truth': known are votes, ratings"),
        (("--data", str(data)), 1, "line 2, field 'label': has to be safe or unsafe"),
        (("--data", str(data / "xstest_prompts.csv")), 2, "is no directory"),
        (("--prompts", str(tmp_path / "none")), 1, "none: cannot be read"),
        (("--limit", "0"), 2, "--limit"),
    ):
        result = evaluate(*arguments)
        assert result.exit_code == code, result.output
        assert message in result.output
    assert not (tmp_path / "out").exists()


async def test_what_is_done_is_kept_where_the_server_goes_away(served: Any, tmp_path: Path) -> None:
    subject = Subject("v1", "base", "default", "tiny", "f32")
    said: list[str] = []
    async with (
        heedful.AsyncClient(served.target, timeout_s=60) as there,
        heedful.AsyncClient("127.0.0.1:9", timeout_s=1, max_attempts=1) as gone,
    ):
        asker = Asker(there, "v1", "base")
        asker.client = gone  # the log is read through it, and texts are scored by the sampler
        context = Context(asker, tmp_path, 2, 0)
        found = await evaluation(subject, context, ["gsm8k", "text", "votes"], said.append)
    assert [(item.name, item.status) for item in found.sections] == [
        ("gsm8k", "skipped"),
        ("text", "done"),
    ]
    assert isinstance(found.error, heedful.Unavailable)
    assert found.ended_early


def test_no_server(evaluate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heedful_trainer.evaluation.command._CONNECT_S", 0.2)
    result = evaluate("--tasks", "text", target="127.0.0.1:9")
    assert result.exit_code == 3
    assert "no server answers at 127.0.0.1:9" in result.output
