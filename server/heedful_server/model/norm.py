"""RMS and layer normalisation of rows.

Owns the two formulas, computed in the dtype of the input (the residual stream's) and rounded once
to the dtype that the next linear layer wants. Immutable after loading; runs in the engine child's
main thread.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """Over the last dimension: RMS norm without a bias, layer norm with one.

    An RMS weight [heads, D] normalises each head by itself.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float

    @property
    def num_bytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The normalised input, rounded to `dtype`."""
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps).to(dtype)
        # Half the operators of the textbook form, and at one row each costs as much as its work.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().mul_(1 / x.shape[-1]).add_(self.eps).rsqrt_()
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        return torch.mul(x * inverse, self.weight, out=out)
