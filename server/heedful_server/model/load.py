"""Picks the decoder that serves a model fastest here: native CPU kernels, Triton's, or torch.

Owns that choice and says when the fast path was not taken and why. Runs once, in the engine child's
main thread, after the thread count is set, and in tools that need to know what would be served.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
import torch
from heedful_kernels import cpu

from heedful_server.model.blocks import BlockKind
from heedful_server.model.cuda_decoder import CudaDecoder, why_not_cuda_kernels
from heedful_server.model.decoder import Decoder
from heedful_server.model.families import read_spec
from heedful_server.model.loader import (
    load_decoder,
    load_weights,
    resolve_device,
    resolve_mode,
)
from heedful_server.model.native_decoder import NativeDecoder
from heedful_server.model.native_loader import is_native_spec, pack_weights
from heedful_server.model.spec import DecoderSpec
from heedful_server.model.weights import find_gguf
from heedful_server.protocol import EngineConfig

log = structlog.get_logger(__name__)

Progress = Callable[[str, float], None]

# What float linears become on the native path, by `quantize`.
NATIVE_FLOAT_KINDS: Final[dict[str, BlockKind]] = {"auto": "q4_1", "int4": "q4_1", "int8": "q8_0"}


def load_best_decoder(config: EngineConfig, progress: Progress) -> Decoder:
    """Load the model for the configured device and form of weights.

    Raises:
        ModelUnusable: the model is unknown, damaged, or cannot be served in that form.
    """
    model_dir = Path(config.model_dir)
    spec = read_spec(model_dir)
    device = _device(config.device)
    reason = why_not_native(config, spec)
    if reason is None:
        return _load_native(config, model_dir, spec, progress)
    if device == "cpu":
        log.info("native CPU kernels are not used", reason=reason)
    if device == "cuda":
        decoder_or_reason = _load_cuda(config, model_dir, spec, progress)
        if not isinstance(decoder_or_reason, str):
            return decoder_or_reason
        reason = decoder_or_reason
        log.warning("the GPU's kernels are not used", reason=reason)
    decoder = load_decoder(model_dir, config.quantize, device, progress)
    decoder.fallbacks[reason] = 1
    return decoder


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def why_not_native(config: EngineConfig, spec: DecoderSpec) -> str | None:
    """Why a model is not served by the native CPU kernels; None when it is."""
    model_dir, device = Path(config.model_dir), _device(config.device)
    if device != "cpu":
        return "device"
    if not config.native_kernels:
        return "disabled"
    if config.quantize not in NATIVE_FLOAT_KINDS:
        return "weights"
    if config.quantize == "auto" and find_gguf(model_dir) is None:
        return "weights"
    if not is_native_spec(spec):
        return "architecture"
    return "library" if cpu.find_library() is None else None


def _load_cuda(
    config: EngineConfig, model_dir: Path, spec: DecoderSpec, progress: Progress
) -> CudaDecoder | str:
    """The decoder on the Triton kernels, or why there is none."""
    target = resolve_device("cuda")
    is_gguf = find_gguf(model_dir) is not None
    mode = resolve_mode(config.quantize, is_gguf=is_gguf, device=target)
    reason = why_not_cuda_kernels(spec, target, mode.dtype)
    if reason is not None:
        return reason
    weights, form = load_weights(model_dir, spec, mode, target, progress, pack_nf4=True)
    return CudaDecoder(spec, weights, dtype=mode.dtype, device=target, quantization=form)


def _load_native(
    config: EngineConfig, model_dir: Path, spec: DecoderSpec, progress: Progress
) -> NativeDecoder:
    library = cpu.load()
    assert library is not None, "find_library() found one"
    float_kind = NATIVE_FLOAT_KINDS[config.quantize]
    weights = pack_weights(model_dir, spec, float_kind, progress)
    return NativeDecoder(
        spec,
        weights,
        library,
        quantization=weights.kind,
        num_threads=config.num_threads or len(os.sched_getaffinity(0)),
        max_rows=config.max_batch_tokens,
    )
