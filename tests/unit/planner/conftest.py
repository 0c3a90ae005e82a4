"""Small clusters by hand, and a way to build a problem in one line."""

from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch

from central.planner.model.mapping import AntiAffinity, Mapping, NumaNode, PhysicalMachine, Share, VirtualMachine
from central.planner.model.objective import parse_objective
from central.planner.model.problem import Limits, Problem

Build = Callable[..., Mapping]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The policy on one thread: deterministic, and no threads that wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def build() -> Build:
    """build(sizes, vms, sets): node core counts per PM; VMs as (pm, {node: cores}), 2 GB per core."""

    def make(
        sizes: list[list[int]],
        vms: list[tuple[int, dict[int, int]]],
        sets: list[list[int]] | None = None,
        granularity: str = "host",
        racks: list[str] | None = None,
    ) -> Mapping:
        pms = tuple(
            PhysicalMachine(
                f"pm{i}",
                tuple(NumaNode(n, cores, cores * 4096) for n, cores in enumerate(nodes)),
                racks[i] if racks else f"r{i}",
            )
            for i, nodes in enumerate(sizes)
        )
        machines = tuple(
            VirtualMachine(f"vm{i}", pm, tuple(Share(n, c, c * 2048) for n, c in shares.items()))
            for i, (pm, shares) in enumerate(vms)
        )
        groups = tuple(AntiAffinity(tuple(members), granularity) for members in sets or [])  # type: ignore[arg-type]
        return Mapping(pms, machines, groups)

    return make


@pytest.fixture
def pose() -> Callable[..., Problem]:
    """pose(mapping, mnl, objective, **limits) -> Problem."""

    def make(mapping: Mapping, mnl: int = 50, objective: str = "fr", **limits: object) -> Problem:
        return Problem(mapping, parse_objective(objective), Limits(mnl, **limits))  # type: ignore[arg-type]

    return make


@pytest.fixture
def ticking() -> Callable[[], float]:
    """A clock that goes on by 20 ms whenever it is looked at, so that a test does not depend on the machine's speed."""
    ticks = count()
    return lambda: 0.02 * next(ticks)
