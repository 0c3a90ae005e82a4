"""Learned search: the policy makes a plan, then says which PMs a large-neighbourhood search re-optimises.

A PM's weight is the probability, by the policy in the state after the plan, that one of its VMs moves next, beside the
plain weight by fragments: where the policy would go on, there is something left to gain.
"""

import numpy as np
import numpy.typing as npt
import torch

from central.planner.learned import weights
from central.planner.learned.network import batch_of
from central.planner.learned.observe import Observer
from central.planner.learned.solver import Options, best_of, sample
from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.solvers.exact import cluster_of
from central.planner.solvers.greedy import Walk
from central.planner.solvers.neighbourhood import fragments, search

POLICY_SHARE = 0.4  # of the time, for the plan to start from
POLICY_WEIGHT = 0.7  # against the weight by fragments


def guided(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """Policy first, then neighbourhoods that it picks."""
    cluster = cluster_of(problem)
    best = best_of(sample(problem, deadline.part(POLICY_SHARE), seed, Options(), cluster))
    policy, _ = weights.load()

    def score(walk: Walk) -> npt.NDArray[np.float64]:
        seen = Observer(walk).observe()
        plain = fragments(walk)
        batch = batch_of([seen])
        with torch.no_grad():
            scores, _, _ = policy.score(batch, *policy.encode_all(batch))
        chance = torch.softmax(scores[0], dim=-1).numpy().astype(float)
        placed = seen.host >= 0
        of_pm = np.bincount(seen.host[placed], chance[placed], len(plain))
        mixed = POLICY_WEIGHT * of_pm / max(of_pm.sum(), 1e-9) + (1 - POLICY_WEIGHT) * plain / plain.sum()
        return np.where(plain > 0, mixed + 1e-9, 0.0)

    walk = search(problem, cluster, best.walk.steps[: best.length], deadline, seed, score)
    return Solution(tuple(walk.steps))
