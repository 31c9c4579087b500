"""Root-mean-square norm of rows, alone or after adding to the residual stream.

    r = residual + x      (add_rmsnorm: written back to residual, rounded to its dtype)
    y = r / sqrt(mean(r^2) + eps) * w

with x [T, H], residual [T, H], w [H]. A weight [heads, D] with x [T, heads, D] normalises each head
by itself. Everything is fp32 inside; y is rounded once, to out_dtype. What is normalised is the sum
before it is rounded to the residual's dtype, so an fp32 residual loses nothing.

One program per row; a row's result does not depend on the others. No gradients: inference only.
Pure functions but for the residual, any thread.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from heedful_kernels.launch import (
    COMPILE,
    FLOATS,
    jit,
    next_power_of_2,
    refuse_unless,
    runs_triton,
    tl,
)

_NAME: Final = "rmsnorm"
# A row is held in registers; beyond this they spill.
_MAX_ROW: Final = 32768


def rmsnorm(
    x_TH: Tensor, weight_H: Tensor, eps: float, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The normalised rows, [T, H] (or [T, heads, D]) in out_dtype (default: that of x).

    Args:
        x_TH: bf16, fp16 or fp32 (fp64 by the reference); any strides.
        weight_H: a float dtype of its own, [H], or [heads, D].
        eps: added to the mean square; 0 or more.
        out_dtype: of the result.

    Raises:
        RefusedInputError: shapes do not go together.
    """
    _check(x_TH, weight_H)
    out: Tensor = _rmsnorm_op(x_TH, weight_H, eps, out_dtype or x_TH.dtype)
    return out


def add_rmsnorm_(
    x_TH: Tensor,
    residual_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Add x to the residual in place and return the normalised sum; otherwise as rmsnorm.

    The residual has x's shape, its own float dtype and unit stride along rows.
    """
    _check(x_TH, weight_H)
    refuse_unless(
        residual_TH.shape == x_TH.shape and x_TH.dim() == 2,
        _NAME,
        f"residual {tuple(residual_TH.shape)} and x {tuple(x_TH.shape)} must be alike, [T, H]",
    )
    refuse_unless(residual_TH.stride(-1) == 1, _NAME, "residual rows must be contiguous")
    out: Tensor = _add_rmsnorm_op(x_TH, residual_TH, weight_H, eps, out_dtype or x_TH.dtype)
    return out


def rmsnorm_reference(x_TH: Tensor, weight_H: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """The formula in torch operators, in fp32 or the wider dtype of x."""
    wide = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse * weight_H.to(wide.dtype)).to(out_dtype)


def add_rmsnorm_reference_(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """The formula with the addition, in torch operators; writes the residual."""
    wide = torch.promote_types(torch.promote_types(x_TH.dtype, residual_TH.dtype), torch.float32)
    sum_TH = residual_TH.to(wide) + x_TH.to(wide)
    residual_TH.copy_(sum_TH)
    return rmsnorm_reference(sum_TH, weight_H, eps, out_dtype)


def _check(x_TH: Tensor, weight_H: Tensor) -> None:
    refuse_unless(
        x_TH.is_floating_point() and x_TH.dim() == 1 + weight_H.dim() and weight_H.dim() in (1, 2),
        _NAME,
        f"x {tuple(x_TH.shape)} and weight {tuple(weight_H.shape)} must be [T, H] and [H], or "
        "[T, heads, D] and [heads, D]",
    )
    refuse_unless(
        x_TH.shape[1:] == weight_H.shape and weight_H.numel() > 0,
        _NAME,
        f"x {tuple(x_TH.shape)} does not fit weight {tuple(weight_H.shape)}",
    )
    refuse_unless(x_TH.device == weight_H.device, _NAME, "tensors on two devices")


def _unsupported(x_TH: Tensor, out_dtype: torch.dtype) -> str:
    if x_TH.dtype not in FLOATS or out_dtype not in FLOATS:
        return "dtype"
    return "row_too_long" if x_TH.shape[-1] > _MAX_ROW else ""


@jit
def _kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, out,
    x_stride, x_head_stride, x_step, residual_stride, out_stride, eps,
    D, HEADS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, head = row // HEADS, row % HEADS
    d = tl.arange(0, BLOCK)
    ok = d < D
    r = tl.load(x + t * x_stride + head * x_head_stride + d * x_step, mask=ok, other=0.0)
    r = r.to(tl.float32)
    if ADD:
        place = residual + t * residual_stride + d
        r += tl.load(place, mask=ok, other=0.0).to(tl.float32)
        tl.store(place, r, mask=ok)
    inverse = tl.rsqrt(tl.sum(r * r, 0) / D + eps)
    w = tl.load(weight + head * D + d, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + t * out_stride + head * D + d, r * inverse * w, mask=ok)


def _launch(
    x_TH: Tensor, residual_TH: Tensor | None, weight_H: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    out_TH = torch.empty(x_TH.shape, dtype=out_dtype, device=x_TH.device)
    heads = x_TH.shape[1] if x_TH.dim() == 3 else 1
    if out_TH.numel() == 0:
        return out_TH
    block = next_power_of_2(x_TH.shape[-1])
    _kernel[(x_TH.shape[0] * heads,)](
        x_TH, x_TH if residual_TH is None else residual_TH, weight_H.contiguous(), out_TH,
        x_TH.stride(0), x_TH.stride(1) if heads > 1 else 0, x_TH.stride(-1),
        0 if residual_TH is None else residual_TH.stride(0), out_TH.stride(0), eps,
        x_TH.shape[-1], HEADS=heads, ADD=residual_TH is not None, BLOCK=block,
        num_warps=max(1, min(8, block // 512)), **COMPILE,
    )  # fmt: skip
    return out_TH


@torch.library.custom_op("heedful::rmsnorm", mutates_args=())
def _rmsnorm_op(x_TH: Tensor, weight_H: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    if runs_triton(_NAME, x_TH, _unsupported(x_TH, out_dtype)):
        return _launch(x_TH, None, weight_H, eps, out_dtype)
    return rmsnorm_reference(x_TH, weight_H, eps, out_dtype)


@_rmsnorm_op.register_fake
def _(x_TH: Tensor, weight_H: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return torch.empty(x_TH.shape, dtype=out_dtype, device=x_TH.device)


@torch.library.custom_op("heedful::add_rmsnorm_", mutates_args=("residual_TH",))
def _add_rmsnorm_op(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    unsupported = _unsupported(x_TH, out_dtype) or _unsupported(residual_TH, out_dtype)
    if runs_triton(_NAME, x_TH, unsupported):
        return _launch(x_TH, residual_TH, weight_H, eps, out_dtype)
    return add_rmsnorm_reference_(x_TH, residual_TH, weight_H, eps, out_dtype)


@_add_rmsnorm_op.register_fake
def _(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    return torch.empty(x_TH.shape, dtype=out_dtype, device=x_TH.device)
