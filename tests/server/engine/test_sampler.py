import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from heedful_server.engine.sampler import (
    FAILED_TOKEN_ID,
    SampledTokens,
    SamplerRow,
    sample,
    token_logprobs,
)
from heedful_server.model.batch import RowStats
from heedful_server.protocol import SamplingParams
from scipy import stats

# Every test below is deterministic: seeds are fixed, so a p-value is a constant of the code. A
# correct sampler fails one check at this level once in ten thousand choices of the seeds.
SIGNIFICANCE = 1e-4
EOS = 3

Params = dict[str, Any]


def make_row(
    params: SamplingParams,
    position: int = 0,
    sample_idx: int = 0,
    prompt: Sequence[int] = (),
    completion: Sequence[int] = (),
    mask: torch.Tensor | None = None,
) -> SamplerRow:
    return SamplerRow(params, sample_idx, position, prompt, completion, mask, frozenset({EOS}))


def mask_of(allowed: set[int], vocab_size: int) -> torch.Tensor:
    words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token_id in allowed:
        words[token_id // 32] |= np.uint32(1 << (token_id % 32))
    return torch.from_numpy(words.view(np.int32))


def random_logits(rows: int, vocab_size: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def expected_logits(logits: Sequence[float], row: SamplerRow) -> list[float]:
    """The steps 2 to 6 in plain Python."""
    params = row.params
    edited = [float(value) for value in logits]
    for token_id, bias in params.logit_bias:
        edited[token_id] += bias
    for token_id in {*row.prompt_token_ids, *row.completion_token_ids}:
        penalty = params.repetition_penalty
        edited[token_id] *= 1 / penalty if edited[token_id] > 0 else penalty
    for token_id, count in Counter(row.completion_token_ids).items():
        edited[token_id] -= params.presence_penalty + params.frequency_penalty * count
    if row.position < params.min_tokens:
        for token_id in {*row.eos_token_ids, *params.stop_token_ids}:
            edited[token_id] = -math.inf
    if row.token_mask is not None:
        words = row.token_mask.tolist()
        for token_id in range(len(edited)):
            if not words[token_id // 32] >> token_id % 32 & 1:
                edited[token_id] = -math.inf
    return edited


def expected_distribution(logits: Sequence[float], row: SamplerRow) -> tuple[list[float], float]:
    """Probability of every token, and the kept mass, by the definition and in float64."""
    params = row.params
    edited = expected_logits(logits, row)
    best = max(edited)
    if params.temperature == 0.0:
        winner = edited.index(best)
        return [float(token_id == winner) for token_id in range(len(edited))], 1.0
    weights = [math.exp((value - best) / params.temperature) for value in edited]
    total = math.fsum(weights)
    probs = [weight / total for weight in weights]
    ranking = sorted(range(len(probs)), key=lambda token_id: (-edited[token_id], token_id))
    kept: list[int] = []
    mass = 0.0
    for token_id in ranking:
        if params.top_k and len(kept) == params.top_k:
            break
        if params.top_p < 1.0 and mass >= params.top_p:
            break
        if probs[token_id] < params.min_p * probs[ranking[0]] or probs[token_id] == 0.0:
            break
        kept.append(token_id)
        mass = math.fsum([mass, probs[token_id]])
    truncated = [0.0] * len(probs)
    for token_id in kept:
        truncated[token_id] = probs[token_id] / mass
    return truncated, mass


def chi_square_p(counts: Sequence[int], probs: Sequence[float]) -> float:
    """p-value of counts under probs; cells that expect fewer than 5 are pooled."""
    draws = sum(counts)
    cells = sorted(zip(probs, counts, strict=True))
    assert all(count == 0 for prob, count in cells if prob == 0.0)
    pooled = [[0.0, 0.0]]
    for prob, count in cells:
        if pooled[-1][0] >= 5.0:
            pooled.append([0.0, 0.0])
        pooled[-1][0] += prob * draws
        pooled[-1][1] += count
    if len(pooled) == 1:
        return 1.0
    expected, observed = np.array(pooled).T
    return float(stats.chisquare(observed, expected * (draws / expected.sum())).pvalue)


CASES: dict[str, Params] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 1.0},
    "frequency": {"frequency_penalty": 0.5},
    "negative penalties": {"presence_penalty": -1.0, "frequency_penalty": -0.25},
    "bias": {"logit_bias": ((2, 3.0), (7, -100.0))},
    "min_tokens": {"min_tokens": 10**6, "stop_token_ids": (5, 9)},
    "top_k over top_p": {"top_k": 3, "top_p": 0.95},
    "top_p over top_k": {"top_k": 15, "top_p": 0.5, "temperature": 1.3},
    "all": {
        "temperature": 1.2,
        "top_k": 12,
        "top_p": 0.93,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "logit_bias": ((4, 2.0),),
        "min_tokens": 10**6,
        "stop_token_ids": (5,),
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_draws_follow_the_defined_distribution(case: str, masked: bool) -> None:
    vocab_size, num_draws = 20, 3000
    logits = random_logits(1, vocab_size, scale=1.5, seed=1)
    params = SamplingParams(seed=11, **CASES[case])
    mask = mask_of(set(range(1, vocab_size, 2)) | {2, 4}, vocab_size) if masked else None
    rows = [
        make_row(params, position, prompt=(0, 1, 2), completion=(2, 4, 4, 8), mask=mask)
        for position in range(num_draws)
    ]

    sampled = sample(logits.expand(num_draws, -1), rows)

    probs, kept_mass = expected_distribution(logits[0].tolist(), rows[0])
    counts = Counter(sampled.token_ids)
    p_value = chi_square_p([counts[token_id] for token_id in range(vocab_size)], probs)
    assert p_value > SIGNIFICANCE
    assert sampled.kept_mass == pytest.approx([kept_mass] * num_draws, abs=1e-6)
    assert sampled.sampling_logprobs == pytest.approx(
        [math.log(probs[token_id]) for token_id in sampled.token_ids], abs=2e-6
    )


@pytest.mark.parametrize("vocab_size", [1, 2, 33, 257, 1000, 5000])
@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 2.0},
        {"top_k": 40},
        {"top_k": 700},
        {"min_p": 0.001},
        {"top_k": 600, "top_p": 0.97, "min_p": 1e-4, "temperature": 3.0},
    ],
)
def test_kept_mass_and_log_probs_are_exact_at_every_size(vocab_size: int, params: Params) -> None:
    logits = random_logits(6, vocab_size)
    rows = [make_row(SamplingParams(seed=5, **params), position) for position in range(6)]
    sampled = sample(logits, rows)
    for idx, row in enumerate(rows):
        probs, kept_mass = expected_distribution(logits[idx].tolist(), row)
        token_id = sampled.token_ids[idx]
        assert probs[token_id] > 0.0
        assert sampled.kept_mass[idx] == pytest.approx(kept_mass, abs=1e-6)
        assert sampled.sampling_logprobs[idx] == pytest.approx(math.log(probs[token_id]), abs=5e-6)
        raw = torch.log_softmax(logits[idx].double(), dim=-1)[token_id].item()
        assert sampled.logprobs[idx] == pytest.approx(raw, abs=5e-6)


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9])
def test_top_p_keeps_the_token_that_reaches_the_mass_and_no_more(top_p: float) -> None:
    # Eight equal tokens: top_p 0.5 is reached by exactly four, by the lower ids.
    rows = [make_row(SamplingParams(seed=1, top_p=top_p), position) for position in range(400)]
    sampled = sample(torch.zeros(400, 8), rows)
    kept = math.ceil(Fraction(top_p) * 8)
    assert set(sampled.token_ids) == set(range(kept))
    assert set(sampled.kept_mass) == {kept / 8}


