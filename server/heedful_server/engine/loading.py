"""Builds a ready engine from its configuration.

Owns the choice of device, threads, decoder and KV cache size, and the warm-up: one real
generation, so that readiness means that tokens come out. Runs once, in the engine child's main
thread.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from heedful_server.engine.adapter_loader import AdapterLoader
from heedful_server.engine.constraint import GrammarCompiler
from heedful_server.engine.engine import Engine
from heedful_server.engine.runner import Runner
from heedful_server.engine.scheduler import Scheduler, SchedulerConfig
from heedful_server.errors import ModelUnusable
from heedful_server.model.bandwidth import measure_bandwidth
from heedful_server.model.load import load_best_decoder
from heedful_server.protocol import Delta, EngineConfig, EngineInfo, SamplingParams, Submit
from heedful_server.text.tokenizer import Tokenizer

Progress = Callable[[str, float], None]

_DEFAULT_MEMORY_SHARE = 0.3
_DEFAULT_DEVICE_SHARE = 0.7
_DEFAULT_KV_CACHE_MAX_BYTES = 4 << 30
_WARM_UP_ID = "warm-up"
# A row costs a CPU about a millisecond; a GPU's steps take the time of its memory up to about 64.
_BACKGROUND_TOKENS = {"cpu": 4, "cuda": 64}


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine that has generated once, and what goes with it."""

    engine: Engine
    compiler: GrammarCompiler
    adapter_loader: AdapterLoader
    info: EngineInfo


def load_engine(config: EngineConfig, progress: Progress) -> LoadedEngine:
    """Load the model and return an engine that has generated once.

    Raises:
        ModelUnusable: the model or the memory does not allow to serve it.
    """
    torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    model_dir = Path(config.model_dir)
    progress("tokenizer", 0.0)
    tokenizer = Tokenizer.load(model_dir)
    decoder = load_best_decoder(config, progress)
    max_model_len = min(
        config.max_model_len or decoder.spec.context_tokens, decoder.spec.context_tokens
    )
    memory_bytes_per_s = measure_bandwidth(decoder.device)
    block_bytes = decoder.kv_bytes_per_block(config.block_size)
    num_blocks = _num_blocks(config, block_bytes, max_model_len, decoder.device)
    progress("KV cache", 0.0)
    runner = Runner(
        decoder,
        num_blocks,
        config.block_size,
        max_adapters=config.max_adapters,
        max_adapter_rank=config.max_adapter_rank,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_sequences=config.max_sequences,
            max_batch_tokens=config.max_batch_tokens,
            max_background_tokens=config.max_background_tokens
            or _BACKGROUND_TOKENS[decoder.device.type],
            max_model_len=max_model_len,
            prefix_cache=config.prefix_cache,
        )
    )
    # A pool smaller than the model's context is the limit that holds.
    engine = Engine(runner, scheduler, tokenizer, scheduler.capacity_tokens, config.max_adapters)
    progress("warm-up", 0.0)
    _warm_up(engine)
    info = EngineInfo(
        base_model=model_dir.name,
        architecture=decoder.spec.architecture,
        quantization=decoder.quantization,
        kernel_path=decoder.kernel_path,
        device=str(decoder.device),
        vocab_size=decoder.spec.vocab_size,
        context_tokens=scheduler.capacity_tokens,
        num_blocks=num_blocks,
        block_size=config.block_size,
        weight_bytes=decoder.weight_bytes,
        kv_cache_bytes=num_blocks * block_bytes,
        hidden_size=decoder.spec.hidden_size,
        num_layers=decoder.spec.num_layers,
        memory_bytes_per_s=memory_bytes_per_s,
    )
    compiler = GrammarCompiler(tokenizer, decoder.spec.vocab_size)
    return LoadedEngine(engine, compiler, AdapterLoader(runner), info)


def _num_blocks(
    config: EngineConfig, block_bytes: int, max_model_len: int, device: torch.device
) -> int:
    wanted_bytes = config.kv_cache_bytes
    if wanted_bytes == 0 and device.type == "cuda":
        # The weights are loaded; what is left besides goes to adapters, graphs and activations.
        # What loading took and gave back counts as free.
        torch.cuda.empty_cache()
        wanted_bytes = int(torch.cuda.mem_get_info(device)[0] * _DEFAULT_DEVICE_SHARE)
    elif wanted_bytes == 0:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        wanted_bytes = min(int(available * _DEFAULT_MEMORY_SHARE), _DEFAULT_KV_CACHE_MAX_BYTES)
    # More than every sequence at its longest can never be used.
    most = config.max_sequences * -(-max_model_len // config.block_size)
    num_blocks = min(wanted_bytes // block_bytes, most)
    if num_blocks < 2:
        raise ModelUnusable(
            f"engine.kv_cache_bytes: {wanted_bytes} bytes hold {num_blocks} KV blocks of "
            f"{block_bytes} bytes; at least 2 are needed"
        )
    return int(num_blocks)


def _warm_up(engine: Engine) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.submit(Submit(_WARM_UP_ID, [0, 1, 2], 1, sampling))
    reports = []
    while engine.has_work:
        engine.step()
        reports += engine.take_reports()
    if not reports or not all(isinstance(report, Delta) for report in reports):
        raise ModelUnusable(f"the warm-up generation failed: {reports}")
