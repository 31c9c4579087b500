"""Draws that the decoder makes itself, on a CPU through the kernels' reference: the tokens are
those of sampler.py, whatever is asked of a row.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heedful_kernels import launch
from heedful_server.engine.draws import plan_draws, read_draws
from heedful_server.engine.engine import Engine
from heedful_server.engine.runner import Runner
from heedful_server.engine.sampler import SampledTokens, SamplerRow, sample
from heedful_server.engine.scheduler import Scheduler, SchedulerConfig
from heedful_server.model.batch import ForwardResult
from heedful_server.model.cuda_decoder import CudaDecoder
from heedful_server.model.cuda_draws import draw
from heedful_server.model.decoder import Decoder
from heedful_server.model.families import read_spec
from heedful_server.model.loader import load_decoder, load_weights
from heedful_server.model.weight_modes import resolve_mode
from heedful_server.protocol import Delta, SamplingParams, Submit
from heedful_server.text.tokenizer import Tokenizer
from torch import Tensor

VOCAB = 300
EOS = frozenset({3, 7})
CPU = torch.device("cpu")

Params = dict[str, Any]
CASES: dict[str, Params] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.3, "top_logprobs": 5},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "all truncations": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.7},
    "bias": {"logit_bias": ((5, 8.0), (9, -100.0), (4000, 3.0)), "temperature": 0.0},
    "repetition": {"repetition_penalty": 1.4, "top_p": 0.9},
    "occurrence": {"presence_penalty": 0.9, "frequency_penalty": -0.4},
    "too early": {"min_tokens": 50, "stop_token_ids": (11, 12), "logit_bias": ((11, 50.0),)},
    "everything": {
        "logit_bias": ((1, 2.5),),
        "repetition_penalty": 0.8,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "min_tokens": 90,
        "top_k": 30,
        "top_logprobs": 3,
    },
}


def make_row(seed: int, params: Params, mask: Tensor | None = None) -> SamplerRow:
    generator = np.random.default_rng(seed)
    prompt, completion = (generator.integers(0, VOCAB + 9, size).tolist() for size in (30, 12))
    return SamplerRow(
        SamplingParams(seed=seed * 7919, **params), seed % 3, 12, prompt, completion, mask, EOS
    )


def mask_of(*allowed: int) -> Tensor:
    words = np.zeros(-(-VOCAB // 32), dtype=np.uint32)
    for token_id in allowed:
        words[token_id // 32] |= np.uint32(1 << (token_id % 32))
    return torch.from_numpy(words.view(np.int32))


def drawn(logits: Tensor, rows: list[SamplerRow], chosen: list[int] | None = None) -> SampledTokens:
    """What the engine reads of a step whose decoder draws."""
    plan = plan_draws(rows, chosen or list(range(len(rows))), len(logits), logits.shape[1])
    packed = draw(logits, plan.draws, fixed_splits=False)
    return read_draws(plan, ForwardResult(logits, None, logits[:0], packed), rows)


def assert_same(ours: SampledTokens, theirs: SampledTokens) -> None:
    assert ours.token_ids == theirs.token_ids
    assert ours.errors == theirs.errors
    assert [[i for i, _ in top] for top in ours.top] == [[i for i, _ in top] for top in theirs.top]
    for name in ("logprobs", "sampling_logprobs", "kept_mass"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=2e-5)


@pytest.mark.parametrize("name", list(CASES))
def test_a_seed_gives_the_tokens_of_the_cpu_sampler(name: str) -> None:
    logits = torch.randn(24, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    rows = [make_row(seed, CASES[name]) for seed in range(24)]
    assert_same(drawn(logits, rows), sample(logits, rows))


def test_unlike_rows_masks_and_repeated_logit_rows_in_one_batch() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(2)) * 2
    masks = [None, mask_of(2, 3, 5, 40, 299), mask_of(3, 7), mask_of(*range(100))]
    rows = [
        make_row(seed, params, masks[seed % 4])
        for seed, params in enumerate([*CASES.values(), *CASES.values()])
    ]
    # A grammar that has ended before min_tokens may end the answer: nothing else is allowed.
    assert any(row.params.min_tokens and row.token_mask is masks[2] for row in rows)
    chosen = [seed % 5 for seed in range(len(rows))]
    assert_same(drawn(logits, rows, chosen), sample(logits[chosen], rows))


def test_rows_that_cannot_be_sampled_do_not_disturb_the_others() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3))
    logits[1, 4] = float("nan")
    rows = [make_row(seed, {"top_p": 0.9}) for seed in range(4)]
    rows[2] = make_row(2, {}, mask_of())
    ours = drawn(logits, rows)
    assert_same(ours, sample(logits, rows))
    assert [error is None for error in ours.errors] == [True, False, False, True]


def test_more_edits_than_the_kernel_takes_are_counted_and_sampled_elsewhere() -> None:
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(4))
    rows = [make_row(seed, {"repetition_penalty": 1.2}) for seed in range(2)]
    rows[1] = SamplerRow(rows[1].params, 0, 1, list(range(3000)), [1], None, EOS)
    before = launch.fallback_counts().get("sample:many_edits", 0)
    assert_same(drawn(logits, rows), sample(logits, rows))
    assert launch.fallback_counts()["sample:many_edits"] == before + 1


def cuda_decoder(model_dir: Path, device: torch.device = CPU) -> CudaDecoder:
    spec, mode = read_spec(model_dir), resolve_mode("float32", is_gguf=False, device=CPU)
    weights, form = load_weights(model_dir, spec, mode, device, lambda stage, share: None)
    return CudaDecoder(spec, weights, dtype=mode.dtype, device=device, quantization=form)


def answers(decoder: Decoder, model_dir: Path) -> dict[tuple[str, int], list[int]]:
    """What an engine on a decoder answers to requests of many kinds."""
    config = SchedulerConfig(
        num_blocks=200,
        block_size=8,
        max_sequences=16,
        max_batch_tokens=64,
        max_model_len=256,
    )
    engine = Engine(Runner(decoder, 200, 8), Scheduler(config), Tokenizer.load(model_dir), 256)
    for number, params in enumerate(CASES.values()):
        settings = {"max_tokens": 6, "seed": number, "ignore_eos": True} | params
        sampling = SamplingParams(**settings)
        engine.submit(Submit(f"r{number}", list(range(2, 20 + number)), 1 + number % 3, sampling))
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.has_work:
        engine.step()
        for report in engine.take_reports():
            assert isinstance(report, Delta)
            tokens.setdefault((report.request_id, report.index), []).extend(report.token_ids)
    engine.check_integrity()
    return tokens


def test_an_engine_answers_alike_whichever_side_draws(tiny_model_dir: Path) -> None:
    theirs = load_decoder(tiny_model_dir, "float32", "cpu", lambda stage, share: None)
    expected = answers(theirs, tiny_model_dir)
    assert answers(cuda_decoder(tiny_model_dir), tiny_model_dir) == expected
    assert len(expected) == sum(1 + number % 3 for number in range(len(CASES)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_an_engine_on_a_gpu_answers_as_on_a_cpu(tiny_model_dir: Path) -> None:
    theirs = load_decoder(tiny_model_dir, "float32", "cpu", lambda stage, share: None)
    expected = answers(theirs, tiny_model_dir)
    ours = answers(cuda_decoder(tiny_model_dir, torch.device("cuda")), tiny_model_dir)
    assert ours.keys() == expected.keys()
    # Sums differ in their last bits, which may tip a token that is about to be another.
    assert sum(ours[key] == expected[key] for key in ours) >= 0.9 * len(ours)


def test_the_random_stream_is_not_the_batch_s(tiny_model_dir: Path) -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(6))
    rows = [make_row(seed, {}) for seed in range(6)]
    together: Callable[[int], int] = drawn(logits, rows).token_ids.__getitem__
    for idx in range(6):
        assert drawn(logits[idx : idx + 1], rows[idx : idx + 1]).token_ids == [together(idx)]
