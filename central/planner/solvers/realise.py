"""From counts to moves: which VM of a group goes where, and in what order, so that every move fits when it is made.

Logic: replay. At each step some arrival whose room exists is paired with a departure of the same group and with a VM
there that anti-affinity lets go to that place; which one is a matter of score and, after a failure, of chance (a new
order is a few milliseconds). If no order works, a cycle is broken by one extra move: a VM waits in a spare place.
Extra moves are allowed one more at a time, so no more are used than the search needed. What still cannot be done is
left out, and the plan is cut after its best prefix: the caller sees from `complete` that it fell short.
"""

from dataclasses import dataclass

import numpy as np

from central.planner.model.problem import Deadline, Step
from central.planner.solvers.greedy import Walk
from central.planner.solvers.grouped import Counts, Flow

TRIES = 24  # orders tried per number of extra moves
MOST_EXTRA = 6


@dataclass(frozen=True)
class Realised:
    """Steps are on the walk; this says how it went."""

    complete: bool
    extra: int


def realise(walk: Walk, flow: Flow, deadline: Deadline, seed: int, *, whole: bool = False) -> Realised:
    """Carry `flow` out on `walk`, which must be at the state the flow starts from.

    With `whole` it is all or nothing: a plan that makes room for something is worth nothing before its end.
    """
    random = np.random.default_rng(seed)
    base = len(walk.steps)
    best: list[tuple[int, int]] = []
    best_net = walk.net()
    for extra in range(min(MOST_EXTRA, max(0, walk.budget.moves_left - flow.moves)) + 1):
        for attempt in range(TRIES):
            complete, used = _attempt(walk, flow, extra, random if attempt else None, deadline)
            moves = [(vm, place) for _, (vm, _, place) in _tail(walk, base)]
            if complete and (whole or walk.value_needed is not None):
                return Realised(True, used)
            if not whole:
                net, count = _best_prefix(walk, base)
                if net > best_net + 1e-9 or (net > best_net - 1e-9 and count < len(best)):
                    best, best_net = moves[:count], net
            _rewind(walk, base)
            if complete:
                _replay(walk, best)
                return Realised(True, used)
            if deadline.over:
                break
        if deadline.over:
            break
    _replay(walk, best)
    return Realised(False, 0)


def _replay(walk: Walk, moves: list[tuple[int, int]]) -> None:
    for vm, place in moves:
        walk.go(vm, place)


def _rewind(walk: Walk, base: int) -> None:
    """Take back the steps after the first `base`."""
    while len(walk.steps) > base:
        walk.back()


def _best_prefix(walk: Walk, base: int) -> tuple[float, int]:
    """(net value, number of moves) of the best and shortest prefix beyond `base`; the walk stays as it is."""
    moves = [(vm, place) for _, (vm, _, place) in _tail(walk, base)]
    best, count = walk.net(), len(moves)
    for done in range(len(moves) - 1, -1, -1):
        walk.back()
        net = walk.net()
        if net >= best - 1e-9:
            best, count = net, done
    _replay(walk, moves)
    return best, count


def _tail(walk: Walk, base: int) -> list[tuple[Step, tuple[int, int, int]]]:
    """Steps beyond `base` with their (VM, from, to)."""
    count = len(walk.steps) - base
    return list(zip(walk.steps[base:], walk.state.history[len(walk.state.history) - count :], strict=True))


def _attempt(
    walk: Walk, flow: Flow, extra: int, random: np.random.Generator | None, deadline: Deadline
) -> tuple[bool, int]:
    """One try; (whether all of the flow was done, extra moves used)."""
    leaving, arriving = dict(flow.leaving), dict(flow.arriving)
    used = 0
    while arriving and not deadline.over:
        step = _next(walk, leaving, arriving, flow.leavers, random)
        if step is None:
            step = _spare(walk, leaving, arriving, flow.leavers, random) if used < extra else None
            if step is None:
                return False, used
            used += 1
        group, source, place, vm = step
        walk.go(vm, place)
        _less(leaving, (group, source))
        if (group, place) in arriving:
            _less(arriving, (group, place))
        else:
            leaving[group, place] = leaving.get((group, place), 0) + 1
    return not arriving, used


def _less(counts: Counts, key: tuple[int, int]) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


def _next(
    walk: Walk, leaving: Counts, arriving: Counts, leavers: frozenset[int], random: np.random.Generator | None
) -> tuple[int, int, int, int] | None:
    """(group, source, place, VM) of a move that can be made now. Departures that others wait for go first."""
    by_group: dict[int, list[int]] = {}
    for group, source in leaving:
        by_group.setdefault(group, []).append(source)
    waiting = {int(walk.cluster.place_pm[place]) for group, place in arriving if not walk.state.fits_at(group, place)}
    targets = list(arriving)
    if random is not None:
        random.shuffle(targets)
    fallback: tuple[int, int, int, int] | None = None
    for group, place in targets:
        sources = by_group.get(group, [])
        if random is not None:
            random.shuffle(sources)
        for source in sources:
            urgent = int(walk.cluster.place_pm[source]) in waiting
            if fallback is not None and not urgent:
                continue
            vm = _vm(walk, group, source, place, leavers)
            if vm is not None:
                if urgent:
                    return group, source, place, vm
                fallback = (group, source, place, vm)
    return fallback


def _vm(walk: Walk, group: int, source: int, place: int, leavers: frozenset[int]) -> int | None:
    """A VM of the group at `source` that may go to `place` now; one the flow names, or in few affinity sets."""
    able = [vm for vm in walk.occupancy.at.get((group, source), ()) if walk.may(vm, place)]
    return min(able, key=lambda vm: (vm not in leavers, len(walk.cluster.vm_sets[vm]))) if able else None


def _spare(
    walk: Walk, leaving: Counts, arriving: Counts, leavers: frozenset[int], random: np.random.Generator | None
) -> tuple[int, int, int, int] | None:
    """A move of a departing VM out of somebody's way, to a place nobody waits for."""
    waiting = {int(walk.cluster.place_pm[place]) for _, place in arriving}
    pending = [key for key in leaving if int(walk.cluster.place_pm[key[1]]) in waiting] or list(leaving)
    if random is not None:
        random.shuffle(pending)
    for group, source in pending:
        fits = np.flatnonzero(walk.state.fits(group)) + walk.cluster.group_places[group].start
        free = [place for place in fits.tolist() if int(walk.cluster.place_pm[place]) not in waiting]
        if random is not None:
            random.shuffle(free)
        for place in free[:50]:
            vm = _vm(walk, group, source, place, leavers)
            if vm is not None:
                return group, source, place, vm
    return None
