"""The directory of an adapter: sealed by its writer, verified by every reader, renamed into place.

Owns the manifest, the content hash over it and what makes a directory damaged or foreign. It reads
safetensors headers as JSON and looks at no weight: whether those are finite is the loader's matter.
No torch, no database; any process, any thread.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful_store.errors import AdapterDamaged, AlreadyExists, ForeignAdapter
from heedful_store.failpoints import Failpoints

MANIFEST = "MANIFEST.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEADS = "reward_heads.safetensors"
INFO = "heedful.json"
FORMAT = 1

_JSON_LIMIT_BYTES = 1 << 20
_HEADER_LIMIT_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
_DTYPE_BYTES |= {"U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What ``heedful.json`` says."""

    role: str  # policy or reward
    base_id: str  # base model and tokenizer it belongs to
    template_hash: str  # chat template
    base_model: str  # its name, for people
    hidden_size: int
    num_layers: int
    run_id: str  # the run that made it
    method: str  # how it was trained


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """A directory that was found whole."""

    content_hash: str  # SHA-256 of the manifest's bytes
    info: AdapterInfo
    config: Mapping[str, Any]  # PEFT's LoraConfig
    files: Mapping[str, Mapping[str, object]]  # {"sha256", "bytes"} by name
    num_bytes: int  # of all files but the manifest


def seal(directory: Path) -> str:
    """Flush the files, write the manifest last, and return the content hash.

    Raises AdapterDamaged where what is there is no adapter.
    """
    (directory / MANIFEST).unlink(missing_ok=True)
    files = {}
    for name in _names(directory):
        path = directory / name
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    _check_contents(directory, files)
    text = _canonical({"files": files})
    with (directory / MANIFEST).open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _fsync_directory(directory)
    return hashlib.sha256(text).hexdigest()


def verify(
    directory: Path,
    expected_hash: str | None = None,
    *,
    base_id: str | None = None,
    template_hash: str | None = None,
) -> AdapterManifest:
    """Read every byte and return what the directory holds.

    Raises AdapterDamaged with the file that is wrong, ForeignAdapter where it belongs to another
    base or template than the one asked for.
    """
    text = _read_small(directory, MANIFEST)
    content_hash = hashlib.sha256(text).hexdigest()
    if expected_hash is not None and content_hash != expected_hash:
        raise AdapterDamaged(directory, MANIFEST, f"its SHA-256 is not {expected_hash}")
    files = _manifest_files(directory, text)
    found = set(_names(directory)) - {MANIFEST}
    for name in sorted(set(files) | found):
        if name not in found:
            raise AdapterDamaged(directory, name, "is missing")
        if name not in files:
            raise AdapterDamaged(directory, name, "is not in the manifest")
        _check_file(directory, name, files[name])
    info, config = _check_contents(directory, files)
    _check_origin(directory, info, base_id, template_hash)
    num_bytes = sum(int(entry["bytes"]) for entry in files.values())
    return AdapterManifest(content_hash, info, config, files, num_bytes)


def publish(temp_dir: Path, final_dir: Path, failpoints: Failpoints | None = None) -> None:
    """Make a sealed directory visible under its name, whole or not at all.

    Both must lie on one file system. A directory with the same content that is there already is
    left alone; raises AlreadyExists for one with other content.
    """
    traps = failpoints or Failpoints.from_environment()
    final_dir.parent.mkdir(parents=True, exist_ok=True)
    if final_dir.exists():
        if _manifest_bytes(final_dir) != _manifest_bytes(temp_dir):
            raise AlreadyExists(f"{final_dir} holds something else")
        shutil.rmtree(temp_dir)
        return
    traps.hit("before_publish_rename")
    os.rename(temp_dir, final_dir)
    traps.hit("after_publish_rename")
    _fsync_directory(final_dir.parent)