def test_ties_go_to_the_lower_token_id() -> None:
    logits = torch.zeros(300, 3000)
    logits[:, 7] = -1.0
    logits[:, [2000, 2100]] = 1.0
    greedy = sample(logits[:1], [make_row(SamplingParams(temperature=0.0))])
    assert greedy.token_ids == [2000]
    rows = [make_row(SamplingParams(seed=3, top_k=5), position) for position in range(300)]
    assert set(sample(logits, rows).token_ids) == {2000, 2100, 0, 1, 2}
    rows = [make_row(SamplingParams(seed=3, min_p=1.0), position) for position in range(300)]
    assert set(sample(logits, rows).token_ids) == {2000, 2100}
    rows = [make_row(SamplingParams(seed=3, top_k=1), position) for position in range(20)]
    assert set(sample(logits[:20], rows).token_ids) == {2000}


def test_top_k_of_one_is_greedy() -> None:
    logits = random_logits(50, 1000, seed=2)
    rows = [make_row(SamplingParams(seed=9, top_k=1, temperature=5.0), i) for i in range(50)]
    sampled = sample(logits, rows)
    assert sampled.token_ids == logits.argmax(dim=-1).tolist()
    assert sampled.sampling_logprobs == [0.0] * 50


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-8, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = random_logits(20, 500, seed=3) * 1e3
    rows = [make_row(SamplingParams(seed=9, temperature=temperature), i) for i in range(20)]
    sampled = sample(logits, rows)
    assert sampled.errors == [None] * 20
    assert all(map(math.isfinite, sampled.sampling_logprobs))
    if temperature < 1:
        assert sampled.token_ids == logits.argmax(dim=-1).tolist()


