"""Filter-and-score greedy (VMR2L's baseline HA): at every step the one move that gains most, until none gains.

Logic: for each group the best place to leave plus the best place to arrive at (gains add up across PMs, so the best
pair needs no search over pairs), and moves inside one PM beside them; nothing breaks
ties, as in the baseline. `swap` builds on the same steps, with a tie-break.
"""

from itertools import permutations

import numpy as np

from central.planner.model.cluster import Cluster, Ints
from central.planner.model.problem import Deadline, Problem, Solution, Step
from central.planner.model.state import Floats, State, Valuation
from central.planner.solvers.budget import Budget
from central.planner.solvers.gains import Occupancy, inside_gain
from central.planner.solvers.tables import GainTables

LOOKED_AT = 12  # best places per side that are tried as pairs when a pair may be forbidden


class Walk:
    """A state, who is where, and the budget: what every step-by-step heuristic needs."""

    def __init__(self, problem: Problem, cluster: Cluster | None = None) -> None:
        self.problem = problem
        self.cluster = cluster or Cluster(problem.mapping, problem.limits.fixed)
        self.state = State(self.cluster)
        self.valuation = Valuation.of(problem.objective, self.cluster)
        self.occupancy = Occupancy(self.cluster)
        self.tables = GainTables(self.state, self.valuation)
        self.budget = Budget(problem.mapping, problem.limits)
        self.steps: list[Step] = []
        self.pairs: dict[tuple[int, bool], tuple[Ints, Ints]] = {}
        self.tie_break = 0.0  # weight of gathering fragments against one slot, far below 1: a real gain always wins
        goal = problem.objective.goal
        self.value_needed = None if goal is None else self.valuation.value_needed(goal) - 1e-9

    def fork(self) -> "Walk":
        """An independent walk that has made the same steps."""
        twin = object.__new__(Walk)
        twin.__dict__.update(self.__dict__)
        twin.state, twin.occupancy, twin.budget = self.state.copy(), self.occupancy.copy(), self.budget.copy()
        twin.tables = self.tables.copy(twin.state)
        twin.state.history = list(self.state.history)
        twin.steps = list(self.steps)
        return twin

    def value(self) -> float:
        """The value of the state as it is."""
        return self.valuation.value(self.cluster, self.state.free_cores, self.state.free_mem_mb)

    def inside_pairs(self, group: int) -> tuple[Ints, Ints]:
        """All pairs (source, target) of different places of the group's kind on one PM; found once per kind."""
        kind = self.cluster.group_kind[group]
        if kind not in self.pairs:
            places = self.cluster.group_places[group]
            by_pm: dict[int, list[int]] = {}
            for place in places:
                by_pm.setdefault(int(self.cluster.place_pm[place]), []).append(place)
            found = [pair for one in by_pm.values() for pair in permutations(one, 2)]
            array = np.array(found, dtype=np.int64).reshape(-1, 2)
            self.pairs[kind] = (array[:, 0], array[:, 1])
        return self.pairs[kind]

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
        self.tables.changed({int(self.cluster.place_pm[source]), int(self.cluster.place_pm[place])})
        self.steps.append(Step(vm, self.cluster.target(vm, place)))

    def back(self) -> None:
        """Take the last move back."""
        step = self.steps.pop()
        _, source, place = self.state.history[-1]
        self.state.undo()
        self.budget.spend(step.vm, int(self.cluster.place_pm[source]), int(self.cluster.place_pm[place]), -1)
        if self.cluster.vm_movable[step.vm]:
            self.occupancy.move(int(self.cluster.vm_group[step.vm]), step.vm, place, source)
        self.tables.changed({int(self.cluster.place_pm[source]), int(self.cluster.place_pm[place])})


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
        deadline.board.sketch(walk.steps)


def best_move(walk: Walk, least: float | None = None) -> tuple[int, int] | None:
    """(VM, place) of the legal move that gains most, by value plus tie-break; None if none gains more than `least`.

    By default a tie-break alone is no reason to move a VM.
    """
    if least is None:
        least = 0.5 * min(walk.valuation.coefficients)
    tables, state = walk.tables, walk.occupancy
    leave = np.where(state.count > 0, tables.leave + walk.tie_break * tables.gather_out, -np.inf)
    arrive = np.where(tables.fits, tables.arrive + walk.tie_break * tables.gather_in, -np.inf)
    if walk.problem.objective.cost_per_gb:
        leave -= walk.problem.objective.cost_per_gb * walk.cluster.group_mem_mb.sum(axis=1)[:, None] / 1024
    best: tuple[float, int, int] | None = None
    most = leave.max(axis=1, initial=-np.inf) + arrive.max(axis=1, initial=-np.inf)
    for group in np.argsort(-most, kind="stable").tolist():
        if most[group] > (best[0] if best else least):
            best = _across(walk, group, leave[group], arrive[group], best[0] if best else least) or best
        if leave[group].max(initial=-np.inf) > -np.inf:
            best = _inside(walk, group, leave[group], arrive[group], best[0] if best else least) or best
    return None if best is None else best[1:]


def _across(walk: Walk, group: int, leave: Floats, arrive: Floats, least: float) -> tuple[float, int, int] | None:
    """Best legal (gain, VM, place) between two PMs that gains more than `least`; leave and arrive are (P,)."""
    restricted = not walk.budget.only_mnl or bool(walk.cluster.set_members)
    limit = LOOKED_AT * (8 if restricted else 1)
    out_order, in_order = _top(leave, limit), _top(arrive, limit)
    best: tuple[float, int, int] | None = None
    for source in out_order:
        for place in in_order:
            gain = float(leave[source] + arrive[place])
            if not gain > (best[0] if best else least):
                break
            if walk.cluster.place_pm[source] == walk.cluster.place_pm[place]:
                continue
            vm = next((vm for vm in walk.occupancy.at[group, source] if walk.may(vm, place)), None)
            if vm is not None:
                best = (gain, vm, place)
                break
    return best


def _top(values: Floats, count: int) -> list[int]:
    """Positions of the `count` highest values that are not -inf, best first, ties by position."""
    if len(values) > 4 * count:
        threshold = np.partition(values, -count)[-count]
        chosen = np.flatnonzero(values >= threshold)
    else:
        chosen = np.arange(len(values))
    chosen = chosen[np.argsort(-values[chosen], kind="stable")][:count]
    return [int(one) for one in chosen if values[one] > -np.inf]


def _inside(walk: Walk, group: int, leave: Floats, arrive: Floats, least: float) -> tuple[float, int, int] | None:
    """Best legal (gain, VM, place) inside one PM that gains more than `least`."""
    sources, targets = walk.inside_pairs(group)
    if not len(sources):
        return None
    if walk.cluster.group_arity[group] == 1 and walk.valuation.by_node:
        gain = leave[sources] + arrive[targets]  # two nodes of one PM are then as independent as two PMs
    else:
        held = np.flatnonzero(walk.occupancy.count[group, sources] > 0)
        gain = np.full(len(sources), -np.inf)
        worth, fits = inside_gain(walk.state, walk.valuation, group, sources[held], targets[held])
        memory_gb = walk.cluster.group_mem_mb[group].sum() / 1024
        gain[held] = np.where(fits, worth - walk.problem.objective.cost_per_gb * memory_gb, -np.inf)
    for pair in _top(gain, LOOKED_AT):
        if not gain[pair] > least:
            return None
        source, place = int(sources[pair]), int(targets[pair])
        vm = next((vm for vm in walk.occupancy.at[group, source] if walk.may(vm, place)), None)
        if vm is not None:
            return float(gain[pair]), vm, place
    return None
