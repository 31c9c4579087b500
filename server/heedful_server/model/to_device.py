"""Copies of small host tensors to a device, without waiting for it.

Owns the rule that nothing is copied from pageable memory, which would wait. Knows nothing of what
the tensors mean. Used by the engine child's main thread.
"""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the copy is queued, not waited for."""
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor where a copy to the device can be queued from: page-locked for a GPU."""
    if device.type != "cuda" or tensor.is_cuda or tensor.is_pinned() or tensor.numel() == 0:
        return tensor
    return tensor.pin_memory()
