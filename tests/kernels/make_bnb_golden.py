"""Writes data/bnb_golden.safetensors with a real bitsandbytes; run by hand when its format changes.

pip install --no-deps --target /some/folder bitsandbytes
PYTHONPATH=/some/folder python tests/kernels/make_bnb_golden.py
"""

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

# Sizes: whole blocks; a tail that fills no block; an odd number of values; more than 256 blocks.
SIZES = {"whole": (48, 128, 64), "tail": (7, 150, 64), "odd": (3, 33, 32), "many": (130, 64, 32)}


def main() -> None:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, columns, blocksize) in SIZES.items():
        weight = torch.randn(rows, columns).bfloat16()
        tensors[f"{name}.original"] = weight
        for nested in (False, True):
            packed, state = functional.quantize_4bit(
                weight, blocksize=blocksize, quant_type="nf4", compress_statistics=nested
            )
            prefix = f"{name}.nested" if nested else f"{name}.plain"
            tensors[f"{prefix}.weight"] = packed
            for key, value in state.as_dict(packed=True).items():
                tensors[f"{prefix}.weight.{key}"] = value
            tensors[f"{prefix}.dequantized"] = functional.dequantize_4bit(packed, state)
        data, scale, _ = functional.int8_vectorwise_quant(weight.half())
        tensors[f"{name}.CB"], tensors[f"{name}.SCB"] = data, scale
    path = Path(__file__).parent / "data" / "bnb_golden.safetensors"
    path.parent.mkdir(exist_ok=True)
    version = {"bitsandbytes": bitsandbytes.__version__}
    save_file({key: value.clone() for key, value in tensors.items()}, path, metadata=version)


if __name__ == "__main__":
    main()
