"""A reward model: an adapter on the base and an ensemble of scalar heads on its hidden states.

Owns the heads, their files and how an answer gets its rewards: from the mean of the final-normed
hidden states of its own tokens, in fp32. What an answer mentions is in the states of the words that
mention it; a small base hardly carries it on to the last one. It knows no losses. One thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from heedful_store import adapter_files
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heedful_trainer.backbone import Backbone
from heedful_trainer.lora import read_weights
from heedful_trainer.packing import Packed, Row


class Heads(nn.Module):
    """E linear heads over hidden states of size H, zero at first.

    That each starts from a bootstrap of its own is what makes them an ensemble.
    """

    def __init__(self, num_heads: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_heads))
        self.temperature = 1.0  # divides differences of rewards; fitted after training

    def forward(self, hidden_AH: Tensor) -> Tensor:
        """Return the rewards of A answers, shape [A, E]."""
        return hidden_AH.float() @ self.weight.T + self.bias

    def save(self, directory: Path) -> None:
        """Write the file beside an adapter's."""
        tensors = {
            "weight": self.weight.detach().contiguous(),
            "bias": self.bias.detach().contiguous(),
            "temperature": torch.tensor([self.temperature]),
        }
        # Whoever reads them must know over what: heads of a last token would answer nonsense. One
        # entry alone, since safetensors writes several in any order, and a rerun must write the
        # same bytes.
        save_file(tensors, directory / adapter_files.HEADS, {"reads": "mean"})

    def load(self, directory: Path) -> None:
        """Take the values of a file."""
        tensors = load_file(directory / adapter_files.HEADS)
        with torch.no_grad():
            self.weight.copy_(tensors["weight"])
            self.bias.copy_(tensors["bias"])
        self.temperature = float(tensors["temperature"][0])


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A backbone whose adapter is the reward trunk, and the heads."""

    backbone: Backbone
    heads: Heads

    def rewards(self, rows: Sequence[Row]) -> Tensor:
        """Return the rewards of the rows' answers in order, shape [A, E]."""
        batch = self.backbone.batch(rows)
        result: Tensor = self.heads(pooled(self.backbone.hidden(batch), batch.packed))
        return result

    def score(self, rows: Sequence[Row]) -> Tensor:
        """Return the same without gradients, each row computed alone: always the same bits."""
        with torch.no_grad():
            found = [self.rewards([row]) for row in rows]
        return torch.cat(found) if found else torch.zeros(0, self.heads.weight.shape[0])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        heads = {"heads.weight": self.heads.weight, "heads.bias": self.heads.bias}
        return {**self.backbone.adapter.parameters(), **heads}

    def save(self, directory: Path, base_model: str) -> None:
        """Write adapter and heads; the directory is not sealed."""
        self.backbone.adapter.save(directory, base_model)
        self.heads.save(directory)


def pooled(hidden: Tensor, packed: Packed) -> Tensor:
    """Return the mean hidden state over each answer's tokens, [A, H], at least fp32, on the CPU.

    Args:
        hidden: of a batch, shape [T, H].
        packed: its layout.
    """
    own_NH = hidden[packed.own_N.to(hidden.device)]
    own_NH = own_NH if own_NH.dtype == torch.float64 else own_NH.float()
    sums_AH = own_NH.new_zeros(packed.num_answers, own_NH.shape[1])
    return (
        sums_AH.index_add(0, packed.owner_N.to(hidden.device), own_NH).cpu()
        / packed.length_A[:, None]
    )


def load_reward_model(backbone: Backbone, directory: Path) -> RewardModel:
    """Bring a saved reward model back into a backbone of the same shape."""
    weight = load_file(directory / adapter_files.HEADS)["weight"]
    heads = Heads(*weight.shape)
    heads.load(directory)
    backbone.adapter.load(read_weights(directory))
    return RewardModel(backbone, heads)
