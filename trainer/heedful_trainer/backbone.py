"""A frozen causal model whose upper layers carry an adapter, split where training begins.

Owns loading the model, the trunk below the first adapted layer (computed once for each row and
kept for every epoch, for the reference and for the reward model alike) and the way through the
rest. It knows nothing of losses or datasets. A row's trunk is computed alone, so that its bits do
not depend on which rows came with it: a killed run recomputes them and goes on with the same. One
thread at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from heedful_trainer import lora
from heedful_trainer.attention import BLOCKS
from heedful_trainer.errors import ModelUnusable
from heedful_trainer.lora import Adapter, LoraShape
from heedful_trainer.packing import Packed, Row, pack
from heedful_trainer.token_logprob import token_kl, token_logprobs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class BackboneOptions:
    """How a model is prepared for training."""

    dtype: str = "bfloat16"  # of the frozen weights: float32, bfloat16 or float64
    rank: int = 16
    alpha: float = 32.0
    trained_share: float = 0.5  # of the layers, from the top
    trunk_bytes: int = 1 << 30  # most memory for kept trunks
    device: str = "cpu"  # where the model is; the adapter's own tensors stay on the CPU


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows and the hidden states that enter their first adapted layer."""

    packed: Packed
    trunk_1TH: Tensor | None  # None: training begins at the embedding


class Backbone:
    """A model ready for training.

    Attributes:
        adapter: the trainable part; reset it before use.
        head_VH: the language-model head, frozen.
        hidden_size: H.
        num_layers: decoder layers of the whole model.
        trained_blocks: those that carry the adapter.
    """

    def __init__(self, model: PreTrainedModel, options: BackboneOptions) -> None:
        model.eval()
        path, blocks = _decoder_blocks(model)
        self._model, self._blocks = model, blocks
        self.num_layers = len(blocks)
        trained = max(1, round(options.trained_share * self.num_layers))
        self._first = self.num_layers - trained
        shape = LoraShape(options.rank, options.alpha, self._first, self.num_layers)
        upper = [(f"{path}.{i}", blocks[i]) for i in range(self._first, self.num_layers)]
        self.adapter: Adapter = lora.attach(model, upper, shape)
        self.head_VH: Tensor = model.get_output_embeddings().weight
        self.hidden_size = int(self.head_VH.shape[1])
        self._lower = list(blocks[: self._first])
        self.trained_blocks: list[nn.Module] = list(blocks[self._first :])
        self._device = self.head_VH.device
        self._trunks: OrderedDict[Row, Tensor] = OrderedDict()
        self._trunk_bytes_left = options.trunk_bytes

    def batch(self, rows: Sequence[Row], *, keep: bool = True) -> Batch:
        """Lay rows out and bring their trunks, computing those that are not kept.

        Args:
            rows: of one batch.
            keep: whether they will come again, so that their trunks are worth the memory.
        """
        packed = pack(rows)
        if not self._first:
            return Batch(packed, None)
        return Batch(packed, torch.cat([self._trunk_of(row, keep) for row in rows])[None])

    def hidden(self, batch: Batch, *, with_adapter: bool = True) -> Tensor:
        """Return the final-normed hidden states of a batch, shape [T, H].

        With the adapter they have gradients to its parameters, unless gradients are off.
        """
        self.adapter.enable(with_adapter)
        with self._lower_skipped(), self._entering(batch.trunk_1TH):
            # With and without gradients alike: a ratio of a policy to itself is then 1.
            return self._forward(batch.packed, fused=False)[0]

    def answer_logprobs(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the log-probs of the answers' tokens, shape [N], on the CPU.

        Args:
            batch: what was computed.
            hidden: its hidden states, as `hidden` gave them.
        """
        source_N, target_N = (
            index.to(self._device) for index in (batch.packed.source_N, batch.packed.target_N)
        )
        return token_logprobs(hidden[source_N], self.head_VH, target_N).cpu()

    def answer_kl(self, batch: Batch, hidden: Tensor, other: Tensor) -> Tensor:
        """Return KL(p ‖ q) before each of the answers' tokens, in nats, shape [N], on the CPU.

        Args:
            batch: what was computed.
            hidden: hidden states that give p.
            other: hidden states that give q.
        """
        source_N = batch.packed.source_N.to(self._device)
        return token_kl(hidden[source_N], other[source_N], self.head_VH).cpu()

    def free_trunks(self) -> None:
        """Give the memory of the kept trunks back."""
        self._trunk_bytes_left += sum(_bytes_of(trunk) for trunk in self._trunks.values())
        self._trunks.clear()

    def _trunk_of(self, row: Row, keep: bool) -> Tensor:
        kept = self._trunks.get(row)
        if kept is not None:
            return kept
        trunk = self._compute_trunk(pack([row]))
        if keep and _bytes_of(trunk) <= self._trunk_bytes_left:
            self._trunks[row] = trunk
            self._trunk_bytes_left -= _bytes_of(trunk)
        return trunk

    def _compute_trunk(self, packed: Packed) -> Tensor:
        def leave(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        handle = self._blocks[self._first].register_forward_pre_hook(leave)
        try:
            with torch.no_grad():
                # Policy and reference share the trunk, so its own rounding cancels between them.
                self._forward(packed, fused=True)
        except _Reached as reached:
            return reached.hidden_1TH[0]
        finally:
            handle.remove()
        raise AssertionError("the first adapted layer was not reached")

    def _forward(self, packed: Packed, *, fused: bool) -> Tensor:
        outputs = self._model.base_model(
            input_ids=packed.input_ids_1T.to(self._device),
            position_ids=packed.position_ids_1T.to(self._device),
            blocks=packed.blocks.to(self._device),
            fused=fused,
            use_cache=False,
        )
        hidden_1TH: Tensor = outputs.last_hidden_state
        return hidden_1TH

    @contextmanager
    def _lower_skipped(self) -> Iterator[None]:
        for idx in range(self._first):
            self._blocks[idx] = _Skip()
        try:
            yield
        finally:
            for idx, block in enumerate(self._lower):
                self._blocks[idx] = block

    @contextmanager
    def _entering(self, trunk_1TH: Tensor | None) -> Iterator[None]:
        if trunk_1TH is None:
            yield
            return
        handle = self._blocks[self._first].register_forward_pre_hook(
            lambda _, args: (trunk_1TH, *args[1:])
        )
        try:
            yield
        finally:
            handle.remove()


class _Skip(nn.Module):
    """Stands in for a layer whose output is already known."""

    def forward(self, hidden_1TH: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_1TH


class _Reached(Exception):  # noqa: N818 - leaves the model at a layer; no error
    def __init__(self, hidden_1TH: Tensor) -> None:
        self.hidden_1TH = hidden_1TH
        super().__init__()


def load_backbone(directory: Path, options: BackboneOptions) -> Backbone:
    """Load a Hugging Face directory for training; code in it is never run.

    Raises:
        ModelUnusable: transformers cannot load it, its layers are not found, or there is no GPU.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ModelUnusable("base.device is cuda, and PyTorch finds no GPU")
    has_gguf = (directory / "model.gguf").is_file()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=DTYPES[options.dtype],
            attn_implementation=BLOCKS,
            trust_remote_code=False,
            local_files_only=True,
            gguf_file="model.gguf" if has_gguf else None,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelUnusable(f"{directory}: {error}") from error
    return Backbone(model.to(options.device), options)


def _decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    wanted = model.config.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    if len(found) != 1:
        raise ModelUnusable(f"{type(model).__name__}: found {len(found)} stacks of {wanted} layers")
    return found[0]


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
