"""Filter-and-score greedy (VMR2L's baseline HA): at every step the one move that gains most, until none gains.

Logic: for each group the best place to leave plus the best place to arrive at (gains add up across PMs, so the best
pair needs no search over pairs), and moves inside one PM beside them; nothing breaks
ties, as in the baseline. `swap` builds on the same steps, with a tie-break.
"""

import numpy as np

from central.planner.model.cluster import Cluster
from central.planner.model.problem import Deadline, Problem, Solution, Step
from central.planner.model.state import Floats, State, Valuation
from central.planner.solvers.budget import Budget
from central.planner.solvers.gains import Occupancy, inside_gain, shift_gain

LOOKED_AT = 12  # best places per side that are tried as pairs when a pair may be forbidden


class Walk:
    """A state, who is where, and the budget: what every step-by-step heuristic needs."""

    def __init__(self, problem: Problem, cluster: Cluster | None = None) -> None:
        self.problem = problem
        self.cluster = cluster or Cluster(problem.mapping, problem.limits.fixed)
        self.state = State(self.cluster)
        self.valuation = Valuation.of(problem.objective, self.cluster)
        self.occupancy = Occupancy(self.cluster)
        self.budget = Budget(problem.mapping, problem.limits)
        self.steps: list[Step] = []
        self.tie_break = 0.0  # weight of `gathering` against one slot, far below 1: a real gain always wins
        goal = problem.objective.goal
        self.value_needed = None if goal is None else self.valuation.value_needed(goal) - 1e-9

    def fork(self) -> "Walk":
        """An independent walk that has made the same steps."""
        twin = object.__new__(Walk)
        twin.__dict__.update(self.__dict__)
        twin.state, twin.occupancy, twin.budget = self.state.copy(), self.occupancy.copy(), self.budget.copy()
        twin.state.history = list(self.state.history)
        twin.steps = list(self.steps)
        return twin

    def value(self) -> float:
        """The value of the state as it is."""
        return self.valuation.value(self.cluster, self.state.free_cores, self.state.free_mem_mb)

    def net(self) -> float:
        """Value less what the copied memory costs, if it costs anything."""
        return self.value() - self.problem.objective.cost_per_gb * self.budget.copied_bytes / 2**30

    def reached(self) -> bool:
        """Whether the goal, if there is one, is met."""
        return self.value_needed is not None and self.value() >= self.value_needed

    def may(self, vm: int, place: int) -> bool:
        """Whether the move is legal now: room, affinity, limits."""
        source, pm = int(self.state.vm_place[vm]), int(self.cluster.place_pm[place])
        if source == place or not self.state.fits_vm_at(vm, place):
            return False
        return self.state.allowed_at(vm, pm) and self.budget.allows(vm, int(self.cluster.place_pm[source]), pm)

    def go(self, vm: int, place: int) -> None:
        """Make a move that `may`."""
        source = int(self.state.vm_place[vm])
        self.budget.spend(vm, int(self.cluster.place_pm[source]), int(self.cluster.place_pm[place]))
        self.state.apply(vm, place)
        if self.cluster.vm_movable[vm]:  # a kept move of an earlier plan may be of a VM that must not move again
            self.occupancy.move(int(self.cluster.vm_group[vm]), vm, source, place)
        self.steps.append(Step(vm, self.cluster.target(vm, place)))

    def back(self) -> None:
        """Take the last move back."""
        step = self.steps.pop()
        _, source, place = self.state.history[-1]
        self.state.undo()
        self.budget.spend(step.vm, int(self.cluster.place_pm[source]), int(self.cluster.place_pm[place]), -1)
        if self.cluster.vm_movable[step.vm]:
            self.occupancy.move(int(self.cluster.vm_group[step.vm]), step.vm, place, source)

    def gathering(self, group: int, sign: int) -> Floats:
        """(places,) tie-break: growth of the sum of squared remainders (fragments gathered are nearer to a slot)."""
        cluster, term = self.cluster, self.valuation.terms[0]
        places = cluster.group_places[group]
        total: Floats = np.zeros(len(places))
        if not term.cores:
            return total
        for part in range(int(cluster.group_arity[group])):
            free = self.state.free_cores[cluster.place_nodes[places.start : places.stop, part]]
            after = (free + sign * cluster.group_cores[group, part]) % term.cores
            total += (after.astype(float) ** 2 - (free % term.cores).astype(float) ** 2) / term.cores**2
        return self.tie_break * total


