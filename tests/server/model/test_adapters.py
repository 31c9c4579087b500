"""Adapters on the torch path: what PEFT computes, for every family, whoever shares the batch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heedful_server.model.adapter import read_adapter
from heedful_server.model.decoder import TorchDecoder
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-4
_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "opt": {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]},
    "gpt_neox": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
}


def targets(model_dir: Path) -> dict[str, Any]:
    architecture = json.loads((model_dir / "config.json").read_text())["model_type"]
    return TARGETS.get(architecture, {"target_modules": _LLAMA})


def peft_outputs(
    model_dir: Path, adapter_dir: Path, ids: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """What transformers with PEFT computes: logits [T, V], and what its head reads [T, H]."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="eager"
    )
    adapted = PeftModel.from_pretrained(model, adapter_dir).to(dtype)
    seen: list[Tensor] = []
    head = adapted.get_base_model().get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        logits = adapted(torch.tensor([ids])).logits[0]
    return logits, seen[0]


def load_into(decoder: TorchDecoder, *directories: Path, role: str = "policy") -> None:
    decoder.reserve_adapters(len(directories), 16)
    for slot, directory in enumerate(directories):
        assert decoder.load_adapter(slot, read_adapter(directory, decoder.spec, role, 16)) > 0


def test_every_family_computes_what_peft_does(
    family_dir: Path, save_adapter: Callable[..., Path], load, stepper, random_ids
) -> None:
    adapter_dir = save_adapter(family_dir, **targets(family_dir))
    decoder = load(family_dir)
    load_into(decoder, adapter_dir)
    ids, other = random_ids(40, seed=0), random_ids(30, seed=1)
    runner = stepper(decoder)
    runner.adapters["a"] = 0
    parts, taken = [], 0
    for size, neighbours in ((9, {}), (1, {"b": other[:20]}), (29, {"b": other[20:21]}), (1, {})):
        parts.append(runner.step(neighbours | {"a": ids[taken : taken + size]})["a"])
        taken += size
    theirs, hidden_TH = peft_outputs(family_dir, adapter_dir, ids)
    torch.testing.assert_close(torch.cat(parts), theirs, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(runner.hidden["a"], hidden_TH[-1], rtol=0, atol=TOLERANCE)
    base = stepper(load(family_dir)).step({"a": ids})["a"]
    assert (theirs - base).abs().max() > 0.1, "an adapter without effect would hide differences"


def test_fp64_agrees_with_peft_closely(
    llama_dir: Path, save_adapter: Callable[..., Path], load, stepper, random_ids
) -> None:
    adapter_dir = save_adapter(llama_dir)
    decoder = load(llama_dir, "float64")
    load_into(decoder, adapter_dir)
    runner = stepper(decoder)
    runner.adapters["a"] = 0
    ids = random_ids(30, seed=2)
    ours = runner.step({"a": ids})["a"]
    # PEFT's rotary tables and scales are fp32 even then.
    theirs, hidden_TH = peft_outputs(llama_dir, adapter_dir, ids, torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(runner.hidden["a"], hidden_TH[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["down_proj"], "layers_to_transform": 0},
        {"r": 7, "lora_alpha": 5, "use_rslora": True},
        {"target_modules": r".*layers\.0\..*(o_proj|gate_proj)"},
    ],
    ids=str,
)
def test_parts_of_a_model_can_be_adapted(
    options: dict[str, Any], llama_dir: Path, save_adapter, load, stepper, random_ids
) -> None:
    adapter_dir = save_adapter(llama_dir, **options)
    decoder = load(llama_dir)
    load_into(decoder, adapter_dir)
    runner = stepper(decoder)
    runner.adapters["a"] = 0
    ids = random_ids(12, seed=3)
    theirs, _ = peft_outputs(llama_dir, adapter_dir, ids)
    torch.testing.assert_close(runner.step({"a": ids})["a"], theirs, rtol=0, atol=TOLERANCE)


def test_several_adapters_in_one_batch_each_get_their_own(
    llama_dir: Path, save_adapter, load, stepper, random_ids
) -> None:
    decoder = load(llama_dir, "float64")
    load_into(decoder, *(save_adapter(llama_dir, seed=seed, r=2 + 5 * seed) for seed in range(3)))
    prompts = {f"p{i}": random_ids(3 + 4 * i, seed=i) for i in range(8)}
    together = stepper(decoder, 128)
    together.adapters = {name: i % 4 - 1 for i, name in enumerate(prompts)}
    answers = together.greedy(prompts, 6)
    for name, ids in prompts.items():
        alone = stepper(decoder)
        alone.adapters = {name: together.adapters[name]}
        assert alone.greedy({name: ids}, 6)[name] == answers[name]
    assert len({str(answer) for answer in answers.values()}) == len(answers)


def test_in_the_packed_modes_company_changes_no_bit(
    save_checkpoint, save_adapter, load, stepper, random_ids
) -> None:
    model_dir = save_checkpoint("llama-gqa-tied-llama3-rope", hidden_size=128, head_dim=64)
    decoder = load(model_dir, "int4")
    load_into(decoder, *(save_adapter(model_dir, seed=seed) for seed in range(2)))
    prompts = {f"p{i}": random_ids(2 + 9 * i, seed=i) for i in range(7)}
    nexts = {name: random_ids(1, seed=50 + i) for i, name in enumerate(prompts)}
    together = stepper(decoder, 64, 16)
    together.adapters = {name: i % 3 - 1 for i, name in enumerate(prompts)}
    first, second = together.step(prompts), together.step(nexts)
    hidden = together.hidden
    for name, ids in prompts.items():
        alone = stepper(decoder, 8, 16)
        alone.adapters = {name: together.adapters[name]}
        half = len(ids) // 2
        parts = [alone.step({name: part})[name] for part in (ids[:half], ids[half:]) if part]
        assert torch.equal(torch.cat(parts), first[name])
        assert torch.equal(alone.step({name: nexts[name]})[name], second[name])
        assert torch.equal(alone.hidden[name], hidden[name])


def test_rewards_are_those_of_transformers_and_survive_saving(
    llama_dir: Path, save_adapter, load, stepper, random_ids
) -> None:
    adapter_dir = save_adapter(llama_dir, heads=3)
    decoder = load(llama_dir)
    weights = read_adapter(adapter_dir, decoder.spec, "reward", 16)
    assert weights.heads is not None
    load_into(decoder, adapter_dir)
    runner = stepper(decoder)
    runner.adapters["a"] = 0
    ids = random_ids(25, seed=4)
    runner.step({"a": ids})
    ours = weights.heads.weight_JH @ runner.hidden["a"] + weights.heads.bias_J
    stored = load_file(adapter_dir / "reward_heads.safetensors")
    _, hidden_TH = peft_outputs(llama_dir, adapter_dir, ids)
    theirs = stored["weight"] @ hidden_TH[-1] + stored["bias"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_an_emptied_slot_can_be_filled_again(
    llama_dir: Path, save_adapter, load, stepper, random_ids
) -> None:
    decoder = load(llama_dir)
    first, second = save_adapter(llama_dir, seed=0), save_adapter(llama_dir, seed=1)
    load_into(decoder, first)
    decoder.drop_adapter(0)
    decoder.load_adapter(0, read_adapter(second, decoder.spec, "policy", 16))
    runner = stepper(decoder)
    runner.adapters["a"] = 0
    ids = random_ids(9, seed=5)
    theirs, _ = peft_outputs(llama_dir, second, ids)
    torch.testing.assert_close(runner.step({"a": ids})["a"], theirs, rtol=0, atol=TOLERANCE)
