"""Edits of one row of logits before it is sampled from.

Owns what each edit does to a row; sampler.py owns their order. It knows nothing of requests. Every
function works in place on one row [V] (a copy: never the model's output), on any device, and passes
over ids outside [0, V), because a tokenizer may name more tokens than the model has logits for.
Called in the engine child's main thread.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Penalties near zero would push a logit to infinity; such a logit wins anyway.
_MAX_LOGIT = 1e30


def add_bias(logits_V: Tensor, logit_bias: Sequence[tuple[int, float]]) -> None:
    """Add a value to the logit of each listed token; a token is listed once."""
    bias = {token_id: value for token_id, value in logit_bias if token_id < len(logits_V)}
    ids_K = _ids(bias, logits_V)
    logits_V[ids_K] += torch.tensor(list(bias.values()), dtype=logits_V.dtype, device=ids_K.device)


def penalize_repetition(logits_V: Tensor, penalty: float, token_ids: Iterable[int]) -> None:
    """Divide positive and multiply negative logits of the listed tokens by penalty, once each."""
    ids_K = _ids(set(token_ids), logits_V)
    values_K = logits_V[ids_K].double()
    penalized_K = torch.where(values_K > 0, values_K / penalty, values_K * penalty)
    logits_V[ids_K] = penalized_K.clamp_(max=_MAX_LOGIT).to(logits_V.dtype)


def penalize_occurrence(
    logits_V: Tensor, presence: float, frequency: float, completion_token_ids: Sequence[int]
) -> None:
    """Subtract presence + frequency * count from the logit of each token of the completion."""
    counts = Counter(completion_token_ids)
    penalty_of_id = {
        token_id: presence + frequency * count
        for token_id, count in counts.items()
        if token_id < len(logits_V)
    }
    ids_K = _ids(penalty_of_id, logits_V)
    penalties_K = torch.tensor(
        list(penalty_of_id.values()), dtype=logits_V.dtype, device=ids_K.device
    )
    logits_V[ids_K] -= penalties_K


def forbid(logits_V: Tensor, token_ids: Iterable[int]) -> None:
    """Set the logits of the listed tokens to -inf."""
    logits_V[_ids(token_ids, logits_V)] = -math.inf


def apply_mask(logits_V: Tensor, mask_W: Tensor) -> None:
    """Set the logit of every token whose bit is 0 to -inf.

    Args:
        logits_V: the row.
        mask_W: int32 [ceil(V / 32)]; token i is bit i % 32 of word i // 32.
    """
    bits_32 = torch.arange(32, dtype=torch.int32, device=logits_V.device)
    words_W1 = mask_W.to(logits_V.device)[:, None]
    allowed_V = (words_W1 >> bits_32 & 1).flatten()[: len(logits_V)]
    logits_V.masked_fill_(allowed_V == 0, -math.inf)


def _ids(token_ids: Iterable[int], logits_V: Tensor) -> Tensor:
    known = [token_id for token_id in token_ids if 0 <= token_id < len(logits_V)]
    return torch.tensor(known, dtype=torch.int64, device=logits_V.device)
