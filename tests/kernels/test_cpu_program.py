"""Whole programs: a small decoder in one call, bit-for-bit batch invariance, and refusals."""

import threading

import pytest
import torch
from heedful_kernels.cpu import (
    Batch,
    KVCache,
    LoraSlots,
    NativeKernelError,
    QuantizedRows,
    RopeTable,
    ThreadPool,
    load,
    quantize_q4,
    quantize_q8,
    reference,
)
from heedful_kernels.cpu.native import NativeLibrary

H, FFN, HEADS, KV_HEADS, D, VOCABULARY, LAYERS, BLOCK = 64, 96, 4, 2, 32, 200, 2, 16
MAX_ROWS, NUM_BLOCKS, RANK = 128, 64, 4
QKV = (HEADS + 2 * KV_HEADS) * D


class Decoder:
    """Weights, caches and buffers of a two-layer decoder, and its program on one library."""

    def __init__(self, cpu) -> None:
        generator = torch.Generator().manual_seed(7)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def weight(n: int, k: int):
            return quantize_q4(randn(n, k) / k**0.5)

        self.head = quantize_q8(randn(VOCABULARY, H) / H**0.5)
        angle = torch.arange(512)[:, None] * 0.9 ** torch.arange(D // 2)
        self.rope = RopeTable(angle.cos().contiguous(), angle.sin().contiguous())
        self.layers = [
            {
                "norms": (1 + 0.1 * randn(H), 1 + 0.1 * randn(H)),
                "qkv": weight(QKV, H),
                "o": weight(H, HEADS * D),
                "gate_up": weight(2 * FFN, H),
                "down": weight(H, FFN),
                "cache": KVCache.empty(NUM_BLOCKS, KV_HEADS, BLOCK, D),
            }
            for _ in range(LAYERS)
        ]
        widths = (HEADS * D, KV_HEADS * D, KV_HEADS * D)
        self.slots = LoraSlots.empty(3, H, widths, RANK)
        for slot, rank in enumerate((4, 2, 3)):
            b = [0.3 * randn(width, rank) for width in widths]
            self.slots.load(slot, [randn(rank, H) for _ in widths], b, 1.0)
        self.x, self.normed = torch.zeros(MAX_ROWS, H), torch.zeros(MAX_ROWS, H)
        self.selected = torch.zeros(MAX_ROWS, H)
        self.logits = torch.zeros(MAX_ROWS, VOCABULARY)
        self.argmax = torch.zeros(MAX_ROWS, dtype=torch.int32)
        self.program = self._build(cpu)

    def _build(self, cpu):
        builder = cpu.builder(MAX_ROWS, MAX_ROWS)
        rows, wide = QuantizedRows.empty(MAX_ROWS, H), QuantizedRows.empty(MAX_ROWS, FFN)
        heads = QuantizedRows.empty(MAX_ROWS, HEADS * D)
        qkv, mixed = torch.zeros(MAX_ROWS, QKV), torch.zeros(MAX_ROWS, HEADS * D)
        gate_up, lora = torch.zeros(MAX_ROWS, 2 * FFN), torch.zeros(MAX_ROWS, 3, 16)
        builder.embed(self.head, self.x)
        for layer in self.layers:
            builder.norm(self.x, layer["norms"][0], 1e-5, out=rows, out_fp32_TH=self.normed)
            builder.lora_shrink(self.normed, self.slots, lora, overlap_next=True)
            builder.linear(rows, layer["qkv"], qkv)
            builder.lora_expand(lora, self.slots, qkv)
            builder.rope_kv(qkv, layer["cache"], q_heads=HEADS, rope=self.rope)
            builder.attention(qkv, layer["cache"], mixed, q_heads=HEADS, max_positions=512)
            builder.quantize(mixed, heads)
            builder.linear(heads, layer["o"], self.x, accumulate=True)
            builder.norm(self.x, layer["norms"][1], 1e-5, out=rows)
            builder.linear(rows, layer["gate_up"], gate_up)
            builder.activation(gate_up, out=wide)
            builder.linear(wide, layer["down"], self.x, accumulate=True)
        builder.gather_rows(self.x, self.selected)
        builder.norm(self.selected, torch.ones(H), 1e-5, out=rows, selected=True)
        builder.linear(rows, self.head, self.logits, selected=True)
        scratch = torch.zeros(MAX_ROWS), torch.zeros(MAX_ROWS)
        builder.argmax_lse(self.logits, self.argmax, *scratch)
        return builder.build()

    def run(self, pool: ThreadPool, rows: list[tuple[int, int, int, int]]) -> torch.Tensor:
        """Rows of (sequence, position, token, adapter); returns each row's logits.

        Sequence s owns blocks 16 s .. 16 s + 15.
        """
        sequence, position, token, adapter = torch.tensor(rows, dtype=torch.int32).T.contiguous()
        blocks = torch.arange(4 * 16, dtype=torch.int32).view(4, 16)
        slot = blocks[sequence.long(), position.long() // BLOCK].long() * BLOCK + position % BLOCK
        batch = Batch(
            token_ids=token,
            positions=position,
            sequence=sequence,
            block_tables=blocks,
            slot_mapping=slot,
            selected_rows=torch.arange(len(rows), dtype=torch.int32),
            lora_slot=adapter,
        )
        self.program.run(pool, batch)
        return self.logits[: len(rows)].clone()


@pytest.fixture(scope="module")
def decoder(cpu) -> Decoder:
    return Decoder(cpu)


@pytest.fixture
def prompts() -> list[list[tuple[int, int, int, int]]]:
    lengths, adapters = (90, 3, 40, 17), (0, -1, 2, 1)
    tokens = torch.randint(0, VOCABULARY, (4, 90)).tolist()
    return [
        [(s, position, tokens[s][position], adapters[s]) for position in range(lengths[s])]
        for s in range(4)
    ]


def test_the_program_equals_the_same_ops_in_torch(cpu, decoder, prompts):
    rows = prompts[2]
    logits = decoder.run(cpu.pools[2], rows)
    _, position, token, adapter = torch.tensor(rows).T
    batch = Batch(
        token_ids=token,
        positions=position,
        sequence=torch.zeros_like(position),
        block_tables=torch.arange(16)[None],
        slot_mapping=position.long(),
        selected_rows=position,
    )
    x = reference.unpack_parts(decoder.head)
    x = (x[0] * x[1][..., None]).flatten(1)[token]
    for layer in decoder.layers:
        cache = KVCache.empty(16, KV_HEADS, BLOCK, D)
        normed = reference.norm(x, layer["norms"][0], 1e-5)
        qkv = reference.linear(reference.quantize_rows(normed), layer["qkv"])
        qkv = reference.lora(normed, decoder.slots, adapter, qkv)
        qkv = reference.rope_kv(qkv, cache, batch, q_heads=HEADS, rope=decoder.rope)
        mixed = reference.attention(qkv, cache, batch, q_heads=HEADS)
        x = x + reference.linear(reference.quantize_rows(mixed), layer["o"])
        normed = reference.norm(x, layer["norms"][1], 1e-5)
        gate_up = reference.linear(reference.quantize_rows(normed), layer["gate_up"])
        wide = reference.activation(gate_up, reference.Activation.SWIGLU)
        x = x + reference.linear(reference.quantize_rows(wide), layer["down"])
    x = reference.norm(x, torch.ones(H), 1e-5)
    expected = reference.linear(reference.quantize_rows(x), decoder.head)
    # A value on a rounding boundary may fall either way: one int8 step is 1/127 of its group.
    assert (logits - expected).abs().max() < 0.05 * expected.std()
    assert (decoder.argmax[: len(rows)] == logits.argmax(-1)).all()


def test_rows_have_the_same_bits_in_any_batch_chunking_order_and_thread_count(
    cpu, decoder, prompts
):
    alone = {}
    for rows in prompts:
        for row in rows:
            alone[row] = decoder.run(cpu.pools[1], [row])[0]
    whole = [row for rows in prompts for row in rows][:MAX_ROWS]
    longest, *others = prompts
    chunked = [longest[:1], longest[1:8], longest[8:9], longest[9:70], longest[70:]]
    steps = [whole, prompts[2] + prompts[1] + prompts[3]]
    steps += [chunk + other[: i + 1] for i, chunk in enumerate(chunked) for other in others[:1]]
    steps += [list(reversed(prompts[2]))]
    for threads in (1, 2):
        for layer in decoder.layers:
            layer["cache"].keys.fill_(float("nan"))
            layer["cache"].values.fill_(float("nan"))
        for rows in steps:
            logits = decoder.run(cpu.pools[threads], rows)
            for row, found in zip(rows, logits, strict=True):
                assert torch.equal(found, alone[row]), (row, len(rows), threads)


def test_runs_repeat_bit_for_bit_while_threads_race(cpu, decoder, prompts):
    rows = prompts[3]
    first = decoder.run(cpu.pools[2], rows)
    for _ in range(200):
        assert torch.equal(decoder.run(cpu.pools[2], rows), first)


def test_an_empty_batch_runs_nothing(cpu, decoder, rows_batch):
    decoder.logits.fill_(3.0)
    decoder.program.run(cpu.pools[2], rows_batch(0))
    assert (decoder.logits == 3.0).all()


def test_profile_times_every_op(cpu, decoder, rows_batch):
    batch = rows_batch(3)
    seconds = decoder.program.profile(cpu.pools[2], batch)
    assert len(seconds) == decoder.program.num_ops
    assert all(0 <= s < 10 for s in seconds)
    assert sum(seconds) > 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_ids", VOCABULARY, "row 1: token id 200"),
        ("token_ids", -1, "row 1: token id -1"),
        ("positions", 512, "row 1: position 512"),
        ("sequence", 4, "row 1: sequence 4"),
        ("slot_mapping", NUM_BLOCKS * BLOCK, "row 1: slot 1024"),
        ("lora_slot", 3, "row 1: adapter slot 3"),
        ("selected_rows", 2, "row 1: selected row 2"),
        ("positions", 16, "sequence 0: position 16 needs 2 blocks, its table has 1"),
    ],
)
def test_a_batch_that_would_read_elsewhere_is_refused(
    cpu, decoder, rows_batch, field, value, message
):
    batch = rows_batch(2, lora_slot=torch.full((2,), -1, dtype=torch.int32))
    changed = getattr(batch, field).clone()
    changed[1] = value
    with pytest.raises(NativeKernelError, match=message):
        decoder.program.run(cpu.pools[1], Batch(**(vars(batch) | {field: changed})))


