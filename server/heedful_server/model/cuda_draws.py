"""Draws on the device that has the logits: settings there and back, in one copy each way.

Owns the settings' way to the device, their fixed-size form for captured steps, and the packing of
what was drawn. The distribution and its random stream are `heedful_kernels.sample`'s; which request
wants which settings is the engine's. Used by the engine child's main thread.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from heedful_kernels.sample import SampleEdits, SampleSettings, sample
from torch import Tensor

from heedful_server.model.batch import Draws
from heedful_server.model.to_device import pinned, sent

# What a packed row of draws holds, in order; all of it is exact in fp64.
DRAWN_FIELDS: Final = 6


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew, on the host: parallel to the draws that were asked for."""

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    kept_mass: list[float]
    statuses: list[int]
    passes: list[int]


def draw(logits_RV: Tensor, draws: Draws, *, fixed_splits: bool) -> Tensor:
    """Draw eagerly: fp64 [6, D] on the logits' device, nothing waited for."""
    device = logits_RV.device
    if draws.rows_D is not None:
        logits_RV = logits_RV.index_select(0, sent(draws.rows_D, device))
    return draw_settled(
        logits_RV, _sent_settings(draws.settings, device), fixed_splits=fixed_splits
    )


def draw_settled(logits_RV: Tensor, settings: SampleSettings, *, fixed_splits: bool) -> Tensor:
    """Draw with settings that are on the device: fp64 [6, R]."""
    return torch.stack([x.double() for x in sample(logits_RV, settings, fixed_splits=fixed_splits)])


def read_drawn(drawn_6R: Tensor) -> Drawn:
    """Wait for what was drawn and read it: the one wait of a step."""
    tokens, logprobs, sampling_logprobs, kept_mass, statuses, passes = drawn_6R.cpu().tolist()
    return Drawn(
        [int(token) for token in tokens],
        logprobs,
        sampling_logprobs,
        kept_mass,
        [int(status) for status in statuses],
        [int(number) for number in passes],
    )


def is_plain(draws: Draws | None) -> bool:
    """Whether a captured step can make the draws: every logit row once, without edits or mask."""
    return (
        draws is not None
        and draws.rows_D is None
        and draws.settings.edits is None
        and draws.settings.allowed_RW is None
    )


def empty_settings(rows: int, device: torch.device) -> SampleSettings:
    """Settings of rows that take the highest logit, to be written over before each replay."""
    return SampleSettings(
        keys_R2=torch.zeros(rows, 2, dtype=torch.int32, device=device),
        temperature_R=torch.zeros(rows, device=device),
        top_k_R=torch.zeros(rows, dtype=torch.int32, device=device),
        top_p_R=torch.ones(rows, dtype=torch.float64, device=device),
        log_min_p_R=torch.full((rows,), -math.inf, device=device),
    )


def fill_settings(target: SampleSettings, source: SampleSettings) -> None:
    """Write host settings over the head of captured ones, and greedy padding over the rest."""
    rows = len(source.keys_R2)
    for ours, theirs, padding in (
        (target.keys_R2, source.keys_R2, 0.0),
        (target.temperature_R, source.temperature_R, 0.0),
        (target.top_k_R, source.top_k_R, 0.0),
        (target.top_p_R, source.top_p_R, 1.0),
        (target.log_min_p_R, source.log_min_p_R, -math.inf),
    ):
        ours[:rows].copy_(pinned(theirs, ours.device), non_blocking=True)
        ours[rows:].fill_(padding)


def _sent_settings(settings: SampleSettings, device: torch.device) -> SampleSettings:
    edits, allowed = settings.edits, settings.allowed_RW
    return SampleSettings(
        keys_R2=sent(settings.keys_R2, device),
        temperature_R=sent(settings.temperature_R, device),
        top_k_R=sent(settings.top_k_R, device),
        top_p_R=sent(settings.top_p_R, device),
        log_min_p_R=sent(settings.log_min_p_R, device),
        edits=None if edits is None else _sent_edits(edits, device),
        allowed_RW=None if allowed is None else sent(allowed, device),
    )


def _sent_edits(edits: SampleEdits, device: torch.device) -> SampleEdits:
    return SampleEdits(
        token_ids_RE=sent(edits.token_ids_RE, device),
        bias_RE=sent(edits.bias_RE, device),
        counts_RE=sent(edits.counts_RE, device),
        seen_RE=sent(edits.seen_RE, device),
        repetition_R=sent(edits.repetition_R, device),
        presence_R=sent(edits.presence_R, device),
        frequency_R=sent(edits.frequency_R, device),
    )
