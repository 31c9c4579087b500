"""Decode steps of an 8B model: NF4 beside bitsandbytes' kernels and bf16 in the same decoder, what
adapters add, and what deterministic mode costs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from heedful_server.model.cuda_adapters import AdapterSlots
from heedful_server.model.cuda_decoder import CudaDecoder

from gpu_rows.common import Row, copy_bandwidth, time_is_up
from gpu_rows.llama import Form, make_cache, make_decoder, step_batch, step_bytes, step_seconds

BATCHES = (1, 8, 32, 64)
RANK, SLOTS = 16, 8


def rows() -> Iterator[Row]:
    """Tokens a second at several batch sizes."""
    measured: dict[Form, dict[int, float | str]] = {}
    floors: dict[int, float] = {}
    for form in ("nf4", "bitsandbytes", "bf16"):
        measured[form] = _all_batches(form, floors)
        torch.cuda.empty_cache()
    for batch in BATCHES:
        figure = measured["nf4"][batch]
        target = "≥ 60 % of the limit" if batch == 1 else "faster than both to 32, never below bf16"
        yield Row(
            "NF4 decode, 8B",
            f"batch {batch}, under CUDA graphs, drawing included",
            "tokens/s",
            figure=figure if isinstance(figure, float) else None,
            floor=floors.get(batch),
            peers={
                "bitsandbytes, same decoder": measured["bitsandbytes"][batch],
                "bf16, same decoder": measured["bf16"][batch],
            },
            target=target,
            rises=True,
            withheld="" if isinstance(figure, float) else str(figure),
            note=f"share of the limit: {figure / floors[batch]:.2f}"
            if isinstance(figure, float)
            else "",
        )


def _all_batches(form: Form, floors: dict[int, float]) -> dict[int, float | str]:
    """Tokens a second by batch, or why there are none; notes the limits of NF4."""
    free = torch.cuda.mem_get_info()[0]
    if free < (24e9 if form == "bf16" else 10e9):
        return dict.fromkeys(BATCHES, f"not measured: {free / 1e9:.0f} GB are free")
    try:
        decoder = make_decoder(form)
    except ImportError as error:
        return dict.fromkeys(BATCHES, f"absent ({error.name})")
    found: dict[int, float | str] = {}
    for batch in BATCHES:
        if time_is_up():
            found[batch] = "not measured: the time was up"
            continue
        try:
            cache = make_cache(decoder, batch)
            found[batch] = batch / step_seconds(decoder, step_batch(batch), cache)
        except RuntimeError as error:
            found[batch] = f"failed ({str(error)[:80]})"
        if form == "nf4":
            floors[batch] = batch * copy_bandwidth() / step_bytes(decoder, batch)
    return found


def adapter_rows() -> Iterator[Row]:
    """What eight different adapters of rank 16 on all linears add to a step of eight rows."""
    for form, target in (("bf16", "≤ 15 % over the step"), ("nf4", "≤ 30 % over the step")):
        if time_is_up() or torch.cuda.mem_get_info()[0] < 26e9:
            return
        decoder = make_decoder(form)
        decoder.reserve_adapters(SLOTS, RANK)
        _fill(decoder)
        cache = make_cache(decoder, SLOTS)
        plain = step_seconds(decoder, step_batch(SLOTS), cache)
        adapted = step_seconds(decoder, step_batch(SLOTS, adapters=True), cache)
        yield Row(
            f"lora, {form}",
            f"batch {SLOTS}, {SLOTS} adapters of rank {RANK}, all linears",
            "ms a step",
            figure=adapted * 1e3,
            floor=plain * 1e3,
            target=target,
            note=f"{(adapted / plain - 1) * 100:.1f} % over the step without adapters",
        )
        del decoder, cache
        torch.cuda.empty_cache()


def _fill(decoder: CudaDecoder) -> None:
    slots = decoder._adapters
    assert isinstance(slots, AdapterSlots)
    for layer in slots.layers:
        for room in (layer.qkv, layer.attn_out, layer.mlp_in, layer.mlp_out):
            room.a.normal_(std=0.01)
            room.b.normal_(std=0.01)


def deterministic_rows() -> Iterator[Row]:
    """The step with fixed tiles and splits, beside the step without."""
    for batch in (1, 32):
        make = functools.partial(make_decoder, "nf4")
        seconds = {}
        for deterministic in (False, True):
            if time_is_up():
                return
            decoder = make(deterministic=deterministic)
            cache = make_cache(decoder, batch)
            seconds[deterministic] = step_seconds(decoder, step_batch(batch), cache)
            del decoder, cache
            torch.cuda.empty_cache()
        yield Row(
            "deterministic mode, NF4 decode",
            f"batch {batch}",
            "ms a step",
            figure=seconds[True] * 1e3,
            floor=seconds[False] * 1e3,
            note=f"{(seconds[True] / seconds[False] - 1) * 100:.1f} % over the step without",
        )
