"""Adapters on the native path: near PEFT on the same base, and exact whatever the batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from heedful_kernels import cpu
from heedful_server.model.adapter import read_adapter
from heedful_server.model.export import export
from heedful_server.model.load import load_best_decoder
from heedful_server.model.native_decoder import NativeDecoder
from heedful_server.protocol import EngineConfig
from torch import Tensor

pytestmark = pytest.mark.skipif(
    cpu.find_library() is None, reason="the native kernels are not built (no C++ compiler)"
)

BLOCK = 16


def _config(model_dir: Path, quantize: str, threads: int = 2) -> EngineConfig:
    return EngineConfig(
        str(model_dir), quantize, device="cpu", num_threads=threads, max_batch_tokens=256
    )


def _load(model_dir: Path, quantize: str, *adapters: Path, threads: int = 2) -> NativeDecoder:
    decoder = load_best_decoder(_config(model_dir, quantize, threads), lambda stage, share: None)
    assert isinstance(decoder, NativeDecoder)
    decoder.reserve_adapters(max(1, len(adapters)), 48)
    for slot, directory in enumerate(adapters):
        assert decoder.load_adapter(slot, read_adapter(directory, decoder.spec, "policy", 48)) > 0
    return decoder


def _reference(model_dir: Path, adapter_dir: Path | None, ids: list[int]) -> tuple[Tensor, Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    adapted = model if adapter_dir is None else PeftModel.from_pretrained(model, adapter_dir)
    with torch.inference_mode():
        output = adapted(torch.tensor([ids]), output_hidden_states=True)
    return output.logits[0], output.hidden_states[-1][0]


def _error(ours_TN: Tensor, theirs_TN: Tensor) -> Tensor:
    return (ours_TN - theirs_TN).norm(dim=-1) / theirs_TN.norm(dim=-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 20, "lora_alpha": 30, "use_rslora": True},
        {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
    ],
    ids=["all", "rank 20", "two of layer 1"],
)
def test_an_adapter_adds_no_more_error_than_the_base_has(
    options, tiny_model_dir: Path, save_adapter: Callable[..., Path], stepper, tmp_path: Path
) -> None:
    """Against transformers and PEFT on the very weights that are served.

    What is left is the rounding of activations to 8 bits, with and without the adapter, and that of
    A and B to bf16, 2^-9 each. The latter passes through two layers, as the former does.
    """
    adapter_dir = save_adapter(tiny_model_dir, **options)
    export(_config(tiny_model_dir, "int8"), tmp_path / "base", "float32")
    decoder = _load(tiny_model_dir, "int8", adapter_dir)
    ids = torch.randint(0, 250, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    plain, adapted = stepper(decoder, 16, BLOCK), stepper(decoder, 16, BLOCK)
    adapted.adapters["a"] = 0
    base_TV, ours_TV = plain.step({"a": ids})["a"], adapted.step({"a": ids})["a"]
    their_base_TV, _ = _reference(tmp_path / "base", None, ids)
    theirs_TV, hidden_TH = _reference(tmp_path / "base", adapter_dir, ids)
    base_error_T, error_T = _error(base_TV, their_base_TV), _error(ours_TV, theirs_TV)
    assert error_T[0] < 2 * base_error_T[0] + 2**-6
    assert error_T.mean() < 2 * base_error_T.mean() + 2**-6
    assert _error(base_TV, theirs_TV).mean() > 4 * error_T.mean(), "the adapter has no effect"
    hidden_error = _error(adapted.hidden["a"], hidden_TH[-1])
    assert hidden_error < 3 * base_error_T.mean() + 2**-6


@pytest.fixture(scope="module")
def mixed(tiny_model_dir: Path, save_adapter: Callable[..., Path]) -> list[Path]:
    ranks = (4, 16, 33)
    return [save_adapter(tiny_model_dir, seed=i, r=rank) for i, rank in enumerate(ranks)]


def test_company_threads_and_chunking_change_no_bit(
    tiny_model_dir: Path, mixed: list[Path], stepper, random_ids
) -> None:
    decoder = _load(tiny_model_dir, "int4", *mixed)
    prompts = {f"p{i}": random_ids(2 + 11 * i, seed=i) for i in range(8)}
    nexts = {name: random_ids(1, seed=50 + i) for i, name in enumerate(prompts)}
    together = stepper(decoder, 64, BLOCK)
    together.adapters = {name: i % 4 - 1 for i, name in enumerate(prompts)}
    half = dict(list(prompts.items())[:4])
    first = together.step(half) | together.step({n: prompts[n] for n in prompts if n not in half})
    second, hidden = together.step(nexts), together.hidden
    lonely = _load(tiny_model_dir, "int4", *mixed, threads=1)
    for name, ids in prompts.items():
        alone = stepper(lonely, 8, BLOCK)
        if together.adapters[name] >= 0:
            alone.adapters = {name: together.adapters[name]}
        # A sequence without an adapter runs the program without adapters here.
        cut = len(ids) // 2
        parts = [alone.step({name: part})[name] for part in (ids[:cut], ids[cut:]) if part]
        assert torch.equal(torch.cat(parts), first[name]), name
        assert torch.equal(alone.step({name: nexts[name]})[name], second[name]), name
        assert torch.equal(alone.hidden[name], hidden[name]), name


def test_a_slot_may_be_filled_while_another_is_used_and_emptied_later(
    tiny_model_dir: Path, mixed: list[Path], stepper, random_ids
) -> None:
    decoder = _load(tiny_model_dir, "int4", mixed[0], mixed[1])
    ids = random_ids(20, seed=0)
    runner = stepper(decoder, 64, BLOCK)
    runner.adapters = {"a": 0, "b": 0, "c": 1, "d": 1}
    expected = runner.step({"a": ids})["a"]
    other = runner.step({"c": ids})["c"]
    decoder.drop_adapter(1)
    decoder.load_adapter(1, read_adapter(mixed[2], decoder.spec, "policy", 48))
    assert torch.equal(runner.step({"b": ids})["b"], expected)
    assert not torch.equal(runner.step({"d": ids})["d"], other)
