"""Low-rank updates on torch operators: many adapters in one batch, grouped by adapter.

Owns the form in which the torch decoder keeps an adapter (segments of its fused linears, in the row
order of its weights) and the products. Updates are computed in the residual's dtype, as PEFT does.
Knows nothing of files or slots. Adapters are made in the thread that loads them and never change
afterwards; the products run in the engine child's main thread.

In the exact way every row is a batch entry of its own, for the reason given in `attention.py`: the
BLAS would pick its kernel, and with it the rounding, by the number of rows.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful_server.model.adapter import AdapterWeights, LowRank
from heedful_server.model.batch import ForwardBatch
from heedful_server.model.rope import to_neighbours
from heedful_server.model.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Segment:
    """Outputs start to end of a linear get (x A^T) B^T, with the scale in B."""

    start: int
    end: int
    a_KR: Tensor
    b_RN: Tensor


Update = tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class LayerUpdates:
    """One layer's updates, a linear without any having no segments."""

    qkv: Update
    attn_out: Update
    mlp_in: Update
    mlp_out: Update


@dataclass(frozen=True, slots=True)
class TorchAdapter:
    """An adapter as the torch decoder computes with it."""

    layers: tuple[LayerUpdates, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of a step that share an adapter; None means all of them."""

    rows_G: Tensor | None
    adapter: TorchAdapter


def make_adapter(
    weights: AdapterWeights, spec: DecoderSpec, dtype: torch.dtype, device: torch.device
) -> TorchAdapter:
    """Lay an adapter out for the decoder's fused linears, in the dtype of its residual stream."""
    qkv = {"q": spec.q_size, "k": spec.kv_size, "v": spec.kv_size}
    mlp_in = {"gate": spec.ffn_size} if spec.gated_mlp else {}

    def segment(name: str, part: LowRank, start: int) -> Segment:
        b_NR = part.b_NR
        if spec.rope is not None and name in ("q", "k"):
            b_NR = to_neighbours(b_NR, spec.head_dim, spec.rope.rotary_dim)
        # Scaled in the wide dtype, so that nothing is lost by it.
        b_RN = (b_NR.to(device, dtype) * weights.scale).t().contiguous()
        a_KR = part.a_RK.to(device, dtype).t().contiguous()
        return Segment(start, start + b_NR.shape[0], a_KR, b_RN)

    def update(layer: Mapping[str, LowRank], widths: Mapping[str, int]) -> Update:
        starts = itertools.accumulate(widths.values(), initial=0)
        parts = zip(widths, starts, strict=False)
        return tuple(segment(name, layer[name], at) for name, at in parts if name in layer)

    layers = tuple(
        LayerUpdates(
            qkv=update(layer, qkv),
            attn_out=update(layer, {"o": spec.hidden_size}),
            mlp_in=update(layer, mlp_in | {"up": spec.ffn_size}),
            mlp_out=update(layer, {"down": spec.hidden_size}),
        )
        for layer in weights.layers
    )
    return TorchAdapter(layers, sum(map(_num_bytes, layers)))


def _num_bytes(layer: LayerUpdates) -> int:
    segments = (*layer.qkv, *layer.attn_out, *layer.mlp_in, *layer.mlp_out)
    return sum(segment.a_KR.nbytes + segment.b_RN.nbytes for segment in segments)


def group_rows(
    batch: ForwardBatch, adapters: Sequence[TorchAdapter | None]
) -> tuple[AdapterRows, ...]:
    """Which rows of a batch have which adapter; done once per step."""
    if batch.adapter_slots is None:
        return ()
    rows_of_slot: dict[int, list[int]] = {}
    for slot, start, end in zip(
        batch.adapter_slots, batch.query_starts, batch.query_starts[1:], strict=False
    ):
        if slot >= 0:
            rows_of_slot.setdefault(slot, []).extend(range(start, end))
    groups = []
    for slot, rows in sorted(rows_of_slot.items()):
        adapter = adapters[slot]
        assert adapter is not None, f"a sequence has the empty adapter slot {slot}"
        is_all = len(rows) == batch.query_starts[-1]
        index = None if is_all else torch.tensor(rows, device=batch.token_ids_T.device)
        groups.append(AdapterRows(index, adapter))
    return tuple(groups)


def add_update(
    y_TN: Tensor, x_TK: Tensor, update: Update, rows_G: Tensor | None, *, exact: bool
) -> None:
    """Add one adapter's update of a linear to the outputs of its rows, in place."""
    if not update:
        return
    x = x_TK if rows_G is None else x_TK.index_select(0, rows_G)
    x = x.to(update[0].a_KR.dtype)
    for segment in update:
        delta_GN = _product(_product(x, segment.a_KR, exact), segment.b_RN, exact)
        y = y_TN[:, segment.start : segment.end]
        if rows_G is None:
            y.add_(delta_GN)
        else:
            y[rows_G] = (y[rows_G] + delta_GN).to(y.dtype)


def _product(x_GK: Tensor, weight_KN: Tensor, exact: bool) -> Tensor:
    if not exact:
        return x_GK @ weight_KN
    rows = x_GK.shape[0]
    return torch.bmm(x_GK[:, None], weight_KN.expand(rows, -1, -1))[:, 0]
