"""Gains of every departure and arrival as tables, kept true move by move: an update is for the two PMs of a move.

With them the best move is a look-up instead of a pass over the cluster, and the policy's features come from the same
tables.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from central.planner.model.cluster import Bools, Ints
from central.planner.model.state import Floats, State, Valuation
from central.planner.solvers.gains import rows_value

Singles = npt.NDArray[np.float32]


class GainTables:
    """Tables (G, P): per group and place, meaningful where the place is of the group's kind (`kind`).

    Attributes:
        leave, arrive: value gained when one VM of the group leaves or arrives there.
        gather_out, gather_in: growth of the sum of squared remainders then, in units of a squared slot.
        fits: whether one more of the group fits there.
    """

    def __init__(self, state: State, valuation: Valuation) -> None:
        cluster = state.cluster
        self.state, self.cluster, self.valuation = state, cluster, valuation
        self.slot_cores = max(1, valuation.terms[0].cores or 16)
        shape = (cluster.groups, len(cluster.place_pm))
        self.kind: Bools = np.zeros(shape, dtype=np.bool_)
        for group, places in enumerate(cluster.group_places):
            self.kind[group, places.start : places.stop] = True
        self.leave, self.arrive = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
        self.gather_out, self.gather_in = np.zeros_like(self.leave), np.zeros_like(self.leave)
        self.fits: Bools = np.zeros(shape, dtype=np.bool_)
        order = np.argsort(cluster.place_pm, kind="stable")
        bounds = np.searchsorted(cluster.place_pm[order], np.arange(len(cluster.mapping.pms) + 1))
        self.places_of = [order[first:last] for first, last in pairwise(bounds)]
        self._update(np.arange(len(cluster.place_pm)))

    def copy(self, state: State) -> "GainTables":
        """The same tables for a copy of the state."""
        twin = object.__new__(GainTables)
        twin.__dict__.update(self.__dict__)
        twin.state = state
        twin.leave, twin.arrive, twin.fits = self.leave.copy(), self.arrive.copy(), self.fits.copy()
        twin.gather_out, twin.gather_in = self.gather_out.copy(), self.gather_in.copy()
        return twin

    def changed(self, pms: Iterable[int]) -> None:
        """Bring the tables up to date after moves that touched these PMs."""
        self._update(np.concatenate([self.places_of[pm] for pm in pms]))

    def _update(self, places: Ints) -> None:
        state, cluster = self.state, self.cluster
        nodes = cluster.place_nodes[places]  # (K, A)
        held = nodes >= 0
        free = np.where(held, state.free_cores[nodes], 0)
        mem = np.where(held, state.free_mem_mb[nodes], 0)
        need, need_mem = cluster.group_cores[:, None, :], cluster.group_mem_mb[:, None, :]  # (G, 1, A)
        self.fits[:, places] = self.kind[:, places] & ((free >= need) & (mem >= need_mem)).all(axis=2)
        rest = (free % self.slot_cores).astype(float) ** 2
        before = self.valuation.node_value(free, mem)
        for sign, gain, gather in ((1, self.leave, self.gather_out), (-1, self.arrive, self.gather_in)):
            after, after_mem = free + sign * need, mem + sign * need_mem
            squared = (after % self.slot_cores).astype(float) ** 2
            gather[:, places] = np.where(held, squared - rest, 0.0).sum(axis=2) / self.slot_cores**2
            if self.valuation.by_node:
                worth = self.valuation.node_value(after, after_mem) - before
                gain[:, places] = np.where(held, worth, 0.0).sum(axis=2)
            else:
                gain[:, places] = self._whole_pm(places, nodes, sign)

    def _whole_pm(self, places: Ints, nodes: Ints, sign: int) -> Floats:
        """(G, K) gains where terms span nodes: the whole PM has to be valued."""
        state, cluster = self.state, self.cluster
        all_nodes = cluster.pm_nodes[cluster.place_pm[places]]  # (K, nodes per PM)
        held = all_nodes >= 0
        cores = np.where(held, state.free_cores[all_nodes], 0)
        mem_mb = np.where(held, state.free_mem_mb[all_nodes], 0)
        before = rows_value(self.valuation, cores, mem_mb)
        gain: Floats = np.zeros((cluster.groups, len(places)))
        for group in range(cluster.groups):
            after, after_mem = cores, mem_mb
            for part in range(int(cluster.group_arity[group])):
                hit = all_nodes == nodes[:, part, None]
                after = after + sign * hit * cluster.group_cores[group, part]
                after_mem = after_mem + sign * hit * cluster.group_mem_mb[group, part]
            gain[group] = rows_value(self.valuation, after, after_mem) - before
        return gain
