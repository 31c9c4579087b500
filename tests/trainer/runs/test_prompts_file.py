"""A run whose file of prompts is not there, or is bad, ends before anything is trained."""

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory; the trainer must be able to read it on "),
        (
            '{"prompt": "x"}\n{"prompt": ""}\n{}\n',
            "line 2: prompt: the prompt is empty (and 1 more)",
        ),
    ],
)
def test_it_is_looked_at_first(
    make_worker: Any, queue: Any, tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    queue(method="ppo_ptx", config={"ppo.prompts": str(path)})
    done = make_worker().work(once=True)
    assert (done.status, done.stage, done.evidence) == ("failed", "snapshot", {})
    assert done.failure.startswith(f"InvalidConfig: trainer.ppo.prompts: {path}: ")
    assert says in done.failure
