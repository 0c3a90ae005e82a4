"""Beam search guided by the policy: several plans grow side by side, the policy says which moves to try.

At every step each of the plans is continued by its most probable moves; the best of all continuations stay, by value
gained plus a little for probability (so that a move that only prepares can stay in the beam). Plans that hold the same
VMs in the same places are one. The best prefix ever seen is the result.
"""

import heapq

import numpy as np
import torch

from central.planner.learned import weights
from central.planner.learned.network import Batch, Policy, batch_of
from central.planner.learned.observe import Observer
from central.planner.learned.rollout import stack_places
from central.planner.model.cluster import Cluster
from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.solvers.exact import better
from central.planner.solvers.greedy import Walk

WIDTH = 6
VMS, PLACES = 4, 3  # continuations tried per plan: the likeliest VMs, and places for each
PROBABILITY = 0.05  # slots that one unit of log-probability is held to be worth


def beam(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """Deterministic: `seed` is not used."""
    del seed
    policy, _ = weights.load()
    first = Walk(problem, Cluster(problem.mapping, problem.limits.fixed))
    plans: list[tuple[Walk, float]] = [(first, 0.0)]
    best = first
    while plans and not deadline.over:
        options = _continuations(policy, plans)
        if not options:
            break
        kept: list[tuple[Walk, float]] = []
        seen: set[bytes] = set()
        for _, row, vm, place, log in heapq.nlargest(4 * WIDTH, options):
            walk = plans[row][0]
            after = walk.state.vm_place.copy()
            after[vm] = place
            if len(kept) >= WIDTH or after.tobytes() in seen or not walk.may(vm, place):
                continue
            seen.add(after.tobytes())
            grown = walk.fork()
            grown.go(vm, place)
            kept.append((grown, log))
            if better(grown, best):
                best = grown
        plans = [(walk, log) for walk, log in kept if walk.budget.moves_left > 0 and not walk.reached()]
    return Solution(tuple(best.steps))


def _continuations(policy: Policy, plans: list[tuple[Walk, float]]) -> list[tuple[float, int, int, int, float]]:
    """(merit, plan, VM, place, log-probability so far) of what may follow."""
    mnl = max(1, plans[0][0].budget.limits.mnl)
    observers = [Observer(walk.state, walk.valuation, walk.tables) for walk, _ in plans]
    seen = [observer.observe(walk.budget.moves / mnl) for observer, (walk, _) in zip(observers, plans, strict=True)]
    batch = batch_of(seen)
    found = []
    with torch.no_grad():
        vm_tokens, pm_tokens = policy.encode_all(batch)
        scores, pms, _ = policy.score(batch, vm_tokens, pm_tokens)
        top = torch.log_softmax(scores, dim=-1).topk(min(VMS, scores.shape[1]), dim=-1)
        pairs = [
            (row, int(vm), float(log))
            for row in range(len(plans))
            for vm, log in zip(top.indices[row], top.values[row], strict=True)
            if seen[row].vm_mask[int(vm)]
        ]
        if not pairs:
            return []
        options = [observers[row].places(vm) for row, vm, _ in pairs]
        cluster = plans[0][0].cluster
        pm, features, legal = stack_places([cluster] * len(options), options)
        rows = [row for row, _, _ in pairs]
        part = Batch(*(getattr(batch, name)[rows] for name in Batch.__dataclass_fields__))
        chosen = torch.tensor([vm for _, vm, _ in pairs])
        place_log = torch.log_softmax(
            policy.place_scores(part, vm_tokens[rows], pms[rows], chosen, pm, features, legal), dim=-1
        )
        for position, (row, vm, vm_log) in enumerate(pairs):
            walk, log_so_far = plans[row]
            places, table, mask = options[position]
            best = place_log[position].topk(min(PLACES, int(mask.sum())))
            for index, log in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                log_now = log_so_far + vm_log + log
                gain = float(table[index, 1])  # leaving plus arriving, exact across PMs
                found.append((walk.net() + gain + PROBABILITY * log_now, row, vm, places.start + index, log_now))
    return [one for one in found if np.isfinite(one[0])]
