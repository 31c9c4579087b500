"""The public data sets that an evaluation may use: files, source and licence of each.

Owns the manifest, where files are looked for, and how a missing one is fetched: from an address
that is pinned to a commit, and kept only if its SHA-256 is the one below. None ships with the
package. Reads and writes the data folder; any thread.
"""

from __future__ import annotations

import gzip
import hashlib
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from heedful_trainer.errors import HeedfulTrainerError
from heedful_trainer.runs.context import write_whole

MAX_BYTES = 64 << 20
"""Of one file, unpacked."""
_TIMEOUT_S = 60.0
_GITHUB = "https://raw.githubusercontent.com"
_LLMBAR = f"{_GITHUB}/princeton-nlp/LLMBar/900616bff90b6c6c8e1681f7d079250637c55992/Dataset/LLMBar"


class DataUnusable(HeedfulTrainerError):  # noqa: N818 - the name says the condition
    """A file of a data set cannot be read, fetched or understood; the message names it."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file: its name in the data folder (`.gz` may follow) and what was published."""

    name: str
    sha256: str  # of the unpacked content
    url: str = ""  # empty: it can be given by path only


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set with where it is from."""

    name: str
    source: str
    licence: str
    files: tuple[DataFile, ...]
    alternatives: bool = False  # the files are editions of each other: the first found is used


@dataclass(frozen=True, slots=True)
class Loaded:
    """A file's text and what is said about it in the report."""

    path: Path
    text: str
    sha256: str
    published: bool  # it is the file of the manifest


TRUTHFULQA = DataSet(
    "TruthfulQA",
    "https://github.com/sylinrl/TruthfulQA",
    "Apache-2.0",
    (
        DataFile(
            "truthfulqa.csv", "b8d8ef1e12f98b4f2a9f47abc9765da0640b182b6c5d9b92f0c1a1f2f1e02e5c"
        ),
        DataFile(
            "truthfulqa_v1_817.csv",
            "f9bd9e859cc102cb1f647f1064da7e009be752c416845cf9fa56e6eaae403a7d",
        ),
    ),
    alternatives=True,
)
XSTEST = DataSet(
    "XSTest",
    "https://github.com/paul-rottger/exaggerated-safety",
    "CC-BY-4.0",
    (
        DataFile(
            "xstest_prompts.csv",
            "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
            f"{_GITHUB}/paul-rottger/exaggerated-safety/"
            "d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d/xstest_prompts.csv",
        ),
    ),
)
TOXIC_PROMPTS = DataSet(
    "RealToxicityPrompts, challenging subset",
    "https://github.com/tomekkorbak/pretraining-with-human-feedback",
    "MIT",
    (
        DataFile(
            "rtp_challenging.jsonl",
            "354ec7143374dd68bf652c5665e404280dac6344a4bac682c35319c4e0f02eb3",
            f"{_GITHUB}/tomekkorbak/pretraining-with-human-feedback/"
            "152e6b656790d182d0d13a912ece6560c7a287ae/resources/challenging_rtp.jsonl",
        ),
    ),
)
GSM8K = DataSet(
    "GSM8K, test",
    "https://github.com/openai/grade-school-math",
    "MIT",
    (
        DataFile(
            "gsm8k_test.jsonl",
            "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
            f"{_GITHUB}/openai/grade-school-math/"
            "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
        ),
    ),
)
LLMBAR = DataSet(
    "LLMBar",
    "https://github.com/princeton-nlp/LLMBar",
    "MIT",
    (
        DataFile(
            "llmbar_natural.json",
            "f7127b7aa78104cb8e03a2b1b3ac0077e95b125714dd441a8ee63666145a3375",
            f"{_LLMBAR}/Natural/dataset.json",
        ),
        DataFile(
            "llmbar_adversarial_neighbor.json",
            "6712c7eda6342602e0bc7c06c282fa95e2110d4e741a284026a62d937f9780a0",
            f"{_LLMBAR}/Adversarial/Neighbor/dataset.json",
        ),
        DataFile(
            "llmbar_adversarial_gptinst.json",
            "1002425f73c2cf54b6e6de99bce3f6c60fa2a17d13194772e37d7481c1351d42",
            f"{_LLMBAR}/Adversarial/GPTInst/dataset.json",
        ),
        DataFile(
            "llmbar_adversarial_gptout.json",
            "1ff56e520d7607750a9866a3be0f5b850392ca4477a1f69d80f32bd3e310f561",
            f"{_LLMBAR}/Adversarial/GPTOut/dataset.json",
        ),
        DataFile(
            "llmbar_adversarial_manual.json",
            "0d9598769a39cdbbd265778c37e49939d41d5f76dcfb17bd75dcfa07516d3837",
            f"{_LLMBAR}/Adversarial/Manual/dataset.json",
        ),
    ),
)
SHAKESPEARE = DataSet(
    "tiny Shakespeare",
    "https://github.com/karpathy/char-rnn",
    "public domain",
    (
        DataFile(
            "tinyshakespeare.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            f"{_GITHUB}/karpathy/char-rnn/"
            "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        ),
    ),
)
DATA_SETS = (TRUTHFULQA, XSTEST, TOXIC_PROMPTS, GSM8K, LLMBAR, SHAKESPEARE)


def load(data_set: DataSet, folder: Path) -> list[Loaded]:
    """Return the files of a data set that are in the folder, in the order of the manifest.

    Raises:
        DataUnusable: a file is there and cannot be read.
    """
    found = []
    for file in data_set.files:
        path = find(file, folder)
        if path is not None:
            content = _content(path)
            digest = hashlib.sha256(content).hexdigest()
            found.append(Loaded(path, _decoded(path, content), digest, digest == file.sha256))
            if data_set.alternatives:
                break
    return found


def find(file: DataFile, folder: Path) -> Path | None:
    """Return where a file lies in the folder, packed or not; None where it does not."""
    paths = (folder / file.name, folder / f"{file.name}.gz")
    return next((path for path in paths if path.is_file()), None)


def advice(data_set: DataSet) -> str:
    """Return what to give so that a data set can be used."""
    names = (" or " if data_set.alternatives else ", ").join(file.name for file in data_set.files)
    fetched = " or use --fetch" if any(file.url for file in data_set.files) else ""
    return f"put {names} into --data DIR{fetched} (from {data_set.source})"


def fetch(data_sets: Sequence[DataSet], folder: Path, say: Callable[[str], None]) -> None:
    """Fetch the files that are missing and have an address.

    Raises:
        DataUnusable: an address cannot be reached, or gives something else than was published.
    """
    for data_set in data_sets:
        for file in data_set.files:
            if file.url and find(file, folder) is None:
                say(f"fetching {file.name} ({data_set.name}, {data_set.licence}) from {file.url}")
                write_whole(folder / file.name, download(file))


def download(file: DataFile) -> bytes:
    """Return a file's content from its address.

    Raises:
        DataUnusable: it cannot be had, or is not what was published.
    """
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT_S) as answer:
            content: bytes = answer.read(MAX_BYTES + 1)
    except (OSError, urllib.error.URLError) as error:
        raise DataUnusable(f"{file.name} cannot be fetched from {file.url}: {error}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise DataUnusable(
            f"{file.url} gives something else than {file.name}: SHA-256 {digest}, "
            f"expected {file.sha256}; nothing was kept"
        )
    return content


def _content(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataUnusable(f"{path}: cannot be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise DataUnusable(f"{path}: is larger than {MAX_BYTES >> 20} MiB")
    return content


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataUnusable(f"{path}: is not UTF-8: {error}") from None
