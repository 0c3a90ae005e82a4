"""Partitioned optimisation (POP; Narayanan et al., SOSP 21): split the PMs at random, solve each part exactly.

Each part gets its share of MNL and of the time, and the grouped program. Parts share no PM, so the moves of each are
put in order as soon as they are known.
"""

from dataclasses import replace

import numpy as np

from central.planner.model.cluster import Cluster
from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.solvers.greedy import Walk
from central.planner.solvers.grouped import Grouped
from central.planner.solvers.realise import realise

PMS_PER_PART = 70


def pop(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """No bound: the parts' optima say nothing of the whole."""
    cluster = Cluster(problem.mapping, problem.limits.fixed, problem.limits.per_tenant is not None)
    walk = Walk(problem, cluster)
    active = np.unique(cluster.node_pm[cluster.node_active])
    parts = np.array_split(np.random.default_rng(seed).permutation(active), max(1, round(len(active) / PMS_PER_PART)))
    limits = problem.limits
    for number, part in enumerate(parts):
        mask = np.zeros(len(problem.mapping.pms), dtype=np.bool_)
        mask[part] = True
        # Moves and bytes are dealt out evenly; a remainder goes to the first parts.
        mnl = limits.mnl // len(parts) + (number < limits.mnl % len(parts))
        copied = None if limits.max_bytes is None else limits.max_bytes // len(parts)
        tenant = None if limits.per_tenant is None else limits.per_tenant // len(parts)
        share = replace(limits, mnl=mnl, max_bytes=copied, per_tenant=tenant)
        program = Grouped(walk.state, walk.valuation, share, pms=mask)
        result = program.solve(deadline.left_s * 0.9 / (len(parts) - number), seed=seed)
        if result.flow is not None:
            realise(walk, result.flow, deadline, seed)
            deadline.board.post(Solution(tuple(walk.steps)))
    return Solution(tuple(walk.steps))
