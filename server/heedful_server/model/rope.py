"""Rotary positions: frequencies, tables, and the rotation of query and key heads in place.

Owns the formula. Checkpoints are in half-split order (entry i of a head turns with entry
i + rotary_dim / 2); the torch decoder reorders rows once while loading so that partners are
neighbours, which makes the rotation one complex product. Scores do not change when queries and keys
are reordered alike. Angles are always computed in fp32, as the models were trained. Pure functions;
they run in the engine child's main thread.
"""

import math

import torch
from torch import Tensor

from heedful_server.model.spec import Llama3RopeScaling, RopeSpec


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """Radians per position, fp32 [rotary_dim / 2], with the scaling of the spec applied."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.scaling is None:
        return frequencies
    if isinstance(rope.scaling, Llama3RopeScaling):
        return _stretch_long_wavelengths(frequencies, rope.scaling)
    return frequencies / rope.scaling.factor


def _stretch_long_wavelengths(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    turns = scaling.original_context_tokens * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept_share * frequencies + (1 - kept_share) * frequencies / scaling.factor


def rope_table(rope: RopeSpec, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first positions, each fp32 [num_positions, rotary_dim / 2]."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope)
    return angles.cos(), angles.sin()


def to_neighbours(rows: Tensor, head_dim: int, rotary_dim: int) -> Tensor:
    """Reorder rows [heads * head_dim, ...] from half-split order to partners side by side."""
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    first, second = heads[:, :rotary_dim].chunk(2, dim=1)
    pairs = torch.stack((first, second), dim=2).flatten(1, 2)
    return torch.cat((pairs, heads[:, rotary_dim:]), dim=1).reshape(rows.shape)


def rotations(frequencies: Tensor, positions_T: Tensor, dtype: torch.dtype) -> Tensor:
    """What `rotate_` multiplies by: unit complex numbers [T, 1, rotary_dim / 2] over `dtype`."""
    angles = positions_T[:, None].float() * frequencies
    return torch.complex(angles.cos().to(dtype), angles.sin().to(dtype))[:, None]


def rotate_(heads_THD: Tensor, rotations_T1P: Tensor) -> None:
    """Turn the leading pairs of every head in place, with one rounding to the heads' dtype."""
    rotary_dim = 2 * rotations_T1P.shape[-1]
    part = heads_THD[..., :rotary_dim]
    wide = part.to(rotations_T1P.real.dtype)
    pairs = torch.view_as_complex(wide.view(*wide.shape[:-1], rotary_dim // 2, 2))
    pairs.mul_(rotations_T1P)
    if wide is not part:
        part.copy_(wide)
