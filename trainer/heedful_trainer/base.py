"""The base model as the trainer holds it: the served weights, dequantized, as a directory.

Owns where that directory comes from: the program ``heedful-server model dequantize`` for what the
server serves, or one that the configuration names. A run notes what it found, so that it can go on
without a server. It knows nothing of training. One thread; blocks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import heedful
import torch
from heedful_store import Scope, Store

from heedful_trainer.config import TrainerConfig
from heedful_trainer.config_sources import Place
from heedful_trainer.dataset.snapshot import BaseIdentity
from heedful_trainer.errors import ModelUnusable, StageFailed

Connect = Callable[[], heedful.Client]

_NOTE = "base.json"
_LAST_LINES = 3


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a run trains on."""

    directory: Path  # loadable by transformers
    name: str  # for people
    identity: BaseIdentity
    dtype: str  # of the frozen weights; float32, bfloat16 or float64


def find_base(
    config: TrainerConfig, place: Place, store: Store, scope: Scope, run_dir: Path, connect: Connect
) -> Base:
    """Return the base of a run, the same one each time.

    Raises:
        ModelUnusable: it cannot be had; says why.
        StageFailed: the server does not answer.
    """
    note = run_dir / _NOTE
    if note.is_file():
        return _from_note(json.loads(note.read_text()))
    settings = config.base
    fast = "bfloat16" if settings.device == "cuda" else fast_float()
    dtype = fast if settings.dtype == "auto" else settings.dtype
    if settings.directory:
        identity = BaseIdentity(settings.base_id, settings.template_hash)
        directory = Path(settings.directory).expanduser()
        base = Base(
            directory,
            directory.name,
            identity if identity.base_id else _logged(store, scope),
            dtype,
        )
    else:
        base = _served(config, place, connect, dtype)
    if not (base.directory / "config.json").is_file():
        raise ModelUnusable(f"{base.directory}: holds no model")
    run_dir.mkdir(parents=True, exist_ok=True)
    temp = note.with_suffix(".tmp")
    temp.write_text(json.dumps({**asdict(base), "directory": str(base.directory)}, sort_keys=True))
    temp.rename(note)
    return base


def fast_float() -> str:
    """Return the type that this processor trains in: without its instructions bf16 is emulated."""
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if has_bf16 else "float32"


def dequantize_command(model: str, quantize: str, out: Path, dtype: str, home: Path) -> list[str]:
    """Return the command line that writes the served weights of a model."""
    beside = Path(sys.executable).with_name("heedful-server")
    program = str(beside) if beside.is_file() else shutil.which("heedful-server")
    if program is None:
        raise ModelUnusable("the program heedful-server is not installed (heedful[serve])")
    written = dtype if dtype in ("float32", "bfloat16") else "float32"
    command = [program, "model", "dequantize", "--model", model, "--quantize", quantize]
    return [*command, "--out", str(out), "--dtype", written, "--home", str(home)]


def _served(config: TrainerConfig, place: Place, connect: Connect, dtype: str) -> Base:
    try:
        with connect() as client:
            base = client.list_models().base
    except heedful.HeedfulError as error:
        raise StageFailed(
            f"the server at {config.target} does not say its model: {error}"
        ) from error
    if base is None or not base.path:
        raise ModelUnusable(
            f"the server at {config.target} does not show its model's directory: the key needs the "
            "scope train; or set trainer.base.directory"
        )
    name = f"{base.base_id}|{base.template_hash}|{base.quantization}|{dtype}"
    out = place.home / "bases" / hashlib.sha256(name.encode()).hexdigest()[:16]
    command = dequantize_command(base.path, base.quantize, out, dtype, place.home)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = " ".join(done.stderr.strip().splitlines()[-_LAST_LINES:])
        raise ModelUnusable(f"{base.name} cannot be dequantized: {why}")
    return Base(out, base.name, BaseIdentity(base.base_id, base.template_hash), dtype)


def _logged(store: Store, scope: Scope) -> BaseIdentity:
    """Return the identity that the newest judged answers of the project carry."""
    newest = BaseIdentity("", "")
    for judged in store.judged_feedback(scope, "personal"):
        for answer in judged.answers:
            newest = BaseIdentity(answer.base_id, answer.template_hash)
    if not newest.base_id:
        raise ModelUnusable("the log holds no judged answer, and trainer.base.base_id is not set")
    return newest


def _from_note(note: dict[str, object]) -> Base:
    identity = note["identity"]
    assert isinstance(identity, dict)
    # Notes that name no type are of runs that could have been of bfloat16 alone by default.
    dtype = str(note.get("dtype", "bfloat16"))
    return Base(Path(str(note["directory"])), str(note["name"]), BaseIdentity(**identity), dtype)
