"""The visitor of the benchmarks: which flows it sends, and that it measures the program behind it."""

import os

import numpy as np
import pytest

from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.bench_visit import SYN, Visitor


@pytest.mark.parametrize("at_random", [False, True])
def test_every_flow_is_visited_once_a_lap(kernel_sender, at_random):
    kernel_sender.reset()
    program = bpf.obj_get(kernel_sender.pin_dir / "egress")
    with Visitor() as visitor:
        visitor.visit(program, SYN, 256, 256, at_random=at_random)
    os.close(program)
    table = kernel_sender.datapath.flows()
    sources = table.keys["source"][:, 12:]
    assert set(sources[:, 0]) == {10}
    assert sorted(sources[:, 1]) == list(range(256))
    assert np.all(table.states["packets"] == 1)


def test_an_empty_program_behind_it_leaves_no_flow(kernel_sender):
    kernel_sender.reset()
    with Visitor() as visitor:
        visitor.visit(visitor.empty, SYN, 256, 256)
    assert len(kernel_sender.datapath.flows()) == 0
