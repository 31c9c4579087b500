"""Requests to the scheduler: what is refused before it is queued."""

import pytest
from heedful_server.engine.sequence import EngineRequest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids is empty"),
        ({"n": 0}, "n is 0"),
        ({"n": 2, "max_tokens": 0}, "n is 2 with max_tokens 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"priority": 2}, "priority is 2"),
        ({"logits_start": 3}, "logits_start is 3"),
        ({"logits_start": -1}, "logits_start is -1"),
    ],
)
def test_a_request_with_a_field_out_of_range_is_refused(fields: dict[str, object], message: str):
    good: dict[str, object] = {"request_id": "r", "prompt_token_ids": [1, 1, 1], "max_tokens": 1}
    EngineRequest(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        EngineRequest(**(good | fields))  # type: ignore[arg-type]
