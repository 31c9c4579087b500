"""In the packed modes a row's result does not depend, bit for bit, on what else is in the batch."""

import pytest
import torch


# Query heads per key head: computed in one piece, in two, in seven, and without sharing.
@pytest.fixture(scope="module", params=[(9, 3), (8, 2), (7, 1), (4, 4)], ids=str)
def packed_decoder(request, save_checkpoint, load):
    heads, kv_heads = request.param
    # Wide enough that the kernels' tiles and vector lengths matter.
    model_dir = save_checkpoint(
        "llama-gqa-tied-llama3-rope",
        hidden_size=heads * 32,
        intermediate_size=320,
        head_dim=64,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    return load(model_dir, "int4")


def test_decode_rows_are_bit_equal_alone_and_among_others(
    packed_decoder, stepper, random_ids
) -> None:
    count = 24
    prompts = {f"p{i}": random_ids(1 + (37 * i) % 101, seed=i) for i in range(count)}
    nexts = {name: random_ids(1, seed=100 + i) for i, name in enumerate(prompts)}
    together = stepper(packed_decoder, 200, 16)
    for name, ids in prompts.items():
        together.step({name: ids})
    batched = together.step(nexts)
    for name, ids in prompts.items():
        alone = stepper(packed_decoder, 8, 16)
        alone.step({name: ids})
        assert torch.equal(alone.step({name: nexts[name]})[name], batched[name]), name


def test_greedy_answers_are_equal_alone_and_among_others(
    packed_decoder, stepper, random_ids
) -> None:
    prompts = {f"p{i}": random_ids(2 + 11 * i, seed=i) for i in range(8)}
    together = stepper(packed_decoder, 100, 16).greedy(prompts, 10)
    for name, ids in prompts.items():
        assert stepper(packed_decoder, 8, 16).greedy({name: ids}, 10)[name] == together[name]


def test_a_prompt_chunk_is_bit_equal_whatever_decodes_beside_it(
    packed_decoder, stepper, random_ids
) -> None:
    ids = random_ids(33, seed=0)
    alone = stepper(packed_decoder, 8, 16).step({"a": ids})["a"]
    runner = stepper(packed_decoder, 64, 16)
    runner.step({"b": random_ids(60, seed=1), "c": random_ids(5, seed=2)})
    mixed = runner.step({"b": [3], "a": ids, "c": [4]})["a"]
    assert torch.equal(alone, mixed)


@pytest.mark.parametrize(
    "sizes", [[50, 50], [32, 32, 32, 4], [7, 66, 27], [90] + [1] * 10, [1] * 100]
)
def test_a_prompt_is_bit_equal_however_it_is_cut(
    packed_decoder, stepper, random_ids, sizes: list[int]
) -> None:
    ids = random_ids(100, seed=5)
    whole = stepper(packed_decoder, 8, 16).step({"a": ids})["a"]
    runner = stepper(packed_decoder, 8, 16)
    parts = []
    for size in sizes:
        taken = sum(len(part) for part in parts)
        parts.append(runner.step({"a": ids[taken : taken + size]})["a"])
    assert torch.equal(torch.cat(parts), whole)