def greedy(problem: Problem, deadline: Deadline, seed: int) -> Solution:
    """Best single move, again and again. Deterministic: `seed` is not used."""
    del seed
    walk = Walk(problem)
    descend(walk, deadline)
    return Solution(tuple(walk.steps))


def descend(walk: Walk, deadline: Deadline) -> None:
    """Greedy moves on `walk` until none gains, the goal is met, or time or moves are used up."""
    while walk.budget.moves_left > 0 and not deadline.over and not walk.reached():
        found = best_move(walk)
        if found is None:
            return
        walk.go(*found)


def best_move(walk: Walk, least: float | None = None) -> tuple[int, int] | None:
    """(VM, place) of the legal move that gains most, by value plus tie-break; None if none gains more than `least`.

    By default a tie-break alone is no reason to move a VM.
    """
    if least is None:
        least = 0.5 * min(walk.valuation.coefficients)
    best: tuple[float, int, int] | None = None
    for group in range(walk.cluster.groups):
        sources = walk.occupancy.places(group)
        places = walk.cluster.group_places[group]
        if not len(sources) or not len(places):
            continue
        leave = shift_gain(walk.state, walk.valuation, group, 1) + walk.gathering(group, 1)
        arrive = shift_gain(walk.state, walk.valuation, group, -1) + walk.gathering(group, -1)
        arrive = np.where(walk.state.fits(group), arrive, -np.inf)
        leave = leave[sources - places.start]
        if walk.problem.objective.cost_per_gb:
            leave = leave - walk.problem.objective.cost_per_gb * walk.cluster.group_mem_mb[group].sum() / 1024
        if best is not None and leave.max() + arrive.max(initial=-np.inf) <= best[0]:
            candidate = _inside(walk, group, best[0])
        else:
            candidate = _across(walk, group, leave, arrive, best[0] if best else least)
            inside = _inside(walk, group, candidate[0] if candidate else (best[0] if best else least))
            candidate = inside or candidate
        if candidate is not None and (best is None or candidate[0] > best[0]):
            best = candidate
    return None if best is None else best[1:]


def _across(walk: Walk, group: int, leave: Floats, arrive: Floats, least: float) -> tuple[float, int, int] | None:
    """Best legal (gain, VM, place) between two PMs that gains more than `least`."""
    sources = walk.occupancy.places(group)
    start = walk.cluster.group_places[group].start
    out_order = np.argsort(-leave, kind="stable")
    in_order = np.argsort(-arrive, kind="stable")
    restricted = not walk.budget.only_mnl or bool(walk.cluster.set_members)
    limit = LOOKED_AT * (8 if restricted else 1)
    best: tuple[float, int, int] | None = None
    for i in out_order[:limit]:
        source = int(sources[i])
        for j in in_order[:limit]:
            gain = float(leave[i] + arrive[j])
            if gain <= (best[0] if best else least):
                break
            place = start + int(j)
            if walk.cluster.place_pm[source] == walk.cluster.place_pm[place]:
                continue
            vm = next((vm for vm in walk.occupancy.at[group, source] if walk.may(vm, place)), None)
            if vm is not None:
                best = (gain, vm, place)
                break
    return best


def _inside(walk: Walk, group: int, least: float) -> tuple[float, int, int] | None:
    """Best legal (gain, VM, place) inside one PM that gains more than `least`."""
    sources, targets = inside_pairs(walk, group)
    if not len(sources):
        return None
    gain, fits = inside_gain(walk.state, walk.valuation, group, sources, targets)
    gain = np.where(fits, gain, -np.inf)
    for i in np.argsort(-gain, kind="stable")[:LOOKED_AT]:
        if gain[i] <= least:
            return None
        vm = next(
            (vm for vm in walk.occupancy.at[group, int(sources[i])] if walk.may(vm, int(targets[i]))),
            None,
        )
        if vm is not None:
            return float(gain[i]), vm, int(targets[i])
    return None


def inside_pairs(walk: Walk, group: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]:
    """Pairs (source, target) of places on one PM for the group's movable VMs."""
    cluster = walk.cluster
    sources = walk.occupancy.places(group)
    places = cluster.group_places[group]
    first = np.searchsorted(cluster.place_pm[places.start : places.stop], cluster.place_pm[sources], "left")
    last = np.searchsorted(cluster.place_pm[places.start : places.stop], cluster.place_pm[sources], "right")
    pairs = [
        (int(source), places.start + other)
        for source, low, high in zip(sources, first, last, strict=True)
        if high - low > 1
        for other in range(int(low), int(high))
        if places.start + other != source
    ]
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]
