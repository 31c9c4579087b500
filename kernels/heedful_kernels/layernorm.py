"""Layer norm of rows, alone or after adding to the residual stream.

    r = residual + x      (add_layernorm_: written back to residual, rounded to its dtype)
    y = (r - mean(r)) / sqrt(var(r) + eps) * w + b

with x, residual [T, H], w and b [H]; var is the mean square of r - mean(r), taken in a second pass
over registers, not as a difference of moments. Everything is fp32 inside; y is rounded once, to
out_dtype. One program per row; a row's result does not depend on the others. No gradients:
inference only. Pure functions but for the residual, any thread.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
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

_NAME: Final = "layernorm"
# A row is held in registers; beyond this they spill.
_MAX_ROW: Final = 32768


def layernorm(
    x_TH: Tensor,
    weight_H: Tensor,
    bias_H: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The normalised rows, [T, H] in out_dtype (default: that of x).

    Args:
        x_TH: bf16, fp16 or fp32 (fp64 by the reference); any strides.
        weight_H: a float dtype of its own, [H].
        bias_H: the same.
        eps: added to the variance; 0 or more.
        out_dtype: of the result.

    Raises:
        RefusedInputError: shapes do not go together.
    """
    _check(x_TH, weight_H, bias_H)
    out: Tensor = _layernorm_op(x_TH, weight_H, bias_H, eps, out_dtype or x_TH.dtype)
    return out


def add_layernorm_(
    x_TH: Tensor,
    residual_TH: Tensor,
    weight_H: Tensor,
    bias_H: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Add x to the residual in place and return the normalised sum; otherwise as layernorm.

    The residual has x's shape, its own float dtype and unit stride along rows.
    """
    _check(x_TH, weight_H, bias_H)
    refuse_unless(
        residual_TH.shape == x_TH.shape,
        _NAME,
        f"residual {tuple(residual_TH.shape)} and x {tuple(x_TH.shape)} must be alike",
    )
    refuse_unless(residual_TH.stride(-1) == 1, _NAME, "residual rows must be contiguous")
    out: Tensor = _add_layernorm_op(
        x_TH, residual_TH, weight_H, bias_H, eps, out_dtype or x_TH.dtype
    )
    return out


def layernorm_reference(
    x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """The formula by torch's own operator, in fp32 or the wider dtype of x."""
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    y_TH = F.layer_norm(x_TH.to(wide), weight_H.shape, weight_H.to(wide), bias_H.to(wide), eps)
    return y_TH.to(out_dtype)


def add_layernorm_reference_(
    x_TH: Tensor,
    residual_TH: Tensor,
    weight_H: Tensor,
    bias_H: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """The formula with the addition, in torch operators; writes the residual."""
    wide = torch.promote_types(torch.promote_types(x_TH.dtype, residual_TH.dtype), torch.float32)
    sum_TH = residual_TH.to(wide) + x_TH.to(wide)
    residual_TH.copy_(sum_TH)
    return layernorm_reference(sum_TH, weight_H, bias_H, eps, out_dtype)


def _check(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor) -> None:
    refuse_unless(
        x_TH.is_floating_point()
        and x_TH.dim() == 2
        and x_TH.shape[1:] == weight_H.shape == bias_H.shape
        and weight_H.numel() > 0,
        _NAME,
        f"x {tuple(x_TH.shape)}, weight {tuple(weight_H.shape)} and bias {tuple(bias_H.shape)} "
        "must be [T, H], [H] and [H]",
    )
    refuse_unless(x_TH.device == weight_H.device == bias_H.device, _NAME, "tensors on two devices")


def _unsupported(x_TH: Tensor, out_dtype: torch.dtype) -> str:
    if x_TH.dtype not in FLOATS or out_dtype not in FLOATS:
        return "dtype"
    return "row_too_long" if x_TH.shape[-1] > _MAX_ROW else ""


@jit
def _kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, out,
    x_stride, x_step, residual_stride, out_stride, eps,
    H, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    ok = h < H
    r = tl.load(x + t * x_stride + h * x_step, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        place = residual + t * residual_stride + h
        r += tl.load(place, mask=ok, other=0.0).to(tl.float32)
        tl.store(place, r, mask=ok)
    centred = tl.where(ok, r - tl.sum(r, 0) / H, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / H + eps)
    w = tl.load(weight + h, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(bias + h, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + t * out_stride + h, centred * inverse * w + b, mask=ok)


def _launch(
    x_TH: Tensor,
    residual_TH: Tensor | None,
    weight_H: Tensor,
    bias_H: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    out_TH = torch.empty(x_TH.shape, dtype=out_dtype, device=x_TH.device)
    if out_TH.numel() == 0:
        return out_TH
    block = next_power_of_2(x_TH.shape[1])
    _kernel[(x_TH.shape[0],)](
        x_TH, x_TH if residual_TH is None else residual_TH,
        weight_H.contiguous(), bias_H.contiguous(), out_TH,
        x_TH.stride(0), x_TH.stride(1),
        0 if residual_TH is None else residual_TH.stride(0), out_TH.stride(0), eps,
        x_TH.shape[1], ADD=residual_TH is not None, BLOCK=block,
        num_warps=max(1, min(8, block // 512)), **COMPILE,
    )  # fmt: skip
    return out_TH


@torch.library.custom_op("heedful::layernorm", mutates_args=())
def _layernorm_op(
    x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    if runs_triton(_NAME, x_TH, _unsupported(x_TH, out_dtype)):
        return _launch(x_TH, None, weight_H, bias_H, eps, out_dtype)
    return layernorm_reference(x_TH, weight_H, bias_H, eps, out_dtype)


@_layernorm_op.register_fake
def _(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return torch.empty(x_TH.shape, dtype=out_dtype, device=x_TH.device)


@torch.library.custom_op("heedful::add_layernorm_", mutates_args=("residual_TH",))
def _add_layernorm_op(
    x_TH: Tensor,
    residual_TH: Tensor,
    weight_H: Tensor,
    bias_H: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    unsupported = _unsupported(x_TH, out_dtype) or _unsupported(residual_TH, out_dtype)
    if runs_triton(_NAME, x_TH, unsupported):
        return _launch(x_TH, residual_TH, weight_H, bias_H, eps, out_dtype)
    return add_layernorm_reference_(x_TH, residual_TH, weight_H, bias_H, eps, out_dtype)


@_add_layernorm_op.register_fake
def _(
    x_TH: Tensor,
    residual_TH: Tensor,
    weight_H: Tensor,
    bias_H: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty(x_TH.shape, dtype=out_dtype, device=x_TH.device)
