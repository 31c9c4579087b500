"""A file of prompts: what is read, and how a bad line is named."""

from pathlib import Path

import pytest
from heedful.prompt_file import read_prompts
from heedful.types import Message


def test_texts_and_conversations_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "Sing."}\n\n'
        '{"messages": [{"role": "system", "content": "Be brief."},'
        ' {"role": "user", "content": "Count."}], "prompt": null}\n'
        '{"prompt": "Human: Hi\\n\\nAssistant:"}\n'
    )
    found = read_prompts(path)
    assert found.problems == ()
    assert found.prompts == (
        (Message("user", "Sing."),),
        (Message("system", "Be brief."), Message("user", "Count.")),
        (Message("user", "Hi"),),
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'"Sing."', "line 2: is a JSON str, not an object"),
        (b"\xff", "line 2: is not JSON"),
        (b'{"prompt": "\\ud800"}', "line 2: is not JSON"),
        (b'{"prompt": 3}', "line 2: prompt: a conversation is a text or a list, not int"),
        (b'{"messages": [{"role": "x", "content": "y"}]}', "line 2: messages: a message has an"),
        (b'{"messages": [{"role": "assistant", "content": "y"}]}', "line 2: messages: the prompt"),
        (b"{}", "line 2: has neither prompt nor messages"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "Sing."}\n' + line + b"\n")
    found = read_prompts(path)
    assert len(found.prompts) == 1
    (problem,) = found.problems
    assert problem.startswith(says)


def test_an_empty_file_is_a_problem_and_a_missing_one_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n")
    assert read_prompts(path).problems == ("holds no prompt",)
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none.jsonl")
