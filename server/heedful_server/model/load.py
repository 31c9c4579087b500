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
from heedful_kernels.launch import count_fallback
from heedful_kernels.sample import MAX_VOCAB

from heedful_server.model.blocks import BlockKind
from heedful_server.model.cuda_decoder import CudaDecoder, why_not_cuda_kernels
from heedful_server.model.decoder import Decoder
from heedful_server.model.errors import UnsupportedModel
from heedful_server.model.families import read_prequantized, read_spec
from heedful_server.model.loader import load_decoder, load_weights
from heedful_server.model.native_decoder import NativeDecoder
from heedful_server.model.native_loader import is_native_spec, pack_weights
from heedful_server.model.spec import DecoderSpec
from heedful_server.model.weight_modes import mode_of, resolve_device
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
    if spec.vocab_size > MAX_VOCAB:
        raise UnsupportedModel(
            "vocab_size", f"{spec.vocab_size} tokens; at most {MAX_VOCAB} can be drawn from"
        )
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
    if config.deterministic:
        _refuse_unless_deterministic(config, model_dir, device, reason)
    decoder = load_decoder(model_dir, config.quantize, device, progress)
    decoder.fallbacks[reason] = 1
    return decoder


def _refuse_unless_deterministic(
    config: EngineConfig, model_dir: Path, device: str, reason: str
) -> None:
    """Refuse torch's operators where their bits depend on the batch."""
    if device != "cpu":
        raise UnsupportedModel(
            "engine.deterministic", f"the GPU's kernels cannot serve this model: {reason}"
        )
    if not mode_of(model_dir, config.quantize, resolve_device(device)).keep_blocks:
        raise UnsupportedModel(
            "engine.deterministic",
            f"torch's products round dense weights by the number of rows, and the native kernels "
            f"cannot serve this model ({reason}); use --quantize int8 or int4",
        )


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
    if find_gguf(model_dir) is None and (
        config.quantize == "auto" or read_prequantized(model_dir) is not None
    ):
        return "weights"
    if not is_native_spec(spec):
        return "architecture"
    return "library" if cpu.find_library() is None else None


def _load_cuda(
    config: EngineConfig, model_dir: Path, spec: DecoderSpec, progress: Progress
) -> CudaDecoder | str:
    """The decoder on the Triton kernels, or why there is none."""
    target = resolve_device("cuda")
    mode = mode_of(model_dir, config.quantize, target)
    reason = why_not_cuda_kernels(spec, target, mode.dtype)
    if reason is not None:
        return reason
    if mode.expanded:
        count_fallback("weights", "expanded")
    weights, form = load_weights(
        model_dir,
        spec,
        mode,
        target,
        progress,
        gpu_kernels=True,
        fixed_tiles=config.deterministic,
    )
    return CudaDecoder(
        spec,
        weights,
        dtype=mode.dtype,
        device=target,
        quantization=form,
        deterministic=config.deterministic,
    )


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
