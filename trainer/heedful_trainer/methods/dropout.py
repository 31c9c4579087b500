"""Residual dropout for supervised training (Ouyang et al. 2022, C.1), put on from outside.

Owns where it sits: on what attention and MLP add to the residual stream, in the adapted layers, as
GPT-3 has it; the loaded models have none. It draws from the global generator, which checkpoints
keep. It is off while gradients are: validation sees the whole model. One thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful_trainer.backbone import Backbone

# What a decoder layer calls its attention and its MLP; OPT has no module around its two layers.
_BRANCHES = ("self_attn", "attn", "attention", "mlp", "fc2")


@contextmanager
def residual_dropout(backbone: Backbone, share: float, seed: int) -> Iterator[None]:
    """Drop this share of each branch's output while training, within this context."""
    if not share:
        yield
        return

    def drop(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        if isinstance(output, Tensor):
            return F.dropout(output, share)
        return (F.dropout(output[0], share), *output[1:])

    handles = [
        branch.register_forward_hook(drop)
        for block in backbone.trained_blocks
        for name, branch in block.named_children()
        if name in _BRANCHES
    ]
    torch.manual_seed(seed)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
