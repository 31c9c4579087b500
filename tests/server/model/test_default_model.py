"""The default model, where it is in the local cache."""

from pathlib import Path

import pytest
import torch
from heedful_server.model.dequantize import dequantized_state_dict

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

# "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


def test_float_form_equals_transformers(default_model_dir: Path, load, stepper) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(default_model_dir)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    missing = model.load_state_dict(dequantized_state_dict(default_model_dir), strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert missing.unexpected_keys == []
    with torch.inference_mode():
        theirs = model.float()(torch.tensor([PROMPT])).logits[0]
    ours = stepper(load(default_model_dir, "float32"), 8, 16).step({"a": PROMPT})["a"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_packed_answers_do_not_depend_on_the_batch(default_model_dir: Path, load, stepper) -> None:
    decoder = load(default_model_dir, "auto")
    assert decoder.quantization == "q4_1"
    prompts = {f"p{i}": PROMPT[: len(PROMPT) - i] for i in range(6)}
    together = stepper(decoder, 64, 16).greedy(prompts, 8)
    for name in ("p0", "p5"):
        assert stepper(decoder, 8, 16).greedy({name: prompts[name]}, 8)[name] == together[name]
