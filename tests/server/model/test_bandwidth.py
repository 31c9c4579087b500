import torch
from heedful_server.model.bandwidth import measure_bandwidth


def test_a_copy_s_speed_is_that_of_memory_and_not_of_nothing() -> None:
    # Far from both what a broken timer and what no work at all would give.
    assert 1e7 < measure_bandwidth(torch.device("cpu"), 1 << 20) < 1e13