def test_greedy_reports_raw_log_probs_and_certainty() -> None:
    logits = random_logits(3, 100)
    sampled = sample(logits, [make_row(SamplingParams(temperature=0.0))] * 3)
    assert sampled.token_ids == logits.argmax(dim=-1).tolist()
    assert sampled.sampling_logprobs == [0.0] * 3
    assert sampled.kept_mass == [1.0] * 3
    assert sampled.logprobs == pytest.approx(
        torch.log_softmax(logits.double(), -1).amax(-1).tolist(), abs=1e-6
    )
    assert sampled.top == [[], [], []]


def greedy_over(logits: list[float], params: Params, **row: Any) -> SampledTokens:
    sampling = SamplingParams(temperature=0.0, **params)
    return sample(torch.tensor([logits]), [make_row(sampling, **row)])


def edited_gap(params: Params, logits: list[float], **row: Any) -> float:
    """Edited logit of token 0 less that of token 1, read off the sampling log-prob."""
    sampling = SamplingParams(seed=1, **params)
    sampled = sample(torch.tensor([logits]), [make_row(sampling, **row)])
    prob = math.exp(sampled.sampling_logprobs[0])
    log_odds = math.log(prob / (1 - prob))
    return log_odds if sampled.token_ids[0] == 0 else -log_odds


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    params = {"repetition_penalty": 2.0}
    assert edited_gap(params, [3.0, 1.0], prompt=(0,)) == pytest.approx(0.5, abs=1e-5)
    assert edited_gap(params, [-1.0, -0.5], completion=(0, 0, 0)) == pytest.approx(-1.5, abs=1e-5)
    assert edited_gap(params, [3.0, 2.0], prompt=(0, 1), completion=(1,)) == pytest.approx(
        0.5, abs=1e-5
    )


def test_presence_and_frequency_count_only_the_completion() -> None:
    params = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    assert edited_gap(params, [1.0, 1.0], prompt=(0, 0)) == pytest.approx(0.0, abs=1e-5)
    assert edited_gap(params, [1.0, 1.0], completion=(0, 0, 0)) == pytest.approx(-1.25, abs=1e-5)
    assert edited_gap(params, [1.0, 1.0], completion=(0, 1, 1)) == pytest.approx(0.25, abs=1e-5)


