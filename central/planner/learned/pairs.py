"""What two moves at one place are worth together: the policy's look-ahead.

A slot often takes two moves: two VMs leave a node, or one leaves and another size takes its room. A single move of such
a pair gains nothing, so no gain of one move shows it. These tables do, for all places at once, and like `GainTables`
an update is for the two PMs of a move.

Logic: for two groups of one kind (see `cluster`), at every place of that kind,
    both[a, b]  value gained when one VM of a and one of b leave; NONE unless such VMs are there
    turn[a, b]  value gained when one of a leaves and one of b arrives; NONE unless a is there and b then fits
What a VM of a would gain with the best partner follows from the best places the partners have elsewhere.
"""

from collections.abc import Iterable

import numpy as np

from central.planner.model.cluster import Bools, Ints
from central.planner.model.state import Floats, State, Valuation
from central.planner.solvers.gains import Occupancy, rows_value
from central.planner.solvers.tables import Singles
from fabricpilot.errors import UsageError

MOST_ENTRIES = 4_000_000  # of one table: some 100 MB with what building it takes, and every trajectory has its own
NONE = -4.0  # stands for the gain of what cannot be done


class Pairs:
    """The tables, one pair of them per kind of group: (groups of the kind, groups of the kind, places of the kind)."""

    def __init__(self, state: State, valuation: Valuation, occupancy: Occupancy) -> None:
        cluster = state.cluster
        self.state, self.cluster, self.valuation, self.occupancy = state, cluster, valuation, occupancy
        self.groups: list[Ints] = []
        self.places: list[range] = []
        for alike in sorted(set(cluster.group_kind)):
            self.groups.append(np.array([g for g, own in enumerate(cluster.group_kind) if own == alike]))
            self.places.append(cluster.group_places[int(self.groups[-1][0])])
        shapes = [(len(g), len(g), len(p)) for g, p in zip(self.groups, self.places, strict=True)]
        if sum(a * b * places for a, b, places in shapes) > MOST_ENTRIES:
            raise UsageError(
                f"the policy compares every two VM sizes, and {cluster.groups} sizes on {len(cluster.place_pm)} places "
                "are too many for it: use another solver, such as auto"
            )
        self.both: list[Singles] = [np.full(shape, NONE, dtype=np.float32) for shape in shapes]
        self.turn: list[Singles] = [np.full(shape, NONE, dtype=np.float32) for shape in shapes]
        for kind, places in enumerate(self.places):
            self._update(kind, np.arange(places.start, places.stop))

    def copy(self, state: State, occupancy: Occupancy) -> "Pairs":
        """The same tables for a copy of the state."""
        twin = object.__new__(Pairs)
        twin.__dict__.update(self.__dict__)
        twin.state, twin.occupancy = state, occupancy
        twin.both, twin.turn = [one.copy() for one in self.both], [one.copy() for one in self.turn]
        return twin

    def changed(self, places: Ints) -> None:
        """Bring the tables up to date at these places."""
        for kind, own in enumerate(self.places):
            mine = places[(places >= own.start) & (places < own.stop)]
            if len(mine):
                self._update(kind, mine)

    def _update(self, kind: int, places: Ints) -> None:
        groups = self.groups[kind]
        if not len(places):
            return
        window = places - self.places[kind].start
        there = self.occupancy.count[groups][:, places]  # (G, K)
        alone = self._after([(groups[:, None, None], 1), (groups[None, :, None], 1)], places)[0]
        enough = (there[:, None] > 0) & (there[None, :] > 0)
        own = np.arange(len(groups))
        enough[own, own] = there > 1
        self.both[kind][:, :, window] = np.where(enough, alone, NONE)
        turned, fits = self._after([(groups[:, None, None], 1), (groups[None, :, None], -1)], places)
        self.turn[kind][:, :, window] = np.where((there[:, None] > 0) & fits, turned, NONE)

    def _after(self, changes: Iterable[tuple[Ints, int]], places: Ints) -> tuple[Floats, Bools]:
        """Gain (G, G, K) when groups leave (+1) and arrive (-1) at the places, and whether that fits."""
        cluster, state = self.cluster, self.state
        nodes = cluster.pm_nodes[cluster.place_pm[places]]  # (K, nodes per PM)
        held = nodes >= 0
        cores: Ints = np.where(held, state.free_cores[nodes], 0)
        mem_mb: Ints = np.where(held, state.free_mem_mb[nodes], 0)
        before = rows_value(self.valuation, cores, mem_mb)
        for group, sign in changes:
            for part in range(cluster.group_cores.shape[1]):
                hit = (nodes == cluster.place_nodes[places, part, None]) & held
                cores = cores + sign * hit * cluster.group_cores[group, part][..., None]
                mem_mb = mem_mb + sign * hit * cluster.group_mem_mb[group, part][..., None]
        fits: Bools = np.logical_and((cores >= 0).all(axis=-1), (mem_mb >= 0).all(axis=-1))
        size = cores.shape[-1]
        worth = rows_value(self.valuation, cores.reshape(-1, size), mem_mb.reshape(-1, size)).reshape(fits.shape)
        return worth - before, fits

    def leaving(self, best_in: Floats, best_out: Floats) -> tuple[Singles, Singles]:
        """(G, P) each: what follows when a VM of the group leaves the place and the best second move there is made.

        First table: another VM leaves too; second: another size arrives. `best_in`, `best_out` (G,): what arriving and
        leaving is worth at the best place for each group. What the first VM gains where it arrives is not counted.
        """
        shape = (self.cluster.groups, len(self.cluster.place_pm))
        both, turn = np.full(shape, NONE, dtype=np.float32), np.full(shape, NONE, dtype=np.float32)
        for groups, places, two, swapped in zip(self.groups, self.places, self.both, self.turn, strict=True):
            window = slice(places.start, places.stop)
            partner_in = best_in[groups].astype(np.float32)[None, :, None]
            partner_out = best_out[groups].astype(np.float32)[None, :, None]
            both[groups, window] = np.maximum((two + partner_in).max(axis=1), NONE)
            turn[groups, window] = np.maximum((swapped + partner_out).max(axis=1), NONE)
        return both, turn

    def arriving(self, group: int, best_in: Floats) -> Singles:
        """(places of the group's kind,) what follows when one of the group arrives and the best other one leaves."""
        for groups, swapped in zip(self.groups, self.turn, strict=True):
            at = np.flatnonzero(groups == group)
            if len(at):
                worth = swapped[:, int(at[0])] + best_in[groups].astype(np.float32)[:, None]
                result: Singles = np.maximum(worth.max(axis=0), NONE)
                return result
        raise IndexError(f"no group {group}")