def _names(directory: Path) -> list[str]:
    """Return the names in a directory; raise AdapterDamaged for anything but plain files."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise AdapterDamaged(directory, ".", f"cannot be read: {error.strerror}") from error
    for entry in entries:
        if not entry.is_file(follow_symlinks=False):
            raise AdapterDamaged(directory, entry.name, "is not a plain file")
    return [entry.name for entry in entries]


def _manifest_files(directory: Path, text: bytes) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(text)
        files = dict(content["files"])
        whole = _canonical(content) == text and all(
            set(entry) == {"sha256", "bytes"} and isinstance(entry["bytes"], int)
            for entry in files.values()
        )
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise AdapterDamaged(directory, MANIFEST, "is not a manifest")
    return files


def _check_file(directory: Path, name: str, entry: Mapping[str, Any]) -> None:
    path = directory / name
    if (size := path.stat().st_size) != entry["bytes"]:
        raise AdapterDamaged(directory, name, f"has {size} bytes, the manifest {entry['bytes']}")
    if _sha256(path) != entry["sha256"]:
        raise AdapterDamaged(directory, name, "its SHA-256 is not the manifest's")


def _check_contents(
    directory: Path, files: Mapping[str, object]
) -> tuple[AdapterInfo, dict[str, Any]]:
    """Return what the two JSON files say, once every file that the role needs is in order."""
    for name in (INFO, CONFIG, WEIGHTS):
        if name not in files:
            raise AdapterDamaged(directory, name, "is missing")
    info = _read_info(directory)
    if (info.role == "reward") != (HEADS in files):
        reason = "is missing" if info.role == "reward" else f"does not belong to a {info.role}"
        raise AdapterDamaged(directory, HEADS, reason)
    config = _read_json(directory, CONFIG)
    for name in sorted(files):
        if name.endswith(".safetensors"):
            _check_safetensors(directory, name)
    return info, config


def _read_info(directory: Path) -> AdapterInfo:
    content = _read_json(directory, INFO)
    if content.pop("format", None) != FORMAT:
        raise AdapterDamaged(directory, INFO, f"is not of format {FORMAT}")
    types = {"hidden_size": int, "num_layers": int}
    values: dict[str, Any] = {}
    for name in AdapterInfo.__dataclass_fields__:
        value = content.get(name)
        if not isinstance(value, types.get(name, str)):
            raise AdapterDamaged(directory, INFO, f"{name} is missing or of another type")
        values[name] = value
    if values["role"] not in ("policy", "reward"):
        raise AdapterDamaged(directory, INFO, f"role is {values['role']!r}")
    return AdapterInfo(**values)


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(_read_small(directory, name))
    except ValueError as error:
        raise AdapterDamaged(directory, name, "is not JSON") from error
    if not isinstance(content, dict):
        raise AdapterDamaged(directory, name, "is not a JSON object")
    return content


def _read_small(directory: Path, name: str) -> bytes:
    try:
        with (directory / name).open("rb") as file:
            text = file.read(_JSON_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise AdapterDamaged(directory, name, "is missing") from None
    except OSError as error:
        raise AdapterDamaged(directory, name, f"cannot be read: {error.strerror}") from error
    if len(text) > _JSON_LIMIT_BYTES:
        raise AdapterDamaged(directory, name, "is too large")
    return text


def _check_safetensors(directory: Path, name: str) -> None:
    """Hold the header against the file: every tensor where it says, no byte left over."""
    size = (directory / name).stat().st_size
    with (directory / name).open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= header_bytes <= min(size - 8, _HEADER_LIMIT_BYTES):
            raise AdapterDamaged(directory, name, "has no safetensors header")
        text = file.read(header_bytes)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = sorted(_span(entry) for entry in header.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterDamaged(directory, name, f"has a bad safetensors header: {error}") from error
    ends = [0, *(end for _, end in spans)]
    if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != size - 8 - header_bytes:
        raise AdapterDamaged(directory, name, "has tensors that do not fill it")


def _span(entry: Mapping[str, Any]) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
        raise ValueError("offsets and shapes must be whole numbers")
    if end - begin != math.prod(shape) * _DTYPE_BYTES[entry["dtype"]]:
        raise ValueError("a tensor's bytes do not fit its shape")
    return begin, end


def _check_origin(
    directory: Path, info: AdapterInfo, base_id: str | None, template_hash: str | None
) -> None:
    if base_id is not None and info.base_id != base_id:
        raise ForeignAdapter(f"{directory} is for {info.base_id}, not for {base_id}")
    if template_hash is not None and info.template_hash != template_hash:
        raise ForeignAdapter(f"{directory} is for another chat template of {info.base_id}")


def _manifest_bytes(directory: Path) -> bytes:
    return _read_small(directory, MANIFEST)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _fsync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