def test_bias_comes_before_the_repetition_penalty() -> None:
    # (-1 + 5) / 2 - 1 = 1; the other way round it would be (-1 * 2 + 5) - 1 = 2.
    params = {"logit_bias": ((0, 5.0),), "repetition_penalty": 2.0}
    assert edited_gap(params, [-1.0, 1.0], prompt=(0,)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("penalty", [1e-300, 1e-40])
def test_a_vanishing_repetition_penalty_makes_no_infinity(penalty: float) -> None:
    sampled = greedy_over([1.0, 5.0, -2.0], {"repetition_penalty": penalty}, prompt=(0, 2))
    assert sampled.errors == [None]
    assert sampled.token_ids == [0]


def test_raw_log_probs_ignore_every_edit() -> None:
    logits = [0.5, 1.0, 0.2]
    sampled = greedy_over(logits, {"logit_bias": ((2, 50.0),), "top_logprobs": 2})
    assert sampled.token_ids == [2]
    raw = torch.log_softmax(torch.tensor(logits), -1).tolist()
    assert sampled.logprobs == pytest.approx([raw[2]])
    assert [token_id for token_id, _ in sampled.top[0]] == [1, 0]
    assert [logprob for _, logprob in sampled.top[0]] == pytest.approx([raw[1], raw[0]])


def test_min_tokens_forbids_what_would_end_the_completion() -> None:
    logits = [1.0, 2.0, 0.0, 9.0, 0.0, 8.0]
    params = {"min_tokens": 4, "stop_token_ids": (5, 99)}
    assert greedy_over(logits, params, position=3).token_ids == [1]
    assert greedy_over(logits, params, position=4).token_ids == [EOS]
    assert greedy_over(logits, {**params, "ignore_eos": True}, position=3).token_ids == [EOS]


def test_a_constraint_outranks_min_tokens_where_both_leave_nothing() -> None:
    logits = [1.0, 2.0, 0.0, 0.5]
    assert greedy_over(logits, {"min_tokens": 9}, mask=mask_of({EOS}, 4)).token_ids == [EOS]
    assert greedy_over(logits, {"min_tokens": 9}, mask=mask_of({0, EOS}, 4)).token_ids == [0]


def test_only_tokens_of_the_mask_are_drawn_and_truncation_works_within_it() -> None:
    vocab_size = 100
    allowed = {0, 31, 32, 63, 99}
    logits = random_logits(200, vocab_size, scale=0.1)
    mask = mask_of(allowed, vocab_size)
    rows = [make_row(SamplingParams(seed=2), i, mask=mask) for i in range(200)]
    sampled = sample(logits, rows)
    assert set(sampled.token_ids) == allowed
    assert sampled.kept_mass == [1.0] * 200
    rows = [make_row(SamplingParams(seed=2, top_k=99), i, mask=mask) for i in range(200)]
    assert sample(logits, rows).token_ids == sampled.token_ids


def test_top_log_probs_are_ranked_with_ties_by_id() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 40] = 2.0
    sampled = sample(logits, [make_row(SamplingParams(temperature=0.0, top_logprobs=4))])
    assert [token_id for token_id, _ in sampled.top[0]] == [40, 0, 1, 2]
    assert sampled.top[0][0][1] == sampled.logprobs[0]
    short = sample(torch.zeros(1, 2), [make_row(SamplingParams(temperature=0.0, top_logprobs=20))])
    assert [token_id for token_id, _ in short.top[0]] == [0, 1]


def test_ids_beyond_the_logits_are_passed_over() -> None:
    params = {"logit_bias": ((500, 5.0), (1, 1.0)), "repetition_penalty": 1.1, "min_tokens": 2}
    sampled = greedy_over(
        [0.5, 0.0], {**params, "presence_penalty": 0.1}, prompt=(400,), completion=(300, 0)
    )
    assert sampled.token_ids == [1]


def mixed_rows(count: int, vocab_size: int) -> list[SamplerRow]:
    choices: list[Params] = [*CASES.values(), {"temperature": 0.0}, {"top_k": 900}]
    return [
        make_row(
            SamplingParams(seed=idx, top_logprobs=idx % 3, **choices[idx % len(choices)]),
            position=idx,
            sample_idx=idx % 4,
            prompt=(1, 2, 3),
            completion=(idx, 5, 5),
            mask=mask_of(set(range(idx, vocab_size, 2)), vocab_size) if idx % 5 == 0 else None,
        )
        for idx in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_is_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    logits = random_logits(40, 3001, seed=4).to(dtype)
    rows = mixed_rows(40, 3001)
    together = sample(logits, rows)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5)).tolist()
    shuffled = sample(logits[order], [rows[idx] for idx in order])
    for place, idx in enumerate(order):
        alone = sample(logits[idx : idx + 1], [rows[idx]])
        for name in ("token_ids", "logprobs", "sampling_logprobs", "kept_mass", "top", "errors"):
            assert getattr(alone, name)[0] == getattr(together, name)[idx]
            assert getattr(shuffled, name)[place] == getattr(together, name)[idx]


def test_a_row_is_the_same_bits_with_any_number_of_threads() -> None:
    logits = random_logits(9, 49152, seed=6)
    rows = mixed_rows(9, 49152)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = sample(logits, rows)
        torch.set_num_threads(2)
        assert sample(logits, rows) == single
    finally:
        torch.set_num_threads(before)


