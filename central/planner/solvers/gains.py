"""What taking one VM of a group away from a place, or putting one there, is worth: all places at once.

Gains are in units of `Valuation.value`. Out and in gains add up as long as the two places are on different PMs; moves
inside one PM are valued together (`inside`).
"""

import numpy as np

from central.planner.model.cluster import Bools, Cluster, Ints
from central.planner.model.state import Floats, State, Valuation


def shift_gain(state: State, valuation: Valuation, group: int, sign: int) -> Floats:
    """(places of the group's kind,) value gained when one VM of the group leaves (+1) or arrives (-1) there.

    Arrivals where it does not fit have a meaningless gain: mask with `State.fits`.
    """
    cluster = state.cluster
    places = cluster.group_places[group]
    nodes = cluster.place_nodes[places.start : places.stop]
    if valuation.by_node:
        gain: Floats = np.zeros(len(places))
        before = valuation.node_value(state.free_cores, state.free_mem_mb)
        for part in range(int(cluster.group_arity[group])):
            node = nodes[:, part]
            cores = state.free_cores[node] + sign * cluster.group_cores[group, part]
            mem_mb = state.free_mem_mb[node] + sign * cluster.group_mem_mb[group, part]
            gain += valuation.node_value(cores, mem_mb) - before[node]
        return gain
    changes = [(nodes, group, sign)]
    return _rows_value(state, valuation, cluster.place_pm[places.start : places.stop], changes) - _rows_value(
        state, valuation, cluster.place_pm[places.start : places.stop], []
    )


def inside_gain(state: State, valuation: Valuation, group: int, source: Ints, target: Ints) -> tuple[Floats, Bools]:
    """Gains and feasibility of moves inside one PM: (K,) from places `source` to places `target`, pairwise."""
    cluster = state.cluster
    pms = cluster.place_pm[source]
    changes = [(cluster.place_nodes[source], group, 1), (cluster.place_nodes[target], group, -1)]
    gain = _rows_value(state, valuation, pms, changes) - _rows_value(state, valuation, pms, [])
    cores, mem_mb = _rows(state, pms, changes)
    fits: Bools = np.logical_and((cores >= 0).all(axis=1), (mem_mb >= 0).all(axis=1))
    return gain, fits


def _rows(state: State, pms: Ints, changes: list[tuple[Ints, int, int]]) -> tuple[Ints, Ints]:
    """(K, nodes per PM) free cores and memory of PMs after changes; padding reads 0."""
    cluster = state.cluster
    nodes = cluster.pm_nodes[pms]
    cores = np.where(nodes >= 0, state.free_cores[nodes], 0)
    mem_mb = np.where(nodes >= 0, state.free_mem_mb[nodes], 0)
    for changed, group, sign in changes:
        for part in range(int(cluster.group_arity[group])):
            hit = nodes == changed[:, part, None]
            cores = cores + sign * hit * cluster.group_cores[group, part]
            mem_mb = mem_mb + sign * hit * cluster.group_mem_mb[group, part]
    return cores, mem_mb


def _rows_value(state: State, valuation: Valuation, pms: Ints, changes: list[tuple[Ints, int, int]]) -> Floats:
    cores, mem_mb = _rows(state, pms, changes)
    return rows_value(valuation, cores, mem_mb)


def rows_value(valuation: Valuation, cores: Ints, mem_mb: Ints) -> Floats:
    """(K,) value of K PMs given what is free on their nodes, (K, nodes per PM)."""
    total: Floats = valuation.node_value(cores, mem_mb).sum(axis=1)
    for term, coefficient in zip(valuation.terms, valuation.coefficients, strict=True):
        if term.nodes > 1:
            fit = np.minimum(
                cores // term.cores if term.cores else np.iinfo(np.int64).max,
                mem_mb // term.mem_mb if term.mem_mb else np.iinfo(np.int64).max,
            )
            for count in range(1, int(fit.max(initial=0)) + 1):
                total += coefficient * (np.minimum(fit, count).sum(axis=1) >= term.nodes * count)
    return total


class Occupancy:
    """Which movable VMs of a group are at a place, kept while a solver moves them."""

    def __init__(self, cluster: Cluster) -> None:
        self.at: dict[tuple[int, int], list[int]] = {}
        self.count: Ints = np.zeros((cluster.groups, len(cluster.place_pm)), dtype=np.int64)
        for vm in np.flatnonzero(cluster.vm_movable).tolist():
            group, place = int(cluster.vm_group[vm]), int(cluster.vm_place[vm])
            self.at.setdefault((group, place), []).append(vm)
            self.count[group, place] += 1

    def copy(self) -> "Occupancy":
        """An independent one with the same content."""
        twin = object.__new__(Occupancy)
        twin.at = {key: list(vms) for key, vms in self.at.items()}
        twin.count = self.count.copy()
        return twin

    def move(self, group: int, vm: int, source: int, target: int) -> None:
        """Note a move."""
        self.at[group, source].remove(vm)
        if not self.at[group, source]:
            del self.at[group, source]
        self.at.setdefault((group, target), []).append(vm)
        self.count[group, source] -= 1
        self.count[group, target] += 1

    def places(self, group: int) -> Ints:
        """Places with at least one movable VM of the group, ascending."""
        return np.flatnonzero(self.count[group])
