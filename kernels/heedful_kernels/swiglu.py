"""Gated activations: both halves of one linear layer's output in, their product out.

    y = act(gate) * up      with x = [gate | up]  [T, 2F],  y [T, F]
    silu(g) = g / (1 + exp(-g))
    gelu(g) = g/2 (1 + erf(g / sqrt 2))
    gelu_tanh(g) = g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))

Everything is fp32 inside; y is rounded once, to the dtype of x. No gradients: inference only.
Pure functions, any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from heedful_kernels.launch import (
    COMPILE,
    FLOATS,
    INTERPRETED,
    cdiv,
    jit,
    refuse_unless,
    runs_triton,
    tl,
)

GateActivation = Literal["silu", "gelu", "gelu_tanh"]

_NAME: Final = "swiglu"


def _gelu_tanh(gate: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh")


_ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
}


def swiglu(x_TG: Tensor) -> Tensor:
    """silu(gate) * up of [gate | up], [T, F]; see gated."""
    return gated(x_TG, "silu")


def geglu(x_TG: Tensor, *, tanh: bool = False) -> Tensor:
    """gelu(gate) * up of [gate | up], [T, F]; tanh takes its approximation. See gated."""
    return gated(x_TG, "gelu_tanh" if tanh else "gelu")


def gated(x_TG: Tensor, activation: GateActivation) -> Tensor:
    """activation(gate) * up, [T, F] in the dtype of x.

    Args:
        x_TG: gate and up side by side, [T, 2F], bf16, fp16 or fp32 (fp64 by the reference).
        activation: by its name.

    Raises:
        RefusedInputError: x is no such matrix, or the activation is unknown.
    """
    refuse_unless(
        x_TG.dim() == 2 and x_TG.shape[1] % 2 == 0 and x_TG.is_floating_point(),
        _NAME,
        f"x must be a float [T, 2F], not {x_TG.dtype} {tuple(x_TG.shape)}",
    )
    refuse_unless(activation in _ACTIVATIONS, _NAME, f"no activation {activation!r}")
    out: Tensor = _gated_op(x_TG, activation)
    return out


def gated_reference(x_TG: Tensor, activation: str) -> Tensor:
    """The formula in torch operators, in fp32 or the wider dtype of x."""
    gate_TF, up_TF = x_TG.to(torch.promote_types(x_TG.dtype, torch.float32)).chunk(2, dim=1)
    return (_ACTIVATIONS[activation](gate_TF) * up_TF).to(x_TG.dtype)


@jit
def _kernel(  # type: ignore[no-untyped-def]
    x, out, x_stride, x_step, F, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = f < F
    row = x + t * x_stride
    g = tl.load(row + f * x_step, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(row + (F + f) * x_step, mask=ok, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        g = g * tl.sigmoid(g)
    elif ACTIVATION == "gelu":
        g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        # (1 + tanh z) / 2 is the logistic function of 2 z.
        g = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    tl.store(out + t * F + f, g * up, mask=ok)


@torch.library.custom_op("heedful::gated", mutates_args=())
def _gated_op(x_TG: Tensor, activation: str) -> Tensor:
    if not runs_triton(_NAME, x_TG, "" if x_TG.dtype in FLOATS else "dtype"):
        return gated_reference(x_TG, activation)
    rows, size = x_TG.shape[0], x_TG.shape[1] // 2
    out_TF = torch.empty(rows, size, dtype=x_TG.dtype, device=x_TG.device)
    if out_TF.numel() > 0:
        block = 64 if INTERPRETED else 1024
        _kernel[(rows, cdiv(size, block))](
            x_TG,
            out_TF,
            x_TG.stride(0),
            x_TG.stride(1),
            size,
            ACTIVATION=activation,
            BLOCK=block,
            **COMPILE,
        )
    return out_TF


@_gated_op.register_fake
def _(x_TG: Tensor, activation: str) -> Tensor:
    return x_TG.new_empty(x_TG.shape[0], x_TG.shape[1] // 2)