def test_bad_rows_fail_alone() -> None:
    logits = random_logits(7, 64)
    logits[1, 9] = math.nan
    logits[2, 9] = math.inf
    logits[3] = -math.inf
    rows = [make_row(SamplingParams(seed=1, top_p=0.9), i) for i in range(7)]
    rows[4] = make_row(SamplingParams(seed=1), mask=mask_of(set(), 64))
    rows[5] = make_row(SamplingParams(temperature=0.0, top_logprobs=3), mask=mask_of(set(), 64))
    sampled = sample(logits, rows)
    assert [idx for idx, error in enumerate(sampled.errors) if error is None] == [0, 6]
    assert "finite" in (sampled.errors[1] or "")
    assert "no token is allowed" in (sampled.errors[4] or "")
    for idx in range(1, 6):
        assert sampled.token_ids[idx] == FAILED_TOKEN_ID
        assert math.isnan(sampled.logprobs[idx])
        assert sampled.top[idx] == []
    healthy = sample(logits[[0, 6]], [rows[0], rows[6]])
    assert healthy.token_ids == [sampled.token_ids[0], sampled.token_ids[6]]


def test_a_nan_that_a_mask_hides_is_still_an_error() -> None:
    logits = torch.tensor([[1.0, math.nan, 0.0]])
    sampled = sample(logits, [make_row(SamplingParams(), mask=mask_of({0, 2}, 3))])
    assert "finite" in (sampled.errors[0] or "")


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(20, 3000)
    before = logits.clone()
    sample(logits, mixed_rows(20, 3000))
    assert torch.equal(logits, before)


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 10), []).token_ids == []


def test_scored_log_probs_are_those_of_sampling() -> None:
    logits = random_logits(5, 777)
    sampled = sample(logits, [make_row(SamplingParams(seed=3), i) for i in range(5)])
    assert token_logprobs(logits, sampled.token_ids) == sampled.logprobs


def test_draws_of_successive_positions_and_samples_are_independent() -> None:
    logits = torch.zeros(1, 6)
    for rows in (
        [make_row(SamplingParams(seed=21), position) for position in range(9000)],
        [make_row(SamplingParams(seed=21), 4, sample_idx) for sample_idx in range(9000)],
        [make_row(SamplingParams(seed=seed), 4) for seed in range(9000)],
    ):
        tokens = np.array(sample(logits.expand(len(rows), -1), rows).token_ids)
        for lag in (1, 2, 16):
            table = np.zeros((6, 6))
            np.add.at(table, (tokens[:-lag], tokens[lag:]), 1)
            assert stats.chi2_contingency(table).pvalue > SIGNIFICANCE


def test_the_same_key_repeats_and_every_part_of_it_matters() -> None:
    logits = random_logits(1, 5000, scale=0.5)

    def tokens(seed: int, sample_idx: int, first: int) -> list[int]:
        rows = [make_row(SamplingParams(seed=seed), first + i, sample_idx) for i in range(50)]
        return sample(logits.expand(50, -1), rows).token_ids

    assert tokens(1, 0, 0) == tokens(1, 0, 0)
    assert tokens(1, 0, 0)[25:] == tokens(1, 0, 25)[:25]
    others = [tokens(2, 0, 0), tokens(1, 1, 0), tokens(1, 0, 1), tokens(1 + 2**63, 0, 0)]
    for other in others:
        assert sum(a == b for a, b in zip(tokens(1, 0, 0), other, strict=True)) < 5


def test_plain_greedy_rows_are_read_off_the_statistics_and_others_are_sampled() -> None:
    torch.manual_seed(3)
    logits_RV = torch.randn(5, 97)
    logits_RV[3, 4] = math.nan
    maxima = logits_RV.nan_to_num(nan=9.0).amax(1)
    argmax = torch.where(logits_RV.isnan().any(1), -1, logits_RV.argmax(1)).to(torch.int32)
    row_stats = RowStats(argmax, maxima, torch.logsumexp(logits_RV, 1))
    rows = [
        SamplerRow(
            params=SamplingParams(temperature=temperature, seed=5, top_logprobs=top),
            sample_idx=0,
            position=idx,
            prompt_token_ids=[1],
            completion_token_ids=[],
            token_mask=None,
            eos_token_ids=frozenset(),
        )
        for idx, (temperature, top) in enumerate([(0, 0), (1, 0), (0, 2), (0, 0), (0, 0)])
    ]
    fast, slow = sample(logits_RV, rows, row_stats), sample(logits_RV, rows)
    assert fast.token_ids == slow.token_ids
    assert fast.errors == slow.errors
    assert fast.errors[3] is not None
    assert fast.top == slow.top
    for ours, theirs in zip(fast.logprobs, slow.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, nan_ok=True)
    assert fast.sampling_logprobs[0] == 0.0
