"""Low-rank adapters on the linear layers of a frozen model, and their files in PEFT's format.

Owns the arithmetic of one adapted layer, which layers get one, and the names of their tensors; PEFT
writes and reads the configuration. It computes in the type of the frozen weights and keeps fp32
masters: PEFT would convert every activation to fp32 and back instead, which costs a third of the
speed on a CPU. It knows nothing of losses. One thread at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraShape:
    """How large an adapter is and where it sits."""

    rank: int
    alpha: float
    first_layer: int  # layers below stay as they are
    num_layers: int  # of the whole model


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update: ``y = x Wᵀ + b + (α/r) (x Aᵀ) Bᵀ``.

    Hu et al. 2021 (https://arxiv.org/abs/2106.09685). B starts at 0, so that an untrained adapter
    changes nothing. A and B are fp32 (fp64 on an fp64 base) on the
    CPU, where the optimiser is, whatever and wherever the base is.
    """

    def __init__(self, base_layer: nn.Linear | Conv1D, shape: LoraShape) -> None:
        super().__init__()
        self.base_layer = base_layer
        wide = torch.float64 if base_layer.weight.dtype == torch.float64 else torch.float32
        num_inputs, num_outputs = _size_of(base_layer)
        self.lora_A = nn.Parameter(torch.zeros(shape.rank, num_inputs, dtype=wide))
        self.lora_B = nn.Parameter(torch.zeros(num_outputs, shape.rank, dtype=wide))
        self.scale = shape.alpha / shape.rank
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output, in the type of the base."""
        y: Tensor = self.base_layer(x)
        if not self.enabled:
            return y
        shrunk = F.linear(x, self.lora_A.to(x))
        return y + F.linear(shrunk, (self.lora_B * self.scale).to(x))


class Adapter:
    """The adapted layers of one model, together."""

    def __init__(self, layers: Mapping[str, LoraLinear], shape: LoraShape) -> None:
        self._layers = dict(layers)
        self.shape = shape

    def reset(self, seed: int) -> None:
        """Start anew: A uniform as PEFT has it, B zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self._layers.values():
                bound = math.sqrt(1 / layer.lora_A.shape[1])
                layer.lora_A.uniform_(-bound, bound, generator=generator)
                layer.lora_B.zero_()

    def enable(self, enabled: bool) -> None:
        """Apply the adapter, or leave the base as it is."""
        for layer in self._layers.values():
            layer.enabled = enabled

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Have the layers use these tensors, by the names of the file, in place of their own.

        What was computed before keeps its gradients to the tensors that were bound then.
        """
        for name, layer in self._layers.items():
            layer.lora_A = parameters[f"{_PREFIX}{name}.lora_A.weight"]
            layer.lora_B = parameters[f"{_PREFIX}{name}.lora_B.weight"]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors by the names of the file."""
        named: dict[str, nn.Parameter] = {}
        for name, layer in self._layers.items():
            named[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
            named[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
        return named

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of a file.

        Raises:
            KeyError: a tensor is missing.
            ValueError: there are others, or one has another shape.
        """
        mine = self.parameters()
        if foreign := sorted(set(tensors) - set(mine)):
            raise ValueError(f"the adapter has no layer for {foreign[0]}")
        with torch.no_grad():
            for name, parameter in mine.items():
                if tensors[name].shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}")
                parameter.copy_(tensors[name])

    def save(self, directory: Path, base_model: str) -> None:
        """Write the weights and the configuration as PEFT does; the directory is not sealed."""
        tensors = {name: value.detach().float() for name, value in self.parameters().items()}
        save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        self._config(base_model).save_pretrained(str(directory))

    def _config(self, base_model: str) -> LoraConfig:
        shape = self.shape
        targets = sorted({name.rpartition(".")[2] for name in self._layers})
        is_whole = shape.first_layer == 0
        return LoraConfig(
            r=shape.rank,
            lora_alpha=shape.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=targets,
            layers_to_transform=None if is_whole else [*range(shape.first_layer, shape.num_layers)],
            fan_in_fan_out=any(isinstance(x.base_layer, Conv1D) for x in self._layers.values()),
            base_model_name_or_path=base_model,
            task_type="CAUSAL_LM",
            inference_mode=True,
        )


def attach(model: nn.Module, blocks: Iterable[tuple[str, nn.Module]], shape: LoraShape) -> Adapter:
    """Put an adapter on every linear layer of these decoder blocks and freeze all else.

    Args:
        model: frozen as a whole.
        blocks: (path within the model, block).
        shape: rank, alpha, place.
    """
    model.requires_grad_(False)
    layers: dict[str, LoraLinear] = {}
    for path, block in blocks:
        found = [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        for name, module in found:
            parent, _, leaf = name.rpartition(".")
            layers[f"{path}.{name}"] = adapted = LoraLinear(module, shape)
            setattr(block.get_submodule(parent), leaf, adapted)
    return Adapter(layers, shape)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter directory."""
    tensors: dict[str, Tensor] = load_file(directory / WEIGHTS_FILE)
    return tensors


def _size_of(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        num_inputs, num_outputs = layer.weight.shape
        return num_inputs, num_outputs
    return layer.in_features, layer.out_features
