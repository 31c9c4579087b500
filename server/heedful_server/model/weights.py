"""The weights of a model directory, one at a time, under canonical names.

Owns `NamedWeight` and the choice of file format; the two loaders read the files. Weights keep the
form in which the file holds them (float tensors, or packed blocks), so that a caller may repack
blocks without loss. Knows nothing of how weights are used. Runs while loading.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from heedful_server.model.blocks import BlockKind, dequantize_blocks
from heedful_server.model.bnb_rows import BnbKind, expand
from heedful_server.model.errors import BadCheckpoint, UnsupportedModel
from heedful_server.model.spec import DecoderSpec

WeightKind = BlockKind | Literal["dense"] | BnbKind


@dataclass(frozen=True, slots=True)
class NamedWeight:
    """One weight: [out, in] for matrices, [size] for norms and biases (always dense).

    `data` is a float tensor of `shape` when dense, else the file's blocks, uint8 [out, bytes per
    row], or bitsandbytes' rows, which have `scales` (see bnb_rows.py). Query and key rows are in
    half-split order for rope, whatever the file's order is.
    """

    name: str
    kind: WeightKind
    data: Tensor
    shape: tuple[int, ...]
    scales: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The exact values: fp32 from blocks, the tensor itself when dense."""
        if self.kind == "dense":
            return self.data
        if self.kind == "nf4" or self.kind == "int8":
            assert self.scales is not None
            return expand(self.kind, self.data, self.scales)
        return dequantize_blocks(self.kind, self.data)


def iterate_weights(model_dir: Path, spec: DecoderSpec) -> Iterator[NamedWeight]:
    """Read every weight that the spec asks for; all weights of a layer come together.

    A tied head is not repeated: there is no "head" when the embedding serves as one. Tensors may be
    views of a mapped file; copy what must outlive the iteration.

    Raises:
        BadCheckpoint: a file or tensor is missing, unexpected, truncated or of another shape.
        UnsupportedModel: the weights are stored in a way that is not read.
    """
    # Imported here, so that a float checkpoint needs no gguf package and the other way round.
    if gguf_path := find_gguf(model_dir):
        from heedful_server.model.gguf_loader import iterate_gguf

        return iterate_gguf(gguf_path, spec)
    from heedful_server.model.safetensors_loader import iterate_safetensors

    return iterate_safetensors(model_dir, spec)


def find_gguf(model_dir: Path) -> Path | None:
    """The directory's one GGUF file, or None when it holds safetensors.

    Raises:
        BadCheckpoint: there are no weights, or several GGUF files.
        UnsupportedModel: there are only pickled weights.
    """
    if not model_dir.is_dir():
        raise BadCheckpoint(f"{model_dir}: no such directory")
    if any(model_dir.glob("*.safetensors")) or any(model_dir.glob("*.safetensors.index.json")):
        return None
    paths = sorted(model_dir.glob("*.gguf"))
    if len(paths) == 1:
        return paths[0]
    if paths:
        found = ", ".join(path.name for path in paths)
        raise BadCheckpoint(f"{model_dir}: several GGUF files ({found}); keep one")
    if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt")):
        raise UnsupportedModel(
            "weights", f"{model_dir} holds pickled weights only; use safetensors"
        )
    raise BadCheckpoint(f"{model_dir}: neither safetensors nor a GGUF file")
