import math
from collections.abc import Callable, Sequence
from typing import Any

import heedful_kernels.sample_reference as reference
import numpy as np
import pytest
import torch
from heedful_kernels.sample_reference import DrawSettings, draw, exponential_noise, row_key
from scipy import stats

# Every test below is deterministic: seeds are fixed, so a p-value is a constant of the code. A
# correct implementation fails one check at this level once in ten thousand choices of the seeds.
SIGNIFICANCE = 1e-4


def random_logits(rows: int, vocab_size: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.9},
        {"top_p": 0.9999, "temperature": 3.0},
        {"top_k": 7},
        {"top_k": 200},
        {"min_p": 0.01},
        {"top_k": 150, "top_p": 0.8, "min_p": 0.003},
    ],
)
@pytest.mark.parametrize("grid", [None, 0.25])
def test_every_way_to_truncate_gives_the_same_bits(
    settings: dict[str, Any], grid: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(12, 2000, seed=7)
    if grid is not None:
        logits = (logits / grid).round() * grid  # many ties, also where the prefix ends
    logits[3, 5:] = -math.inf
    drawn = [DrawSettings(row_key(1, 0, i), **settings) for i in range(12)]
    usual = draw(logits, drawn)
    for candidates, buckets, block in ((1, 4096, 1), (64, 16, 5), (2000, 4096, 12)):
        monkeypatch.setattr(reference, "_NUM_CANDIDATES", candidates)
        monkeypatch.setattr(reference, "_NUM_BUCKETS", buckets)
        monkeypatch.setattr(reference, "_BLOCK_ROWS", block)
        assert draw(logits, drawn) == usual


def test_truncation_that_removes_nothing_changes_nothing() -> None:
    logits = random_logits(64, 700, scale=1.0)
    keys = [row_key(4, 1, i) for i in range(64)]
    assert draw(logits, [DrawSettings(key) for key in keys]) == draw(
        logits, [DrawSettings(key, top_k=700) for key in keys]
    )


def test_a_truncated_draw_is_the_untruncated_one_wherever_that_survives() -> None:
    logits = random_logits(500, 300, scale=1.5)
    keys = [row_key(8, 0, i) for i in range(500)]
    free = draw(logits, [DrawSettings(key) for key in keys])
    cut = draw(logits, [DrawSettings(key, top_k=20) for key in keys])
    top = logits.topk(20).indices.tolist()
    survived = [idx for idx in range(500) if free[idx].token_id in top[idx]]
    assert 150 < len(survived) < 350
    assert all(cut[idx].token_id == free[idx].token_id for idx in survived)


def noise_of(keys: list[tuple[int, int]], ids: Sequence[int]) -> torch.Tensor:
    return exponential_noise(keys, torch.tensor([list(ids)]))


def test_the_hash_is_the_documented_function() -> None:
    mask = 0xFFFFFFFF

    def mix(value: int) -> int:
        value ^= value >> 16
        value = value * 0x21F0AAAD & mask
        value ^= value >> 15
        value = value * 0xD35A2D97 & mask
        return value ^ value >> 15

    seed, sample_idx, position = 0xFEDCBA9876543210, 5, 70000
    keys = []
    for start in (0x243F6A88, 0x85A308D3):
        for word in (seed & mask, seed >> 32, sample_idx, position):
            start = mix(start ^ word)
        keys.append(start)
    assert row_key(seed, sample_idx, position) == (keys[0], keys[1])
    ids = [0, 1, 2, 49151, 131071, 262143]
    expected = []
    for token_id in ids:
        value = token_id * 0x9E3779B9 + keys[0] & mask
        value = (value ^ value >> 16) * 0x21F0AAAD + keys[1] & mask
        value = (value ^ value >> 15) * 0xD35A2D97 & mask
        value ^= value >> 15
        expected.append(-math.log1p(-min((value & 0x7FFFFFFF) + 0.5, 2**31 - 128) * 2.0**-31))
    assert noise_of([(keys[0], keys[1])], ids)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_noise_is_finite_and_positive_at_both_ends_of_the_hash() -> None:
    noise = noise_of([row_key(seed, 0, 0) for seed in range(400)], range(50000))
    assert noise.min() > 0.0
    assert noise.max() < 16.7
    assert noise.min() < 1e-6, "improbable tokens need a fine-grained lower tail"


def keys_along(axis: str) -> list[tuple[int, int]]:
    make: Callable[[int], tuple[int, int]] = {
        "seed": lambda i: row_key(i, 0, 0),
        "high half of seed": lambda i: row_key(i << 32, 0, 0),
        "sample": lambda i: row_key(7, i, 0),
        "position": lambda i: row_key(7, 0, i),
    }[axis]
    return [make(i) for i in range(2000)]


@pytest.mark.parametrize("axis", ["seed", "high half of seed", "sample", "position"])
def test_noise_is_exponential_and_uncorrelated_along_every_axis(axis: str) -> None:
    noise = noise_of(keys_along(axis), range(200)).double().numpy()
    uniform = -np.expm1(-noise)
    flat = np.bincount((uniform * 256).astype(int).ravel(), minlength=256)
    assert stats.chisquare(flat).pvalue > SIGNIFICANCE
    # Along the axis for every token, and along tokens for every key: 10 x 10 cells of neighbours
    # at several distances.
    for left, right in [
        *((uniform[:-lag], uniform[lag:]) for lag in (1, 2, 7, 64)),
        *((uniform[:, :-lag], uniform[:, lag:]) for lag in (1, 2, 7, 64)),
    ]:
        cells = (left * 10).astype(int) * 10 + (right * 10).astype(int)
        pairs = np.bincount(cells.ravel(), minlength=100)
        assert stats.chisquare(pairs).pvalue > SIGNIFICANCE
        correlation = np.corrcoef(left.ravel(), right.ravel())[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(left.size)


def test_every_bit_of_seed_sample_and_position_changes_half_of_the_outcome() -> None:
    ids = range(2000)
    base = -np.expm1(-noise_of([row_key(1, 2, 3)], ids).double().numpy()[0])
    keys = [row_key(1 ^ 1 << bit, 2, 3) for bit in range(64)]
    keys += [row_key(1, 2 ^ 1 << bit, 3) for bit in range(5)]
    keys += [row_key(1, 2, 3 ^ 1 << bit) for bit in range(20)]
    flipped = -np.expm1(-noise_of(keys, ids).double().numpy())
    for row in flipped:
        agreement = np.mean((row < 0.5) == (base < 0.5))
        assert abs(agreement - 0.5) < 0.05
        assert abs(np.corrcoef(row, base)[0, 1]) < 0.1


def test_improbable_tokens_are_drawn_as_often_as_they_should() -> None:
    # One token holds nearly all the mass; 2^13 others share 1/64 of it, two millionths each.
    num_draws, tail = 1500, 1 << 13
    logits = torch.zeros(1, tail + 1)
    logits[0, 0] = math.log(63 * tail)
    rows = [DrawSettings(row_key(33, 0, i)) for i in range(num_draws)]
    drawn = [item.token_id for item in draw(logits.expand(num_draws, -1), rows)]
    rare = sum(token_id != 0 for token_id in drawn)
    assert stats.binomtest(rare, num_draws, 1 / 64).pvalue > SIGNIFICANCE
