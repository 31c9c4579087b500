"""Stage 1, integrity: the files, the weights, and the prompts that any policy must manage.

Owns what a candidate has to satisfy whatever anybody prefers; nothing here can be overridden.
Reads the adapter's directory; the server answers the prompts. Event loop, files in a worker thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import heedful
import torch
from heedful_store import adapter_files
from heedful_store.errors import AdapterDamaged, ForeignAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file

from heedful_trainer.gate import assets, text_measures
from heedful_trainer.gate.must_pass import MustPass, must_pass_check, read_must_pass
from heedful_trainer.gate.sampler import Answer, Draw, Sampler
from heedful_trainer.gate.settings import GateSettings
from heedful_trainer.gate.statistics import wilson
from heedful_trainer.gate.types import Check, GateInputs


def file_checks(inputs: GateInputs) -> list[Check]:
    """Return the checks of the adapter's files; where they are damaged, no later one makes sense.

    Blocks: it reads every byte.
    """
    directory = Path(inputs.candidate_dir)
    try:
        manifest = adapter_files.verify(
            directory,
            inputs.candidate_hash or None,
            base_id=inputs.base_id,
            template_hash=inputs.template_hash,
        )
    except AdapterDamaged as error:
        return [_fixed("files", False, str(error))]
    except ForeignAdapter as error:
        return [_fixed("files", True, "every hash agrees"), _fixed("origin", False, str(error))]
    detail = f"{len(manifest.files)} files, content hash {manifest.content_hash}"
    role = manifest.info.role
    return [
        _fixed("files", True, detail),
        _fixed("origin", role == "policy", f"a {role} on {manifest.info.base_id}"),
        _finite(directory / adapter_files.WEIGHTS),
    ]


async def answer_checks(
    inputs: GateInputs, settings: GateSettings, sampler: Sampler
) -> list[Check]:
    """Return the checks of golden and must-pass prompts, answered greedily by the candidate.

    Raises:
        MustPassError: the must-pass file cannot be used.
        HeedfulError: the server does not answer.
    """
    probes = settings.probes
    draw = Draw(0.0, probes.golden_max_tokens, settings.sampling.seed)
    prompts = [[heedful.Message("user", text)] for text in assets.golden_prompts()]
    ours, theirs = await asyncio.gather(
        sampler.answer(inputs.candidate_model, prompts, draw),
        sampler.answer(inputs.base_model, prompts, draw),
    )
    checks = golden_checks(ours, theirs, probes.min_golden_ended)
    if not inputs.must_pass_path:
        return [*checks, Check("must-pass", "skipped", detail="no prompts were given")]
    path = Path(inputs.must_pass_path)
    rules = await asyncio.to_thread(read_must_pass, path, probes.must_pass_max_tokens)
    answers = [
        (await sampler.answer(inputs.candidate_model, [rule.prompt], _draw(rule, draw)))[0]
        for rule in rules
    ]
    return [*checks, must_pass_check(rules, answers)]


def golden_checks(
    answers: Sequence[Answer], base: Sequence[Answer], min_ended: float
) -> list[Check]:
    """Return whether short questions are answered, and answers to them end.

    A base that cannot do so itself is not held against the candidate: the limits fall to its share.
    """
    n = len(answers)
    answered, ended = _answered(answers), wilson(sum(answer.ended for answer in answers), n)
    base_answered, base_ended = _answered(base), sum(answer.ended for answer in base) / len(base)
    return [
        Check(
            "golden prompts answered",
            "pass" if answered >= base_answered else "fail",
            value=answered,
            limit=base_answered,
            n=n,
            detail="share with a word or a number in it; the limit is what the base manages",
            overridable=False,
        ),
        Check(
            "golden prompts end",
            "pass" if ended.value >= min(min_ended, base_ended) else "fail",
            value=ended.value,
            limit=min(min_ended, base_ended),
            n=n,
            interval=(ended.low, ended.high),
            detail=f"share that ends by itself, greedily; the base's is {base_ended:.0%}",
            overridable=False,
        ),
    ]


def _answered(answers: Sequence[Answer]) -> float:
    return sum(not text_measures.is_degenerate(item.text) for item in answers) / len(answers)


def _finite(path: Path) -> Check:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        return _fixed("finite weights", False, f"{path.name} cannot be read: {error}")
    bad = sorted(name for name, value in tensors.items() if not bool(torch.isfinite(value).all()))
    return _fixed("finite weights", not bad, f"not finite: {bad[0]}" if bad else "all are finite")


def _fixed(name: str, passed: bool, detail: str) -> Check:
    return Check(name, "pass" if passed else "fail", detail=detail, overridable=False)


def _draw(rule: MustPass, draw: Draw) -> Draw:
    return Draw(draw.temperature, rule.max_tokens, draw.seed)
