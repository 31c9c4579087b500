"""The decoder computes what transformers computes, however the tokens are cut into steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

TOLERANCE = 1e-4


def test_whole_prefill_equals_transformers(
    family_dir: Path, load, stepper, reference_logits, random_ids
) -> None:
    ids = random_ids(50, seed=0)
    ours = stepper(load(family_dir)).step({"a": ids})["a"]
    theirs = reference_logits(family_dir, ids)
    assert theirs.std() > 0.5, "flat logits would hide differences"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_chunks_then_decode_among_other_sequences_equal_transformers(
    family_dir: Path, load, stepper, reference_logits, random_ids
) -> None:
    ids = random_ids(40, seed=1)
    other = random_ids(90, seed=2)
    runner = stepper(load(family_dir))
    parts = []
    taken = 0
    for size, neighbours in (
        (7, {}),
        (1, {"b": other[:61]}),
        (16, {"b": other[61:62], "c": other[:5]}),
        *((1, {"b": other[62 + i : 63 + i], "c": other[5 + i : 6 + i]}) for i in range(16)),
    ):
        # The sequence under test is in the middle, so that its rows start anywhere.
        chunks = dict(list(neighbours.items())[:1]) | {"a": ids[taken : taken + size]}
        chunks |= neighbours
        parts.append(runner.step(chunks)["a"])
        taken += size
    theirs = reference_logits(family_dir, ids)
    torch.testing.assert_close(torch.cat(parts), theirs, rtol=0, atol=TOLERANCE)


def test_batched_greedy_equals_one_at_a_time_in_fp64(
    family_dir: Path, load, stepper, random_ids
) -> None:
    decoder = load(family_dir, "float64")
    prompts = {f"p{i}": random_ids(3 + 9 * i, seed=i) for i in range(5)}
    together = stepper(decoder, 128).greedy(prompts, 12)
    alone = {name: stepper(decoder).greedy({name: ids}, 12)[name] for name, ids in prompts.items()}
    assert together == alone


def test_fp64_agrees_with_fp32(family_dir: Path, load, stepper, random_ids) -> None:
    ids = random_ids(20, seed=3)
    wide = stepper(load(family_dir, "float64")).step({"a": ids})["a"]
    narrow = stepper(load(family_dir)).step({"a": ids})["a"]
    assert wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=TOLERANCE)


def test_sharded_checkpoint_equals_transformers(
    save_checkpoint: Callable[..., Path], load, stepper, reference_logits, random_ids
) -> None:
    model_dir = save_checkpoint("qwen2", max_shard_size="60KB")
    assert len(list(model_dir.glob("*.safetensors"))) > 2
    ids = random_ids(20, seed=0)
    ours = stepper(load(model_dir)).step({"a": ids})["a"]
    torch.testing.assert_close(ours, reference_logits(model_dir, ids), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "opt-norm-before", "gpt-neox-parallel"])
def test_checkpoint_of_the_bare_base_model_loads(
    family: str, save_checkpoint: Callable[..., Path], tmp_path: Path, load, stepper, random_ids
) -> None:
    from safetensors.torch import load_file, save_file

    model_dir = save_checkpoint(family)
    prefixes = ("transformer.", "model.", "gpt_neox.")
    bare = {}
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        bare[name.removeprefix(prefix)] = tensor
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    ids = random_ids(9, seed=0)
    here = stepper(load(tmp_path)).step({"a": ids})["a"]
    assert torch.equal(here, stepper(load(model_dir)).step({"a": ids})["a"])


def test_only_the_wanted_rows_get_logits(llama_dir: Path, load, stepper, random_ids) -> None:
    from dataclasses import replace

    runner = stepper(load(llama_dir))
    seen: list[Tensor] = []
    forward = runner.decoder.forward

    def last_row_only(batch, cache):
        rows = batch.logit_rows_R
        seen.append(forward(replace(batch, logit_rows_R=rows[:0]), cache).logits_RV)
        seen.append(forward(replace(batch, logit_rows_R=rows[-1:]), cache).logits_RV)
        return forward(batch, cache)

    runner.decoder.forward = last_row_only
    logits = runner.step({"a": random_ids(6, seed=0)})["a"]
    assert seen[0].shape == (0, logits.shape[1])
    torch.testing.assert_close(seen[1], logits[-1:])


def test_a_nan_in_one_sequence_stays_there(
    save_checkpoint: Callable[..., Path], load, stepper, random_ids
) -> None:
    decoder = load(save_checkpoint("qwen2"))
    decoder._weights.embed.data[5] = float("nan")
    runner = stepper(decoder)
    # Block tables are padded with block 0, so every shorter sequence gathers its owner's values.
    runner._free.remove(0)
    runner._free.append(0)
    clean = [token for token in random_ids(30, seed=0) if token != 5]
    logits = runner.step({"bad": [5, 1, 2, 5, 3], "good": clean[:3]})
    assert runner.tables["bad"][0] == 0
    assert logits["bad"].isnan().all()
    assert logits["good"].isfinite().all()
    logits = runner.step({"bad": [7], "good": clean[3:4]})
    assert logits["bad"].isnan().all(), "what follows a NaN must not look sound"
    assert logits["good"].isfinite().all()
    # A block comes to its next owner as the last one left it.
    runner._free += runner.tables["bad"]
    assert runner.step({"new": clean[:3]})["new"].isfinite().all()


def test_served_weights_go_back_to_transformers_names(family_dir: Path) -> None:
    from heedful_server.model.dequantize import dequantized_state_dict
    from safetensors.torch import load_file

    stored = load_file(family_dir / "model.safetensors")
    state = dequantized_state_dict(family_dir, "float32")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