def test_a_block_outside_the_cache_is_refused(cpu, decoder, rows_batch):
    batch = rows_batch(1, block_tables=torch.tensor([[NUM_BLOCKS]], dtype=torch.int32))
    with pytest.raises(NativeKernelError, match="sequence 0: block 0 of its table is 64"):
        decoder.program.run(cpu.pools[1], batch)


def test_too_many_rows_are_refused(cpu, decoder, rows_batch):
    with pytest.raises(NativeKernelError, match="129 rows in a program for 128"):
        decoder.program.run(cpu.pools[1], rows_batch(MAX_ROWS + 1))


def test_wrong_index_types_are_refused(cpu, decoder, rows_batch):
    with pytest.raises(ValueError, match="token_ids"):
        decoder.program.run(
            cpu.pools[1], rows_batch(2, token_ids=torch.zeros(2, dtype=torch.int64))
        )


def test_the_builder_names_the_tensor_that_does_not_fit(cpu):
    builder = cpu.builder(4)
    rows = QuantizedRows.empty(4, 64)
    with pytest.raises(ValueError, match=r"x_TK is .* wanted"):
        builder.quantize(torch.zeros(3, 64), rows)
    with pytest.raises(ValueError, match="values_TK"):
        builder.quantize(torch.zeros(4, 96), rows)
    with pytest.raises(ValueError, match="contiguous"):
        builder.quantize(torch.zeros(64, 4).T, rows)
    with pytest.raises(ValueError, match="aligned"):
        builder.quantize(torch.zeros(4 * 64 + 1)[1:].view(4, 64), rows)


