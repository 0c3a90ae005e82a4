"""Beam search guided by the policy: several plans grow side by side, the policy says which moves to try.

At every step each of the plans is continued by its most probable moves; the best of all continuations stay, by value
gained plus a little for probability (so that a move that only prepares can stay in the beam). Plans that hold the same
VMs in the same places are one. The best prefix ever seen is the result.
"""

import heapq
from dataclasses import dataclass

import torch

from central.planner.learned import weights
from central.planner.learned.network import Batch, Policy, batch_of
from central.planner.learned.observe import Observer
from central.planner.learned.rollout import Tokens, stack_places
from central.planner.model.cluster import Cluster
from central.planner.model.problem import Deadline, Problem, Solution
from central.planner.solvers.exact import better
from central.planner.solvers.greedy import Walk

WIDTH = 6
VMS, PLACES = 4, 3  # continuations tried per plan: the likeliest VMs, and places for each
PROBABILITY = 0.05  # slots that one unit of log-probability is held to be worth


@dataclass
class _Plan:
    walk: Walk
    observer: Observer
    log: float  # log-probability of its moves


def beam(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """Deterministic: `seed` is not used."""
    del seed
    policy, _ = weights.load()
    first = Walk(problem, Cluster(problem.mapping, problem.limits.fixed))
    plans = [_Plan(first, Observer(first), 0.0)]
    best = first
    with torch.no_grad():
        tokens = Tokens(policy, [plans[0].observer])
        while plans and not deadline.over:
            deadline.board.sketch(best.steps)
            options = _continuations(policy, tokens, plans)
            grown: list[_Plan] = []
            parents: list[int] = []
            changed: list[tuple[int, Observer, int]] = []
            seen: set[bytes] = set()
            for _, row, vm, place, log in heapq.nlargest(4 * WIDTH, options):
                parent = plans[row]
                after = parent.walk.state.vm_place.copy()
                after[vm] = place
                if len(grown) >= WIDTH or after.tobytes() in seen or not parent.walk.may(vm, place):
                    continue
                seen.add(after.tobytes())
                walk = parent.walk.fork()
                observer = parent.observer.fork(walk)
                source = int(walk.state.vm_place[vm])
                walk.go(vm, place)
                observer.moved(vm, source, place)
                touched = sorted({int(walk.cluster.place_pm[source]), int(walk.cluster.place_pm[place])})
                if better(walk, best):
                    best = walk
                if walk.budget.moves_left > 0 and not walk.reached():
                    changed += [(len(grown), observer, pm) for pm in touched]
                    parents.append(row)
                    grown.append(_Plan(walk, observer, log))
            plans = grown
            if plans:
                tokens.follow(parents)
                tokens.refresh(changed)
    return Solution(tuple(best.steps))


def _continuations(policy: Policy, tokens: Tokens, plans: list[_Plan]) -> list[tuple[float, int, int, int, float]]:
    """(merit, plan, VM, place, log-probability so far) of what may follow."""
    seen = [plan.observer.observe() for plan in plans]
    batch = batch_of(seen)
    found = []
    scores, pms, _ = policy.score(batch, tokens.vm, tokens.pm)
    top = torch.log_softmax(scores, dim=-1).topk(min(VMS, scores.shape[1]), dim=-1)
    pairs = [
        (row, int(vm), float(log))
        for row in range(len(plans))
        for vm, log in zip(top.indices[row], top.values[row], strict=True)
        if seen[row].vm_mask[int(vm)]
    ]
    if not pairs:
        return []
    options = [plans[row].observer.places(vm) for row, vm, _ in pairs]
    pm, features, legal = stack_places([plans[0].walk.cluster] * len(options), options)
    rows = [row for row, _, _ in pairs]
    part = Batch(*(getattr(batch, name)[rows] for name in Batch.__dataclass_fields__))
    chosen = torch.tensor([vm for _, vm, _ in pairs])
    place_scores = policy.place_scores(part, tokens.vm[rows], pms[rows], chosen, pm, features, legal)
    place_log = torch.log_softmax(place_scores, dim=-1)
    for position, (row, vm, vm_log) in enumerate(pairs):
        places, table, mask = options[position]
        best = place_log[position].topk(min(PLACES, int(mask.sum())))
        for index, log in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            log_now = plans[row].log + vm_log + log
            gain = float(table[index, 1])  # leaving plus arriving, exact across PMs
            merit = plans[row].walk.net() + gain + PROBABILITY * log_now
            found.append((merit, row, vm, places.start + index, log_now))
    return found
