import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from heedful_kernels import sample_kernels
from heedful_kernels.launch import COMPILE, RefusedInputError, jit, tl
from heedful_kernels.sample import (
    NONE_ALLOWED,
    NOT_FINITE,
    OK,
    Sampled,
    SampleEdits,
    SampleSettings,
    sample,
    sample_reference_batch,
)
from heedful_kernels.sample_reference import exponential_noise, row_key
from heedful_kernels.sample_sizes import sizes_for
from scipy import stats
from torch import Tensor


def settings_for(rows: int, device: torch.device, **row_settings: Any) -> SampleSettings:
    """Every row with the same settings and a key of its own."""
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0} | row_settings
    keys = torch.tensor([row_key(chosen["seed"], 0, row) for row in range(rows)]).view(rows, 2)

    def filled(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    log_min_p = math.log(chosen["min_p"]) if chosen["min_p"] else -math.inf
    return SampleSettings(
        torch.where(keys >= 1 << 31, keys - (1 << 32), keys).to(torch.int32).to(device),
        filled(chosen["temperature"], torch.float32),
        filled(chosen["top_k"], torch.int32),
        filled(chosen["top_p"], torch.float64),
        filled(log_min_p, torch.float32),
    )


def agree(logits: Tensor, settings: SampleSettings) -> Sampled:
    """Draw both ways and compare; returns what the kernels drew."""
    ours, expected = sample(logits, settings), sample_reference_batch(logits, settings)
    assert torch.equal(ours.token_ids_R, expected.token_ids_R)
    assert torch.equal(ours.status_R, expected.status_R)
    # Sums of positive fp32 numbers, and log-probs that are differences of logits below 100.
    for mine, theirs in zip(ours[1:4], expected[1:4], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5, equal_nan=True)
    return ours


@pytest.mark.triton
@pytest.mark.parametrize(
    ("row_settings", "passes"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 0.7}, 1),
        ({"top_k": 7, "temperature": 0.5}, 1),
        ({"top_p": 0.9, "temperature": 0.6}, 1),
        ({"min_p": 0.01}, 1),
        ({"top_k": 50, "top_p": 0.8, "min_p": 0.003}, 1),
    ],
)
def test_peaked_rows_need_one_pass_and_draw_what_the_reference_draws(
    row_settings: dict[str, Any], passes: int, device: torch.device
) -> None:
    logits = (torch.randn(5, 1100) * 3).to(device)
    assert agree(logits, settings_for(5, device, **row_settings)).passes_R.tolist() == [passes] * 5


@pytest.mark.triton
@pytest.mark.parametrize(
    "row_settings",
    [{"top_p": 0.9}, {"top_k": 900}, {"min_p": 1e-4}, {"top_p": 0.9999, "temperature": 3.0}],
)
def test_flat_rows_take_a_counted_second_pass(
    row_settings: dict[str, Any], device: torch.device
) -> None:
    size = 1500 if device.type == "cpu" else 128_256
    if device.type == "cuda" and "top_k" in row_settings:
        row_settings = {"top_k": 30_000}
    logits = torch.randn(2, size).to(device)
    assert agree(logits, settings_for(2, device, **row_settings)).passes_R.tolist() == [2, 2]


@pytest.mark.triton
@pytest.mark.parametrize("row_settings", [{"top_p": 0.5}, {"top_k": 333}])
def test_equal_logits_are_kept_by_lower_id_in_the_last_pass(
    row_settings: dict[str, Any], device: torch.device
) -> None:
    size = 700 if device.type == "cpu" else 50_000
    logits = torch.zeros(1, size, device=device)
    drawn = agree(logits, settings_for(1, device, **row_settings))
    assert drawn.passes_R.tolist() == [3]
    kept = 333 / size if "top_k" in row_settings else 0.5
    assert drawn.kept_mass_R.item() == pytest.approx(kept, abs=1 / size)


@pytest.mark.triton
def test_ties_in_the_candidates_and_rows_of_every_kind_together(device: torch.device) -> None:
    logits = (torch.randn(6, 300) * 4).round().to(device)
    rows = [{"top_k": 5}, {"top_p": 0.6}, {"temperature": 0.0}, {}, {"min_p": 0.1}, {"top_k": 1}]
    parts = [settings_for(6, device, **row) for row in rows]
    names = ("temperature_R", "top_k_R", "top_p_R", "log_min_p_R")
    mixed = {
        name: torch.stack([getattr(part, name)[idx] for idx, part in enumerate(parts)])
        for name in names
    }
    drawn = agree(logits, replace(parts[0], **mixed))
    assert drawn.passes_R.tolist() == [1] * 6
    assert drawn.token_ids_R[2] == logits[2].argmax()
    assert drawn.token_ids_R[5] == logits[5].argmax()
    # A row is the same whatever the others are.
    alone = {name: tensor[1:2].contiguous() for name, tensor in mixed.items()}
    one = sample(logits[1:2], SampleSettings(parts[0].keys_R2[1:2].contiguous(), **alone))
    assert [float(part[0]) for part in one] == [float(part[1]) for part in drawn]