def test_the_library_names_the_op_that_it_refuses(cpu):
    builder = cpu.builder(4)
    builder.quantize(torch.zeros(4, 40), QuantizedRows.empty(4, 40))
    with pytest.raises(NativeKernelError, match=r"op 0 \(quant\): dimensions out of range"):
        builder.build()
    with pytest.raises(NativeKernelError, match="needs ops"):
        cpu.builder(4).build()


def test_a_closed_pool_and_a_closed_program_say_so(cpu, rows_batch):
    builder = cpu.builder(1)
    builder.gather_rows(torch.zeros(1, 32), torch.zeros(1, 32))
    program = builder.build()
    pool = ThreadPool(cpu.library, 2)
    program.run(pool, rows_batch(1))
    pool.close()
    with pytest.raises(NativeKernelError, match="pool is closed"):
        program.run(pool, rows_batch(1))
    program.close()
    with pytest.raises(ValueError, match="program is closed"):
        program.run(cpu.pools[1], rows_batch(1))


def test_a_second_caller_is_refused_while_a_run_is_on(cpu, decoder, prompts):
    rows = prompts[0]
    expected = decoder.run(cpu.pools[2], rows)
    start, refusals = threading.Barrier(2), []

    def hammer():
        start.wait()
        for _ in range(50):
            try:
                decoder.run(cpu.pools[2], rows)
            except NativeKernelError as error:
                refusals.append(str(error))

    callers = [threading.Thread(target=hammer) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert refusals
    assert all("running already" in refusal for refusal in refusals)
    assert torch.equal(decoder.run(cpu.pools[2], rows), expected)


def test_more_threads_than_cores_and_work_still_finish(cpu, decoder, prompts):
    expected = decoder.run(cpu.pools[1], prompts[1])
    with ThreadPool(cpu.library, 7, spin_us=0) as pool:
        for _ in range(20):
            assert torch.equal(decoder.run(pool, prompts[1]), expected)


def test_the_environment_can_force_a_lower_instruction_set(cpu, monkeypatch):
    monkeypatch.setenv("HEEDFUL_CPU_ISA", "generic")
    library = load()
    assert isinstance(library, NativeLibrary)
    assert library.isa == "generic"
    assert library.supports(cpu.library.isa)
    monkeypatch.setenv("HEEDFUL_CPU_ISA", "sse9")
    with pytest.raises(NativeKernelError, match="sse9"):
        load()
