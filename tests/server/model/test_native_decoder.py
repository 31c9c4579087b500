"""The native decoder as the engine sees it: close to the float model, exact whatever the batch."""

from pathlib import Path

import pytest
import torch
from heedful_kernels import cpu
from heedful_server.model.batch import ForwardBatch
from heedful_server.model.load import load_best_decoder
from heedful_server.model.native_decoder import NativeDecoder
from heedful_server.protocol import EngineConfig
from torch import Tensor

BLOCK = 16

pytestmark = pytest.mark.skipif(
    cpu.find_library() is None, reason="the native kernels are not built (no C++ compiler)"
)


def _load(model_dir: Path, quantize: str, native: bool = True):
    config = EngineConfig(
        model_dir=str(model_dir),
        quantize=quantize,
        native_kernels=native,
        num_threads=2,
        max_batch_tokens=256,
    )
    return load_best_decoder(config, lambda stage, fraction: None)


def _batch(chunks: list[tuple[list[int], int, list[int]]], logit_rows: list[int]) -> ForwardBatch:
    """Chunks of (token ids, first position, block table)."""
    width = max(len(table) for _, _, table in chunks)
    positions = [torch.arange(start, start + len(ids)) for ids, start, _ in chunks]
    slots = [
        torch.tensor(table)[where // BLOCK] * BLOCK + where % BLOCK
        for (_, _, table), where in zip(chunks, positions, strict=True)
    ]
    starts = [0]
    for ids, _, _ in chunks:
        starts.append(starts[-1] + len(ids))
    return ForwardBatch(
        token_ids_T=torch.tensor([token for ids, _, _ in chunks for token in ids]),
        positions_T=torch.cat(positions),
        slot_mapping_T=torch.cat(slots),
        block_tables_SN=torch.tensor(
            [table + [0] * (width - len(table)) for _, _, table in chunks], dtype=torch.int32
        ),
        query_starts=tuple(starts),
        context_lens=tuple(start + len(ids) for ids, start, _ in chunks),
        logit_rows_R=torch.tensor(logit_rows),
    )


def _all_logits(decoder, ids: list[int]) -> Tensor:
    cache = decoder.allocate_kv_cache(16, BLOCK)
    batch = _batch([(ids, 0, list(range(12)))], list(range(len(ids))))
    return decoder.forward(batch, cache).logits_RV.clone()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 250, (150,), generator=generator).tolist()


def test_int8_logits_are_close_to_the_float_model(tiny_model_dir: Path, ids: list[int]) -> None:
    native = _load(tiny_model_dir, "int8")
    assert isinstance(native, NativeDecoder)
    exact_TV = _all_logits(_load(tiny_model_dir, "float32"), ids)
    logits_TV = _all_logits(native, ids)
    error_T = (logits_TV - exact_TV).norm(dim=1) / exact_TV.norm(dim=1)
    # 8-bit weights and activations: each linear adds about 0.5 % of noise, and there are nine. The
    # first row attends to itself alone; behind it this model's sharp random attention amplifies
    # noise, but a wrong rotation or mask would make the error about 1.
    assert error_T[0] < 0.05
    assert error_T.mean() < 0.25


def test_statistics_belong_to_the_rows_beyond_the_head_buffer(
    tiny_model_dir: Path, ids: list[int]
) -> None:
    decoder = _load(tiny_model_dir, "int4")
    cache = decoder.allocate_kv_cache(16, BLOCK)
    batch = _batch([(ids, 0, list(range(12)))], list(range(150)))
    result = decoder.forward(batch, cache)
    logits_RV, stats = result.logits_RV, result.stats
    assert logits_RV.shape == (150, 288)
    assert stats is not None
    assert stats.argmax_R.tolist() == logits_RV.argmax(1).tolist()
    assert torch.equal(stats.max_R, logits_RV.amax(1))
    torch.testing.assert_close(stats.lse_R, torch.logsumexp(logits_RV, 1), rtol=1e-6, atol=1e-5)


def test_a_rows_logits_are_the_same_bits_however_its_sequence_is_cut_and_in_company(
    tiny_model_dir: Path, ids: list[int]
) -> None:
    decoder = _load(tiny_model_dir, "int4")
    whole_TV = _all_logits(decoder, ids)
    cache = decoder.allocate_kv_cache(64, BLOCK)
    ours, theirs = list(range(5, 17)), list(range(30, 42))
    done = 0
    for size in (1, 40, 7, 64, 38):
        chunk = (ids[done : done + size], done, ours)
        company = (ids[::-1][done : done + size], done, theirs)
        rows = list(range(size, 2 * size))
        logits_RV = decoder.forward(_batch([company, chunk], rows), cache).logits_RV
        assert torch.equal(logits_RV, whole_TV[done : done + size])
        done += size
    assert done == len(ids)


def test_a_copied_block_reads_as_its_source(tiny_model_dir: Path, ids: list[int]) -> None:
    decoder = _load(tiny_model_dir, "int4")
    cache = decoder.allocate_kv_cache(8, BLOCK)
    prompt = ids[:20]
    decoder.forward(_batch([(prompt, 0, [0, 1])], []), cache)
    expected_RV = decoder.forward(_batch([([7], 20, [0, 1])], [0]), cache).logits_RV
    expected_RV = expected_RV.clone()
    decoder.copy_blocks(cache, [(1, 5)])
    decoder.forward(_batch([([9], 20, [0, 1])], []), cache)
    logits_RV = decoder.forward(_batch([([7], 20, [0, 5])], [0]), cache).logits_RV
    assert torch.equal(logits_RV, expected_RV)


def test_the_native_path_says_why_it_was_not_taken(tiny_model_dir: Path) -> None:
    assert _load(tiny_model_dir, "int8", native=False).fallbacks == {"disabled": 1}
    assert _load(tiny_model_dir, "float32").fallbacks == {"weights": 1}
