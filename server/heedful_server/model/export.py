"""Writes the served weights as a Hugging Face directory: `python -m heedful_server.model.export`.

Owns the files: float shards, the configuration that goes with them, the tokenizer's files as they
are, and a note of what they were made from, by which a finished directory is recognised and not
made again. The directory appears whole or not at all, and two processes that want the same one take
turns. Trainers start from it, so that they and the engine hold the same base. Runs in a process of
its own; keeps one shard in memory.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from heedful_server.errors import ModelUnusable
from heedful_server.model.config_values import read_json
from heedful_server.model.dequantize import served_tensors
from heedful_server.model.families import read_spec
from heedful_server.model.load import why_not_native
from heedful_server.protocol import EngineConfig

NOTE_FILE: Final = "dequantized.json"
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_FORMAT: Final = 1
_WEIGHTS: Final = (".safetensors", ".gguf", ".bin", ".pt", ".safetensors.index.json")
_SMALL_FILES: Final = (".json", ".jinja", ".model", ".txt")
_SHARD_BYTES: Final = 4 << 30
_MANIFEST: Final = "heedful.json"


def export(config: EngineConfig, out: Path, dtype: str, shard_bytes: int = _SHARD_BYTES) -> bool:
    """Write what an engine of this configuration would serve; return False when it is there.

    Raises:
        ModelUnusable: the engine could not serve it, the place holds something else, or it cannot
            be written to.
    """
    model_dir = Path(config.model_dir)
    note = _note(config, model_dir, dtype)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out.parent / f".{out.name}.lock"):
            if _is_made_from(out, note):
                return False
            with _staged(out) as staging:
                _write_weights(config, staging, DTYPES[dtype], shard_bytes)
                _write_config(model_dir, staging, dtype)
                _copy_small_files(model_dir, staging)
                _write_json(staging / NOTE_FILE, note)
    except OSError as error:
        raise ModelUnusable(f"{out}: cannot be written ({error})") from error
    return True


def _note(config: EngineConfig, model_dir: Path, dtype: str) -> dict[str, Any]:
    files = sorted(path for path in model_dir.iterdir() if path.is_file())
    return {
        "format": _FORMAT,
        "quantize": config.quantize,
        "path": "torch" if why_not_native(config, read_spec(model_dir)) else "native",
        "device": config.device,
        "dtype": dtype,
        "source": str(model_dir.resolve()),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }


def _is_made_from(out: Path, note: dict[str, Any]) -> bool:
    """Whether the directory is finished; ModelUnusable if it is not one that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / NOTE_FILE).is_file():
        raise ModelUnusable(f"{out}: holds something else; choose another place")
    return dict(read_json(out / NOTE_FILE)) == note


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock file stays: removing it would let two processes lock different files of one name.
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `out` when the body ends without an error."""
    for stale in out.parent.glob(f".{out.name}.*.partial"):
        shutil.rmtree(stale)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)
        for path in staging.iterdir():
            path.chmod(0o644)
            _sync(path)
        _sync(staging)
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_weights(
    config: EngineConfig, staging: Path, dtype: torch.dtype, shard_bytes: int
) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total_bytes = 0

    def flush() -> None:
        save_file(shard, staging / f"{len(shards)}.shard", {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in served_tensors(config):
        shard[name] = tensor.to("cpu", dtype).contiguous()
        total_bytes += shard[name].nbytes
        if sum(part.nbytes for part in shard.values()) >= shard_bytes:
            flush()
    if shard:
        flush()
    _name_shards(staging, shards, total_bytes)


def _name_shards(staging: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give shards the names by which they are looked for, which say how many there are."""
    if len(shards) == 1:
        (staging / "0.shard").rename(staging / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for idx, names in enumerate(shards):
        file_name = f"model-{idx + 1:05}-of-{len(shards):05}.safetensors"
        (staging / f"{idx}.shard").rename(staging / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(staging / "model.safetensors.index.json", index)


def _write_config(model_dir: Path, staging: Path, dtype: str) -> None:
    dropped = ("torch_dtype", "quantization_config")
    config = read_json(model_dir / "config.json")
    kept = {key: value for key, value in config.items() if key not in dropped}
    _write_json(staging / "config.json", kept | {"dtype": dtype})


def _copy_small_files(model_dir: Path, staging: Path) -> None:
    for path in model_dir.iterdir():
        name = path.name
        if name in ("config.json", NOTE_FILE, _MANIFEST) or name.endswith(_WEIGHTS):
            continue
        if path.is_file() and name.endswith(_SMALL_FILES):
            shutil.copyfile(path, staging / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Write a directory as the arguments say, and print its path."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--quantize", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--native-kernels", type=int, choices=(0, 1), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), required=True)
    given = parser.parse_args()
    config = EngineConfig(
        given.model_dir,
        given.quantize,
        device=given.device,
        native_kernels=bool(given.native_kernels),
    )
    try:
        export(config, given.out, given.dtype)
    except ModelUnusable as error:
        print(f"heedful-server: {error}", file=sys.stderr)
        sys.exit(1)
    print(given.out)


if __name__ == "__main__":
    main()
