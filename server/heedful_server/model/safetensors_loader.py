"""Reads single and sharded safetensors checkpoints, tensor by tensor.

Owns finding the files and checking every name and shape before the first tensor is read; what
bitsandbytes has packed is checked when it is read. Runs while loading.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from heedful_server.model.bnb_loader import bnb_kind, side_names, split_packed
from heedful_server.model.errors import BadCheckpoint
from heedful_server.model.names import (
    StoredTensor,
    base_prefix,
    is_ignorable,
    split,
    stored_tensors,
)
from heedful_server.model.spec import DecoderSpec
from heedful_server.model.weights import NamedWeight

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def iterate_safetensors(model_dir: Path, spec: DecoderSpec) -> Iterator[NamedWeight]:
    """Yield the weights of `model.safetensors`, or of the shards that its index names.

    Raises:
        BadCheckpoint: a file or tensor is missing, unexpected, truncated or of another shape.
    """
    with ExitStack() as stack:
        handles = {path: _open(path, stack) for path in _shard_paths(model_dir)}
        found = {name: path for path, handle in handles.items() for name in handle.keys()}  # noqa: SIM118
        wanted = _match(model_dir, spec, found)
        kinds = {name: bnb_kind(name, found) for _, name in wanted}
        for stored, name in wanted:
            if kinds[name] is None:
                _check_shape(stored, name, found[name], handles[found[name]])
        for stored, name in wanted:
            kind = kinds[name]
            if kind is not None:
                tensors = {
                    key: _read(handles[found[key]], found[key], key)
                    for key in (name, *side_names(name, found))
                }
                yield from split_packed(stored, name, kind, tensors, spec)
                continue
            tensor = _read(handles[found[name]], found[name], name)
            for canonical, part in split(stored, tensor, spec):
                yield NamedWeight(canonical, "dense", part, tuple(part.shape))


def _shard_paths(model_dir: Path) -> list[Path]:
    index_path = model_dir / _INDEX
    if (model_dir / _SINGLE).is_file():
        return [model_dir / _SINGLE]
    if not index_path.is_file():
        paths = sorted(model_dir.glob("*.safetensors"))
        if len(paths) == 1:
            return paths
        raise BadCheckpoint(f"{model_dir}: {len(paths)} safetensors files and no {_INDEX}")
    try:
        names = set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{index_path}: no weight_map ({error})") from error
    for name in names:
        # A shard is a file beside its index, never a path to somewhere else.
        if not isinstance(name, str) or Path(name).name != name:
            raise BadCheckpoint(f"{index_path}: {name!r} is no file name")
    return [model_dir / name for name in sorted(names)]


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path}: {error}") from error


def _match(
    model_dir: Path, spec: DecoderSpec, found: dict[str, Path]
) -> list[tuple[StoredTensor, str]]:
    """Pair what the spec asks for with the names in the files; both sides must be used up."""
    prefix = base_prefix(spec)
    wanted = []
    for stored in stored_tensors(spec):
        bare = stored.hf_name.removeprefix(prefix)
        name = stored.hf_name if stored.hf_name in found else bare
        if name not in found:
            raise BadCheckpoint(f"{model_dir}: tensor {stored.hf_name} is missing")
        wanted.append((stored, name))
    known = {name for _, name in wanted}
    unexpected = found.keys() - known - {side for name in known for side in side_names(name, found)}
    for name in sorted(unexpected):
        if not is_ignorable(name, spec):
            raise BadCheckpoint(f"{found[name]}: unexpected tensor {name}")
    return wanted


def _check_shape(stored: StoredTensor, name: str, path: Path, handle: Any) -> None:
    view = handle.get_slice(name)
    shape = tuple(view.get_shape())
    if shape != stored.shape:
        raise BadCheckpoint(f"{path}: tensor {name} has shape {shape}, expected {stored.shape}")
    if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise BadCheckpoint(f"{path}: tensor {name} holds {view.get_dtype()}, not floats")


def _read(handle: Any, path: Path, name: str) -> Any:
    try:
        return handle.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path}: tensor {name}: {error}") from error
