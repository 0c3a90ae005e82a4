"""What the policy costs as clusters grow: encoding all trees once, and one step of a walk after that."""

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from central.planner.generator import SHAPES, generate
from central.planner.learned import weights
from central.planner.learned.network import batch_of
from central.planner.learned.observe import Observer
from central.planner.learned.rollout import Cut, roll
from central.planner.model.objective import parse_objective
from central.planner.model.problem import Limits, Problem
from central.planner.solvers.greedy import Walk

PMS = (100, 200, 400, 800, 1600)
STEPS = 20


def growth() -> Iterator[dict[str, float]]:
    """Milliseconds per cluster size: linear means that the last column stays about the same."""
    policy, _ = weights.load()
    for pms in PMS:
        shape = replace(SHAPES["medium"], pms=pms, vms=round(pms * SHAPES["medium"].vms / SHAPES["medium"].pms))
        walk = Walk(Problem(generate(shape, 1), parse_objective("fr"), Limits(STEPS)))
        batch = batch_of([Observer(walk).observe()])
        with torch.no_grad():
            policy.encode_all(batch)
            started = time.perf_counter()
            policy.score(batch, *policy.encode_all(batch))
            whole = time.perf_counter() - started
        started = time.perf_counter()
        roll(policy, [walk], torch.Generator().manual_seed(0), Cut(greedy_first=True))
        step = (time.perf_counter() - started - whole) / STEPS
        yield {
            "pms": pms,
            "vms": shape.vms,
            "encode_all_ms": round(1e3 * whole, 2),
            "step_ms": round(1e3 * step, 2),
            "encode_all_us_per_pm": round(1e6 * whole / pms, 1),
        }
