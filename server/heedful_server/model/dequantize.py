"""Gives the weights that the engine computes with back in float form, under Hugging Face names.

Owns what "as served" means for each path and form: blocks are expanded exactly, float matrices go
through the quantization that loading would give them, parts that the native path fuses in a finer
form are rounded to it. One thing is left out: torch's packed kernels round scales to bf16 on top
(see `linear.py`), which the native ones do not. Knows nothing of files beyond reading them. Used by
tools and tests, in any process that has torch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from torch import Tensor

from heedful_server.model.blocks import BlockKind, dequantize_blocks
from heedful_server.model.families import read_spec
from heedful_server.model.load import NATIVE_FLOAT_KINDS, why_not_native
from heedful_server.model.names import merge, stored_tensors
from heedful_server.model.native_loader import TABLE_KIND, as_blocks, fused_kind
from heedful_server.model.spec import DecoderSpec
from heedful_server.model.weight_modes import mode_of, resolve_device, served_weights
from heedful_server.model.weights import NamedWeight, iterate_weights
from heedful_server.protocol import EngineConfig

# Weights that are computed as one linear.
_FUSED: Final = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def served_tensors(config: EngineConfig) -> Iterator[tuple[str, Tensor]]:
    """Every served weight as the family's causal model names and shapes it, in its exact values.

    Tensors are fp32, or of a wider or narrower float type where they are served in that.

    Raises:
        ModelUnusable: the engine could not serve this model in this form either.
    """
    spec = read_spec(Path(config.model_dir))
    native = why_not_native(config, spec) is None
    values = _native_values(config, spec) if native else _torch_values(config, spec)
    stored_of = {name: stored for stored in stored_tensors(spec) for name in stored.names}
    waiting: dict[str, Tensor] = {}
    for name, value in values:
        waiting[name] = value
        stored = stored_of[name]
        if all(part in waiting for part in stored.names):
            parts = [waiting.pop(part) for part in stored.names]
            yield stored.hf_name, merge(stored, parts, spec).clone()


def dequantized_state_dict(
    model_dir: Path, quantize: str = "auto", *, native: bool = False
) -> dict[str, Tensor]:
    """All of `served_tensors` on a CPU in fp32, by name."""
    config = EngineConfig(str(model_dir), quantize, device="cpu", native_kernels=native)
    return {name: tensor.float() for name, tensor in served_tensors(config)}


def _native_values(config: EngineConfig, spec: DecoderSpec) -> Iterator[tuple[str, Tensor]]:
    float_kind = NATIVE_FLOAT_KINDS[config.quantize]
    for layer in _by_layer(iterate_weights(Path(config.model_dir), spec)):
        for name, weight, parts in _with_fused_parts(layer):
            if parts:
                yield name, _through(fused_kind(parts, float_kind), weight)
            elif name in ("embed", "head"):
                yield name, _through(TABLE_KIND, weight)
            else:
                yield name, weight.data.float()


def _through(kind: BlockKind, weight: NamedWeight) -> Tensor:
    return dequantize_blocks(kind, as_blocks(kind, weight))


def _torch_values(config: EngineConfig, spec: DecoderSpec) -> Iterator[tuple[str, Tensor]]:
    model_dir = Path(config.model_dir)
    mode = mode_of(model_dir, config.quantize, resolve_device(config.device))
    for layer in _by_layer(served_weights(model_dir, spec, mode)):
        for name, weight, parts in _with_fused_parts(layer):
            value = weight.dequantize()
            is_mixed = len({part.kind for part in parts}) > 1
            # Norms keep the residual's precision; blocks are exact unless they are fused with
            # something else.
            is_rounded = is_mixed or (weight.kind == "dense" and "norm" not in name)
            yield name, value.to(mode.dtype) if is_rounded else value


def _by_layer(weights: Iterable[NamedWeight]) -> Iterator[Mapping[str, NamedWeight]]:
    """Group weights by layer, those outside of layers one by one."""
    layer: dict[str, NamedWeight] = {}
    for weight in weights:
        if layer and _layer(weight.name) != _layer(next(iter(layer))):
            yield layer
            layer = {}
        layer[weight.name] = weight
    yield layer


def _layer(name: str) -> str:
    return name.split(".")[1] if name.startswith("layers.") else name


def _with_fused_parts(
    layer: Mapping[str, NamedWeight],
) -> Iterator[tuple[str, NamedWeight, Sequence[NamedWeight]]]:
    """Each weight with all that its linear is made of; none for what is no layer's linear."""
    for name, weight in layer.items():
        prefix, _, last = name.rpartition(".")
        group = next((group for group in _FUSED if last in group), ())
        parts = [layer[f"{prefix}.{part}"] for part in group if f"{prefix}.{part}" in layer]
        yield name, weight, parts