def random_edits(rows: int, vocab: int, device: torch.device) -> SampleEdits:
    ids = torch.stack([torch.randperm(vocab)[:9] for _ in range(rows)]).to(torch.int32)
    ids[:, 7], ids[:, 8] = -1, vocab + 5
    bias = torch.randn(rows, 9) * 3
    bias[:, 2] = -math.inf
    counts = torch.randint(0, 4, (rows, 9), dtype=torch.int32)
    edits = SampleEdits(
        ids,
        bias,
        counts,
        (torch.rand(rows, 9) < 0.5) | (counts > 0),
        torch.full((rows,), 1.3, dtype=torch.float64),
        torch.full((rows,), 0.5, dtype=torch.float64),
        torch.full((rows,), 0.2, dtype=torch.float64),
    )
    return SampleEdits(*(getattr(edits, name).to(device) for name in SampleEdits.__slots__))


@pytest.mark.triton
@pytest.mark.parametrize(
    "row_settings", [{"temperature": 0.0}, {}, {"top_k": 6}, {"top_p": 0.9, "temperature": 2.5}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_edits_and_masks_act_before_the_draw_and_leave_the_logits_alone(
    row_settings: dict[str, Any], masked: bool, device: torch.device
) -> None:
    vocab = 203
    logits = (torch.randn(3, vocab) * 2).to(device)
    before = logits.clone()
    settings = replace(
        settings_for(3, device, **row_settings), edits=random_edits(3, vocab, device)
    )
    if masked:
        words = torch.randint(-(2**31), 2**31, (3, 7), dtype=torch.int32)
        settings = replace(settings, allowed_RW=words.to(device))
    drawn = agree(logits, settings)
    assert torch.equal(logits, before)
    raw = logits.log_softmax(-1).gather(1, drawn.token_ids_R[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs_R, raw, atol=1e-5, rtol=0)


@pytest.mark.triton
def test_edited_tokens_count_in_the_second_pass_too(device: torch.device) -> None:
    size = 900 if device.type == "cpu" else 60_000
    edits = random_edits(2, size, device)
    settings = replace(settings_for(2, device, top_p=0.95), edits=edits)
    drawn = agree(torch.randn(2, size).to(device), settings)
    assert drawn.passes_R.tolist() == [2, 2]


@pytest.mark.triton
def test_rows_that_cannot_be_sampled_say_so_and_the_others_go_on(device: torch.device) -> None:
    logits = torch.randn(5, 70).to(device)
    logits[0, 3], logits[1, 3] = math.nan, math.inf
    logits[2] = -math.inf
    words = torch.full((5, 3), -1, dtype=torch.int32, device=device)
    words[3] = 0
    drawn = agree(logits, replace(settings_for(5, device, top_k=3), allowed_RW=words))
    assert drawn.status_R.tolist() == [NOT_FINITE, NOT_FINITE, NOT_FINITE, NONE_ALLOWED, OK]
    assert drawn.token_ids_R[:4].tolist() == [-1] * 4
    assert drawn.kept_mass_R[:4].isnan().all()


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_strides_and_tiny_vocabularies(
    dtype: torch.dtype, device: torch.device
) -> None:
    wide = torch.randn(2, 90).to(dtype).to(device)
    agree(wide[:, 5:66], settings_for(2, device, top_p=0.8))
    agree(wide[:, :1], settings_for(2, device, top_k=4))
    assert sample(wide[:0], settings_for(0, device)).token_ids_R.shape == (0,)


@jit
def _noise_kernel(ids, keys, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key0, key1 = sample_kernels.load_keys(keys, 0)
    tl.store(out + lane, sample_kernels.exponential_noise(tl.load(ids + lane), key0, key1))


@pytest.mark.triton
def test_noise_is_the_reference_s_to_the_last_bits_at_both_ends(device: torch.device) -> None:
    block, count = 1 << 14, 1 << 17
    ids = torch.arange(count, dtype=torch.int32, device=device)
    settings = settings_for(2, device, seed=7)
    out = torch.full((count,), math.nan, device=device)
    _noise_kernel[(count // block,)](ids, settings.keys_R2[1], out, BLOCK=block, **COMPILE)
    exact = exponential_noise([row_key(7, 0, 1)], ids[None])[0]
    assert exact.min() < 2e-5
    assert exact.max() > 11
    assert ((out - exact).abs() <= 4e-7 * exact).all()


@pytest.mark.triton
def test_draws_follow_the_distribution(device: torch.device) -> None:
    rows = 120 if device.type == "cpu" else 4000
    logits = torch.tensor([[0.0, 0.5, 1.0, -0.5]], device=device).expand(rows, 4).contiguous()
    counts = torch.bincount(sample(logits, settings_for(rows, device)).token_ids_R, minlength=4)
    expected = logits[0].double().softmax(-1) * rows
    assert stats.chisquare(counts.cpu().numpy(), expected.cpu().numpy()).pvalue > 1e-4


@pytest.mark.triton
def test_with_fixed_splits_a_row_is_the_same_bits_in_any_batch(device: torch.device) -> None:
    rows, vocab = 9, 1500 if device.type == "cpu" else 128_256
    logits = (torch.randn(rows, vocab) * 2).to(device)
    settings = settings_for(rows, device, top_p=0.9)
    settings.temperature_R.copy_(torch.tensor([0.0, 0.6, 1.3]).repeat(3))
    settings.top_p_R[6:] = 1.0
    edited = replace(settings, edits=random_edits(rows, vocab, device))
    for chosen in (settings, edited):
        together = sample(logits, chosen, fixed_splits=True)
        for row in (0, 4, 8):
            one = slice(row, row + 1)
            alone = sample(logits[one], only_row(chosen, one), fixed_splits=True)
            for mine, theirs in zip(alone, together, strict=True):
                assert torch.equal(mine, theirs[one])


def only_row(settings: SampleSettings, rows: slice) -> SampleSettings:
    """The settings of some rows."""
    edits = settings.edits
    return SampleSettings(
        settings.keys_R2[rows],
        settings.temperature_R[rows],
        settings.top_k_R[rows],
        settings.top_p_R[rows],
        settings.log_min_p_R[rows],
        None
        if edits is None
        else SampleEdits(
            *(getattr(edits, field.name)[rows].contiguous() for field in fields(SampleEdits))
        ),
    )


def test_few_numbers_of_splits_occur_and_a_fixed_one_where_asked() -> None:
    logits = torch.empty(256, 128_256)
    splits = {sizes_for(logits[:rows], 0, fixed_splits=False).splits for rows in range(1, 257)}
    assert splits <= {1, 2, 4, 8, 16}
    fixed = {sizes_for(logits[:rows], 16, fixed_splits=True) for rows in (1, 7, 256)}
    assert len(fixed) == 1


@pytest.mark.triton
def test_the_operator_is_registered_as_torch_wants_it(device: torch.device) -> None:
    settings = settings_for(1, device)
    torch.library.opcheck(
        torch.ops.heedful.sample.default,
        (
            torch.randn(1, 9, device=device),
            settings.keys_R2,
            settings.temperature_R,
            settings.top_k_R,
            settings.top_p_R,
            settings.log_min_p_R,
            [],
            None,
            False,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_plain_process_draws_by_the_reference() -> None:
    device = torch.device("cpu")
    logits, settings = torch.randn(4, 50).double(), settings_for(4, device, top_p=0.7)
    drawn = sample(logits, settings)
    assert torch.equal(drawn.token_ids_R, sample_reference_batch(logits, settings).token_ids_R)
    assert (drawn.kept_mass_R >= 0.7).all()


def test_misfits_are_refused_by_name() -> None:
    device = torch.device("cpu")
    settings, logits = settings_for(3, device), torch.randn(3, 40)
    with pytest.raises(RefusedInputError, match="logits must be"):
        sample(logits[0], settings)
    with pytest.raises(RefusedInputError, match="temperature must be"):
        sample(logits, replace(settings, temperature_R=torch.ones(2)))
    with pytest.raises(RefusedInputError, match="allowed must be"):
        sample(logits, replace(settings, allowed_RW=torch.zeros(3, 1, dtype=torch.int32)))
    edits = random_edits(3, 40, device)
    with pytest.raises(RefusedInputError, match="bias must be"):
        sample(logits, replace(settings, edits=replace(edits, bias_RE=edits.bias_RE.double())))
