"""Warm start: learn from the exact solver, which solves small clusters in a few hundredths of a second.

Logic: a random small mapping at a random workload level; the policy itself walks a part of the way, so that the teacher
also answers where the policy goes wrong (DAgger; Ross et al., 2011); from there the exact flow says which VMs may leave
and which places await them. Of these the most valuable come first, so that the teacher's order is one a policy can
follow: what gains at once before what only prepares. Any of them is right, so the loss is minus the log of the
probability of all right choices together, and the value learns what the flow still gains:
    -log sum over right VMs of p(vm)  -  log sum over right places of p(place | vm)  +  w (value - gain left)^2
One right move is made, the flow loses it, and the next state is labelled, until the flow is done.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from central.planner.generator import SHAPES, generate
from central.planner.learned import weights
from central.planner.learned.network import Policy, batch_of
from central.planner.learned.observe import Observation
from central.planner.learned.rollout import REWARD_SCALE, Cut, roll, stack
from central.planner.model.cluster import Bools, Ints
from central.planner.model.objective import parse_objective
from central.planner.model.problem import Deadline, Limits, Problem
from central.planner.solvers.columns import Master
from central.planner.solvers.greedy import Walk
from central.planner.solvers.grouped import Counts
from central.planner.solvers.patterns import Pricer
from central.planner.solvers.tables import Singles

OBJECTIVES = ("fr", "fr", "fr", "mixed", "multi")


@dataclass(frozen=True)
class Settings:
    """Every knob of the distillation."""

    updates: int = 2400
    batch: int = 24  # labelled states per update
    learning_rate: float = 1e-3  # annealed to 0 along a half cosine
    pms: tuple[int, int] = (10, 40)  # drawn per mapping
    used: tuple[float, float] = (0.65, 0.92)
    moves_per_pm: tuple[float, float] = (0.08, 0.6)  # MNL, drawn per walk; at least 3
    walked: float = 0.8  # share of the MNL that the policy walks at most before the teacher takes over
    value_weight: float = 0.25
    pool: int = 200  # mappings in all; walks on one differ by their start, MNL and objective
    fresh: int = 8  # states labelled anew per update; the others are drawn from those kept
    kept: int = 6000
    seed: int = 0


@dataclass(frozen=True)
class Lesson:
    """A state and what is right in it."""

    seen: Observation
    vms: Ints
    vm: int  # the one that was taken
    place_pm: Ints
    place_features: Singles
    legal: Bools
    places: Ints  # right ones, as positions
    left: float  # what the exact flow still gains, in rewards (see `ppo`)


def lessons(policy: Policy, problem: Problem, settings: Settings, random: np.random.Generator) -> list[Lesson]:
    """Labelled states along one walk."""
    walk = Walk(problem)
    generator = torch.Generator().manual_seed(int(random.integers(2**31)))
    steps = int(random.integers(0, max(1, int(settings.walked * problem.limits.mnl)) + 1))
    observer = roll(policy, [walk], generator, Cut(), stop=lambda paths: walk.budget.moves >= steps)[0].observer
    master = Master(Pricer(walk.state, walk.valuation, replace(problem.limits, mnl=walk.budget.moves_left)))
    result = master.solve(Deadline(5.0))
    if result.flow is None or not result.flow.arriving:
        return []
    leaving, arriving = dict(result.flow.leaving), dict(result.flow.arriving)
    found = []
    while arriving:
        seen = observer.observe()
        vms, places = _right(walk, leaving, arriving, seen)
        if not len(vms):
            break
        vm = int(random.choice(vms))
        group, source = int(walk.cluster.vm_group[vm]), int(walk.state.vm_place[vm])
        options, features, legal = observer.places(vm)
        right = np.array([place for place in places[group] if legal[place - options.start]], dtype=np.int64)
        if not len(right):
            break
        place_pm = walk.cluster.place_pm[options.start : options.stop]
        left = (result.value - walk.value()) * REWARD_SCALE
        found.append(Lesson(seen, vms, vm, place_pm, features, legal, right - options.start, left))
        target = int(random.choice(right))
        walk.go(vm, target)
        observer.moved(vm, source, target)
        for counts, key in ((leaving, (group, source)), (arriving, (group, target))):
            counts[key] -= 1
            if not counts[key]:
                del counts[key]
    return found


def _right(walk: Walk, leaving: Counts, arriving: Counts, seen: Observation) -> tuple[Ints, dict[int, list[int]]]:
    """VMs of the flow that can go now and gain most at once, and per group the places where they gain it."""
    gains = walk.tables
    places: dict[int, list[int]] = {}
    best: dict[int, float] = {}
    for group, place in arriving:
        if walk.state.fits_at(group, place):
            worth = float(gains.arrive[group, place])
            if worth > best.get(group, -np.inf) + 1e-4:
                places[group], best[group] = [], worth
            if worth > best[group] - 1e-4:
                places[group].append(place)
    worths = {key: float(gains.leave[key]) + best[key[0]] for key in leaving if key[0] in places}
    most = -np.inf
    able: list[int] = []
    for key, worth in worths.items():
        if worth > most - 1e-4:
            vms = [vm for vm in walk.occupancy.at.get(key, ()) if seen.vm_mask[vm]]
            if vms and worth > most + 1e-4:
                able, most = [], worth
            able += vms
    return np.array(able, dtype=np.int64), places


def loss_of(policy: Policy, batch: list[Lesson]) -> tuple[Tensor, Tensor, Tensor]:
    """The three losses (VM, place, value), each averaged over the batch."""
    states = batch_of([lesson.seen for lesson in batch])
    vm_tokens, pm_tokens = policy.encode_all(states)
    scores, pms, values = policy.score(states, vm_tokens, pm_tokens)
    vm_log = torch.log_softmax(scores, dim=-1)
    pm, features, legal = stack(
        [lesson.place_pm for lesson in batch],
        [lesson.place_features for lesson in batch],
        [lesson.legal for lesson in batch],
    )
    chosen = torch.tensor([lesson.vm for lesson in batch])
    place_log = torch.log_softmax(policy.place_scores(states, vm_tokens, pms, chosen, pm, features, legal), dim=-1)
    vm_loss = -torch.stack([torch.logsumexp(vm_log[i, one.vms], 0) for i, one in enumerate(batch)]).mean()
    place_loss = -torch.stack([torch.logsumexp(place_log[i, one.places], 0) for i, one in enumerate(batch)]).mean()
    value_loss = ((values - torch.tensor([one.left for one in batch])) ** 2).mean()
    return vm_loss, place_loss, value_loss


def random_problem(settings: Settings, random: np.random.Generator) -> Problem:
    """A small mapping of random size and load, a random MNL and objective."""
    pms = int(random.integers(settings.pms[0], settings.pms[1] + 1))
    used = float(random.uniform(*settings.used))
    shape = replace(
        SHAPES["medium"],
        pms=pms,
        vms=int(pms * random.uniform(4.0, 9.0) * used / 0.88),
        used_share=used,
        candidates=int(random.integers(1, 5)),
        mem_gb_per_core=(2,) if random.random() < 0.8 else (2, 4, 8),
        churn=float(random.uniform(0.5, 2.0)),
    )
    mapping = generate(shape, int(random.integers(2**31)))
    return vary(Problem(mapping, parse_objective("fr"), Limits(1)), settings, random)


def vary(problem: Problem, settings: Settings, random: np.random.Generator) -> Problem:
    """The same mapping with another MNL and objective."""
    mnl = max(3, round(float(random.uniform(*settings.moves_per_pm)) * len(problem.mapping.pms)))
    return replace(problem, objective=parse_objective(str(random.choice(OBJECTIVES))), limits=Limits(mnl))


def distill(
    settings: Settings,
    out: Path,
    policy: Policy | None = None,
    report: Callable[[str], None] = print,
    before: dict[str, object] | None = None,
) -> Policy:
    """Train; a checkpoint goes to `out` every 100 updates. Deterministic by the seed on one thread."""
    torch.manual_seed(settings.seed)
    random = np.random.default_rng(settings.seed)
    policy = policy or Policy()
    optimiser = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
    annealed = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.updates)
    pool: list[Problem] = []
    stock: list[Lesson] = []  # the latest lessons, used several times each
    owed = 0
    started = time.monotonic()
    smooth = np.zeros(3)
    for update in range(1, settings.updates + 1):
        owed += settings.fresh
        while owed > 0 or len(stock) < 4 * settings.batch:
            if len(pool) < settings.pool:
                pool.append(random_problem(settings, random))
            problem = pool[int(random.integers(len(pool)))] if len(pool) == settings.pool else pool[-1]
            policy.eval()
            found = lessons(policy, vary(problem, settings, random), settings, random)
            stock += found
            owed -= len(found)
        del stock[: len(stock) - settings.kept]
        batch = [stock[int(row)] for row in random.integers(len(stock), size=settings.batch)]
        policy.train()
        vm_loss, place_loss, value_loss = loss_of(policy, batch)
        optimiser.zero_grad()
        (vm_loss + place_loss + settings.value_weight * value_loss).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        annealed.step()
        smooth = 0.95 * smooth + 0.05 * np.array([vm_loss.item(), place_loss.item(), value_loss.item()])
        if update % 50 == 0:
            losses = f"vm {smooth[0]:.3f} place {smooth[1]:.3f} value {smooth[2]:.4f}"
            report(f"update {update} {losses} {time.monotonic() - started:.0f} s")
        if update % 100 == 0 or update == settings.updates:
            record = {"algorithm": "distill", "updates": update, "seconds": round(time.monotonic() - started)}
            weights.save(policy, out, record | {"settings": settings.__dict__, "before": before})
    policy.eval()
    return policy
