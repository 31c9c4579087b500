"""The user's must-pass prompts: the file's rules, its errors by line, and what answers satisfy."""

import json
from pathlib import Path

import heedful
import pytest
from heedful_trainer.errors import HeedfulTrainerError
from heedful_trainer.gate.must_pass import MustPassError, must_pass_check, read_must_pass
from heedful_trainer.gate.sampler import Answer


def written(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts))
    return path


def answer(text: str) -> Answer:
    return Answer(text, (1,), (-0.1,), ended=True)


def test_rules_are_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "rules.jsonl",
        {"prompt": "Hi", "contains": "hello"},
        "",
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "Bye"},
            ],
            "not_contains": ["Sorry", "sorry"],
            "regex": r"^\w+",
            "max_tokens": 8,
        },
    )
    first, second = read_must_pass(path, max_tokens=50)
    assert (first.line, second.line) == (1, 3)
    assert (first.max_tokens, second.max_tokens) == (50, 8)
    assert first.prompt == [heedful.Message("user", "Hi")]
    assert second.not_contains == ("Sorry", "sorry")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ([1], "only"),
        ({"prompt": "Hi"}, "needs one of"),
        ({"prompt": "Hi", "contain": "x", "contains": "y"}, "only"),
        ({"contains": "x"}, "either prompt or messages"),
        ({"prompt": "Hi", "messages": [], "contains": "x"}, "either prompt or messages"),
        ({"prompt": 4, "contains": "x"}, "the prompt is a text"),
        ({"messages": [], "contains": "x"}, "the prompt is a text"),
        ({"messages": [{"role": "user"}], "contains": "x"}, "the prompt is a text"),
        ({"messages": 3, "contains": "x"}, "the prompt is a text"),
        ({"prompt": "Hi", "regex": "("}, "regex"),
        ({"prompt": "Hi", "contains": [1]}, "a text or a list of texts"),
        ({"prompt": "Hi", "contains": "x", "max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, problem: str) -> None:
    path = written(tmp_path / "rules.jsonl", {"prompt": "Hi", "contains": "x"}, line)
    with pytest.raises(MustPassError, match=problem) as caught:
        read_must_pass(path, max_tokens=50)
    assert f"{path}:2" in str(caught.value)
    assert isinstance(caught.value, HeedfulTrainerError)


def test_a_file_that_is_missing_or_empty_is_no_pass(tmp_path: Path) -> None:
    with pytest.raises(MustPassError, match="cannot be read"):
        read_must_pass(tmp_path / "none.jsonl", 50)
    with pytest.raises(MustPassError, match="holds no prompt"):
        read_must_pass(written(tmp_path / "empty.jsonl", "", ""), 50)


def test_answers_are_held_against_their_rules(tmp_path: Path) -> None:
    rules = read_must_pass(
        written(
            tmp_path / "rules.jsonl",
            {"prompt": "a", "contains": ["x", "y"]},
            {"prompt": "b", "not_contains": "z"},
            {"prompt": "c", "regex": r"^\d+$"},
        ),
        50,
    )
    passed = must_pass_check(rules, [answer("xy"), answer("x"), answer("42")])
    assert (passed.verdict, passed.value, passed.overridable) == ("pass", 1.0, False)
    failed = must_pass_check(rules, [answer("x"), answer("z"), answer("4 2")])
    assert (failed.verdict, failed.value) == ("fail", 0.0)
    assert "line 1: does not contain 'y'" in failed.detail
    assert "line 2: contains 'z'" in failed.detail
