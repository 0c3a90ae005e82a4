"""Patterns: what one PM takes in and gives away, as a column of the master program in `columns`; and finding good ones.

A pattern has a gain (slots, less what copying costs) and enters the equations that tie PMs together. These, in order,
are the rows of `Ties`: one per group (as many VMs arrive as leave), the moves, the MB copied, the moves per tenant. At
given prices of these rows (duals) `Pricer.price` finds every PM's best pattern exactly (`pricing`), and with them the
Lagrange bound: the rows' limits times their prices, plus the sum of the PMs' best.

A cap on the moves of one PM is that PM's own business, but no part of its knapsack: a pattern with too many moves is
sought anew with a fine on every move until it has few enough; as fines pass over some patterns, those of one move are
looked at one by one. The bound then is that without the cap.

Memory is left out of the patterns at first, which is several times faster; it comes in when a term asks for it or a
pattern was found that does not fit it. The bound stays valid: leaving a constraint out can only raise it.
"""

from collections.abc import Sequence

import numpy as np

from central.planner.model.cluster import Bools, Cluster, Ints
from central.planner.model.problem import Deadline, Limits
from central.planner.model.state import Floats, State, Valuation
from central.planner.solvers.budget import Budget
from central.planner.solvers.gains import rows_value
from central.planner.solvers.grouped import Counts, Flow, net_flow
from central.planner.solvers.program import INFINITY
from central.planner.solvers.tables import GainTables
from central.planner.solvers.ties import Pattern, Ties

BETTER = 1e-6  # a pattern must beat the dual of its PM by this much to be worth a column
MOST_LEVELS = 256  # cores, and units of memory, per node: the knapsacks grow with their product
FINES = (0.1, 0.25, 0.4, 0.55, 0.75, 1.0, 2.0)  # slots per move, for PMs with a cap
CHUNK = 128  # PMs priced between two looks at the clock, fewer with memory

Leaving = dict[tuple[int, int], list[int]]  # (group, place) -> VMs that may leave, in the order in which they do


def applies(cluster: Cluster, valuation: Valuation) -> bool:
    """Whether the decomposition by PM holds for this cluster and objective."""
    shapes = all(arity == 1 or (arity == 2 and alike) for arity, alike in cluster.group_kind)
    terms = all(term.nodes <= 2 for term in valuation.terms) and sum(t.nodes == 2 for t in valuation.terms) <= 1
    small = cluster.pm_nodes.shape[1] <= 2 and int(cluster.node_cores.max(initial=0)) <= MOST_LEVELS
    sized = bool((cluster.group_cores[:, 0] > 0).all())
    measured = not any(term.mem_mb for term in valuation.terms) or memory_levels(cluster) <= MOST_LEVELS
    return shapes and terms and small and sized and measured


def memory_unit_mb(cluster: Cluster) -> int:
    """The largest amount of which every VM's memory per node is a multiple."""
    return max(1, int(np.gcd.reduce(cluster.group_mem_mb.ravel())) if cluster.group_mem_mb.size else 1)


def memory_levels(cluster: Cluster) -> int:
    """Units of memory on the largest node."""
    return int(cluster.node_mem_mb.max(initial=0)) // memory_unit_mb(cluster)


class Pricer:
    """Best patterns of the PMs of one state at given prices."""

    def __init__(
        self,
        state: State,
        valuation: Valuation,
        limits: Limits,
        spent: Budget | None = None,
        cost_per_gb: float = 0.0,
    ) -> None:
        """Look at every PM.

        Args:
            state: where everything is.
            valuation: what slots are worth.
            limits: what is still allowed from this state on; caps per PM and tenant as they were at the start.
            spent: what the moves before this state have used up of those caps.
            cost_per_gb: value taken off per GB of memory copied.
        """
        self.state, self.cluster, self.valuation = state, state.cluster, valuation
        self.ties = Ties(self.cluster, limits, spent)
        self.cost_per_mb = cost_per_gb / 1024
        cluster = self.cluster
        active = np.zeros(len(cluster.mapping.pms), dtype=np.bool_)
        active[cluster.node_pm[cluster.node_active]] = True
        self.pms: Ints = np.flatnonzero(active)
        self.cap: Ints | None = None
        if limits.per_pm is not None:
            used = [spent.per_pm[pm] if spent else 0 for pm in range(len(active))]
            self.cap = np.maximum(0, limits.per_pm - np.array(used, dtype=np.int64))
        self.single = np.array([g for g, (n, _) in enumerate(cluster.group_kind) if n == 1], dtype=np.int64)
        self.pair = np.array([g for g, (n, _) in enumerate(cluster.group_kind) if n == 2], dtype=np.int64)
        self.group_mem: Ints = cluster.group_mem_mb.sum(axis=1)
        self.single_mem, self.pair_mem = cluster.group_mem_mb[self.single, 0], cluster.group_mem_mb[self.pair, 0]
        self._vms()
        self._terms()
        self.too_large = 0  # patterns met that do not fit in memory
        self.seen: set[bytes] = set()
        self.alone: tuple[Ints, Ints, Floats, Bools] | None = None

    def _vms(self) -> None:
        """Free room, and which VMs may leave where: `outs` (M, 2, A) and `pair_outs` (M, B) count them."""
        cluster, state = self.cluster, self.state
        pms = len(cluster.mapping.pms)
        nodes = np.full((pms, 2), -1, dtype=np.int64)
        nodes[:, : cluster.pm_nodes.shape[1]] = cluster.pm_nodes
        self.nodes = nodes
        self.free = np.where(nodes >= 0, state.free_cores[nodes], 0)
        self.mem = np.where(nodes >= 0, state.free_mem_mb[nodes], 0)
        self.outs = np.zeros((pms, 2, len(self.single)), dtype=np.int64)
        self.pair_outs = np.zeros((pms, len(self.pair)), dtype=np.int64)
        self.taken, self.taken_mem = np.zeros(pms, dtype=np.int64), np.zeros(pms, dtype=np.int64)
        position = np.zeros(cluster.groups, dtype=np.int64)
        position[self.single], position[self.pair] = np.arange(len(self.single)), np.arange(len(self.pair))
        placed = np.flatnonzero(state.vm_place >= 0)
        group, place = cluster.vm_group[placed], state.vm_place[placed]
        pm = cluster.place_pm[place]
        side = cluster.place_nodes[place, 0] - cluster.pm_nodes[pm, 0]
        two = cluster.group_arity[group] == 2
        np.add.at(self.taken, pm[two], cluster.group_cores[group[two], 0])
        np.add.at(self.taken_mem, pm[two], cluster.group_mem_mb[group[two], 0])
        one, both = ~two & cluster.vm_movable[placed], two & cluster.vm_movable[placed]
        # Where a movable VM counts: (VM, index into outs) and likewise for pairs.
        self.single_vms, self.pair_vms = placed[one], placed[both]
        self.single_at = (pm[one], side[one], position[group[one]])
        self.pair_at = (pm[both], position[group[both]])
        np.add.at(self.outs, self.single_at, 1)
        np.add.at(self.pair_outs, self.pair_at, 1)

    def _terms(self) -> None:
        terms = list(zip(self.valuation.terms, self.valuation.coefficients, strict=True))
        one = [(t, c) for t, c in terms if t.nodes == 1]
        both = [(t.cores, t.mem_mb, c) for t, c in terms if t.nodes == 2]
        self.terms = (
            np.array([t.cores for t, _ in one], dtype=np.int64),
            np.array([t.mem_mb for t, _ in one], dtype=np.int64),
            np.array([c for _, c in one], dtype=float),
            *(both[0] if both else (0, 0, 0.0)),
        )
        self.by_memory = any(t.mem_mb for t, _ in terms)

    def _held(self) -> tuple[object, ...]:
        """`held`, `vms` and `groups` as `pricing.price_all` wants them; memory in units, or left out."""
        cluster, nodes = self.cluster, self.nodes
        unit = memory_unit_mb(cluster) if self.by_memory else 1 << 60
        cap = np.where(nodes >= 0, cluster.node_cores[nodes], 0)
        mem = np.where(nodes >= 0, cluster.node_mem_mb[nodes], 0)
        taken = self.taken[:, None]
        exists = nodes >= 0
        room = np.where(exists, self.free + taken, 0)
        # Memory beyond whole units differs by node only through its size: every VM holds whole units.
        held = (
            cap, mem // unit, mem % unit, room, np.where(exists, (self.mem + self.taken_mem[:, None]) // unit, 0),
            self.taken, self.taken_mem // unit, unit,
        )  # fmt: skip
        groups = (
            cluster.group_cores[self.single, 0], self.single_mem // unit,
            cluster.group_cores[self.pair, 0], self.pair_mem // unit,
        )  # fmt: skip
        return held, (self.outs, self.pair_outs), groups

    def _prices(self, duals: Floats, fine: float) -> tuple[Floats, Floats, Floats, Floats]:
        """Incomes and costs for `pricing.price_all` with a fine on every departure and arrival."""
        groups = self.cluster.groups
        cost = duals[:groups] + duals[groups] + (duals[groups + 1] + self.cost_per_mb) * self.group_mem + fine
        price = duals[:groups] - fine
        income = self._incomes(price[self.single], self.single_vms, self.single_at, self.outs, duals)
        pair_income = self._incomes(price[self.pair], self.pair_vms, self.pair_at, self.pair_outs, duals)
        return income, cost[self.single], pair_income, cost[self.pair]

    def _incomes(self, price: Floats, vms: Ints, at: tuple[Ints, ...], outs: Ints, duals: Floats) -> Floats:
        """(*outs.shape, K): a VM whose tenant's moves are dear brings less, and leaves after others of its group."""
        if not self.ties.tenant_row or not outs.size:
            return np.ascontiguousarray(np.broadcast_to(price, outs.shape)[..., None])
        result = np.ascontiguousarray(np.broadcast_to(price[..., None], (*outs.shape, max(1, int(outs.max())))))
        order, rank = self._by_price(vms, at, duals)
        result[(*(one[order] for one in at), rank)] -= self._tenant_price(vms[order], duals)
        return result

    def _by_price(self, vms: Ints, at: tuple[Ints, ...], duals: Floats) -> tuple[Ints, Ints]:
        """Order of `vms` by where they are and then by price of their tenant; and the rank of each among its like."""
        where = np.ravel_multi_index(at, self.outs.shape if len(at) == 3 else self.pair_outs.shape)
        order = np.lexsort((self._tenant_price(vms, duals), where))
        sorted_where = where[order]
        first = np.concatenate([[True], sorted_where[1:] != sorted_where[:-1]]) if len(order) else np.zeros(0, np.bool_)
        start = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0)) if len(order) else order
        return order, np.arange(len(order)) - start

    def _tenant_price(self, vms: Ints, duals: Floats) -> Floats:
        rows = self.ties.row_of_vm[vms]
        price: Floats = np.where(rows >= 0, duals[np.maximum(rows, 0)], 0.0)
        return price

    def price(self, duals: Floats, deadline: Deadline) -> tuple[float, list[Pattern]]:
        """(Lagrange bound at these prices, patterns worth having); the bound is infinite if time was up before."""
        best: Floats = np.zeros(len(self.pms))
        found: list[Pattern] = []
        leaving = self._leaving_order(duals)
        rows = np.arange(len(self.pms))
        for fine in (0.0, *(FINES if self.cap is not None else ())):
            patterns, done = self._best(rows, duals, fine, deadline)
            if not done:
                return INFINITY, found
            if fine == 0.0:
                best = np.maximum(patterns[:, 0], 0.0)
            over = np.zeros(len(rows), dtype=np.bool_)
            for row in np.flatnonzero(patterns[:, 0] > BETTER):
                pm = int(self.pms[rows[row]])
                counts = patterns[row, 2:].astype(np.int64)
                if self.cap is not None and self._moves(counts) > self.cap[pm]:
                    over[row] = True
                    continue
                pattern = self._pattern(pm, counts, float(patterns[row, 1]), leaving)
                if pattern is not None:
                    found.append(pattern)
            rows = rows[over]
            if not len(rows):
                break
        if self.cap is not None:
            found += self._single_moves(duals, leaving)
        return self.ties.worth(duals) + float(best.sum()), found

    def _single_moves(self, duals: Floats, leaving: Leaving | None) -> list[Pattern]:
        """Patterns of one departure or arrival that are worth having, of PMs that may have a move."""
        assert self.cap is not None
        if self.alone is None:
            self.alone = self._alone()
        pm, index, gain, into = self.alone
        a, b = len(self.single), len(self.pair)
        group = np.where(index < 4 * a, self.single[index % a] if a else 0, self.pair[(index - 4 * a) % b] if b else 0)
        groups = self.cluster.groups
        arrival = duals[:groups] + duals[groups] + (duals[groups + 1] + self.cost_per_mb) * self.group_mem
        worth = gain + np.where(into, -arrival[group], duals[group])
        found = []
        for row in np.flatnonzero((worth > BETTER) & (self.cap[pm] > 0)).tolist():
            counts = np.zeros(4 * a + 2 * b, dtype=np.int64)
            counts[index[row]] = 1
            pattern = self._pattern(int(pm[row]), counts, float(gain[row]), leaving)
            if pattern is not None:
                found.append(pattern)
        return found

    def _alone(self) -> tuple[Ints, Ints, Floats, Bools]:
        """All patterns of one move: PM, which count is 1, slots gained, whether it is an arrival."""
        tables = GainTables(self.state, self.valuation)
        cluster = self.cluster
        a, b = len(self.single), len(self.pair)
        position = {int(g): i for groups in (self.single, self.pair) for i, g in enumerate(groups)}
        rows: list[tuple[int, int, float, bool]] = []
        there = np.zeros_like(tables.fits)
        movable = np.flatnonzero(cluster.vm_movable & (self.state.vm_place >= 0))
        there[cluster.vm_group[movable], self.state.vm_place[movable]] = True
        for into, able, gains in ((True, tables.fits, tables.arrive), (False, there, tables.leave)):
            for group, place in np.argwhere(able).tolist():
                pm, at = int(cluster.place_pm[place]), position[group]
                if cluster.group_arity[group] == 1:
                    side = int(cluster.place_nodes[place, 0] - cluster.pm_nodes[pm, 0])
                    index = (2 * side + (not into)) * a + at
                else:
                    index = 4 * a + (not into) * b + at
                rows.append((pm, index, float(gains[group, place]), into))
        pms, indices, worths, arrivals = zip(*rows, strict=True) if rows else ((), (), (), ())
        first, second = np.array(pms, dtype=np.int64), np.array(indices, dtype=np.int64)
        return first, second, np.array(worths, dtype=float), np.array(arrivals, dtype=np.bool_)

    def _best(self, rows: Ints, duals: Floats, fine: float, deadline: Deadline) -> tuple[Floats, bool]:
        """Best patterns (K, 2 + 4A + 2B) of the PMs in these rows; whether there was time for all."""
        from central.planner.solvers.pricing import price_all

        patterns = np.zeros((len(rows), 2 + 4 * len(self.single) + 2 * len(self.pair)))
        held, prices = self._held(), self._prices(duals, fine)
        chunk = max(8, CHUNK // (memory_levels(self.cluster) if self.by_memory else 1))
        for start in range(0, len(rows), chunk):
            if deadline.over:
                return patterns, False
            part = patterns[start : start + chunk]
            price_all(self.pms[rows[start : start + chunk]], *held, prices, self.terms, part)
        return patterns, True

    def _moves(self, counts: Ints) -> int:
        """Moves that touch the PM: arrivals and departures, those inside it once."""
        a = len(self.single)
        into, out = counts[: 4 * a].reshape(2, 2, a)[:, 0], counts[: 4 * a].reshape(2, 2, a)[:, 1]
        inside = np.minimum(into[0], out[1]).sum() + np.minimum(into[1], out[0]).sum()
        return int(counts.sum() - inside)

    def _leaving_order(self, duals: Floats) -> Leaving | None:
        """The VMs in the order in which patterns take them; None where it does not matter."""
        if not self.ties.tenant_row:
            return None
        result: dict[tuple[int, int], list[int]] = {}
        for vms, at in ((self.single_vms, self.single_at), (self.pair_vms, self.pair_at)):
            order, _ = self._by_price(vms, at, duals)
            for vm in vms[order].tolist():
                key = (int(self.cluster.vm_group[vm]), int(self.state.vm_place[vm]))
                result.setdefault(key, []).append(vm)
        return result

    def _pattern(
        self,
        pm: int,
        counts: Ints,
        gain: float,
        leaving: Leaving | None,
        known: bool = False,
    ) -> Pattern | None:
        """The column, None if it is not new or does not fit in memory."""
        a, b = len(self.single), len(self.pair)
        leavers: tuple[int, ...] = ()
        if leaving is not None:
            out = self.counts_at(pm, counts)[0]
            leavers = tuple(vm for key, count in out.items() for vm in leaving[key][:count])
        key = pm.to_bytes(4, "little") + counts.astype(np.int16).tobytes() + np.array(leavers, np.int32).tobytes()
        if key in self.seen:
            return None
        self.seen.add(key)
        into, outof = counts[: 4 * a].reshape(2, 2, a)[:, 0], counts[: 4 * a].reshape(2, 2, a)[:, 1]
        pair_into, pair_out = counts[4 * a : 4 * a + b], counts[4 * a + b :]
        held = (into - outof) @ self.single_mem + (pair_into - pair_out) @ self.pair_mem
        if (held > self.mem[pm]).any():
            self.too_large += 1
            return None
        arriving = np.zeros(self.cluster.groups, dtype=np.int64)
        arriving[self.single], arriving[self.pair] = into.sum(axis=0), pair_into
        ties: Floats = np.zeros(self.ties.size)
        ties[self.single] = (into - outof).sum(axis=0)
        ties[self.pair] = pair_into - pair_out
        copied = float(arriving @ self.group_mem)
        ties[self.cluster.groups], ties[self.cluster.groups + 1] = arriving.sum(), copied
        for vm in leavers:
            if self.ties.row_of_vm[vm] >= 0:
                ties[self.ties.row_of_vm[vm]] += 1
        return Pattern(pm, gain - self.cost_per_mb * copied, ties, counts, leavers, known)

    def known(self, flow: Flow) -> list[Pattern]:
        """The patterns of a flow that is known to be good, so that rounding is never worse than it."""
        a, b = len(self.single), len(self.pair)
        parts: dict[int, Ints] = {}
        single = {int(g): i for i, g in enumerate(self.single)}
        pair = {int(g): i for i, g in enumerate(self.pair)}
        for counts, out in ((flow.arriving, 0), (flow.leaving, 1)):
            for (group, place), count in counts.items():
                pm = int(self.cluster.place_pm[place])
                row = parts.setdefault(pm, np.zeros(4 * a + 2 * b, dtype=np.int64))
                if group in single:
                    side = int(self.cluster.place_nodes[place, 0] - self.cluster.pm_nodes[pm, 0])
                    row[(2 * side + out) * a + single[group]] += count
                else:
                    row[4 * a + out * b + pair[group]] += count
        leaving: Leaving | None = None
        if self.ties.tenant_row:
            leaving = {}
            for vm in flow.leavers:
                key = (int(self.cluster.vm_group[vm]), int(self.state.vm_place[vm]))
                leaving.setdefault(key, []).append(vm)
        found = [self._pattern(pm, row, self._gain(pm, row), leaving, known=True) for pm, row in parts.items()]
        return [pattern for pattern in found if pattern is not None]

    def _gain(self, pm: int, counts: Ints) -> float:
        """Slots gained by a pattern."""
        a, b = len(self.single), len(self.pair)
        sums = counts[: 4 * a].reshape(2, 2, a)
        net, pairs = sums[:, 1] - sums[:, 0], counts[4 * a + b :] - counts[4 * a : 4 * a + b]
        cores = self.free[pm] + net @ self.cluster.group_cores[self.single, 0]
        cores = cores + pairs @ self.cluster.group_cores[self.pair, 0]
        mem_mb = self.mem[pm] + net @ self.single_mem + pairs @ self.pair_mem
        worth = rows_value(self.valuation, np.array([cores, self.free[pm]]), np.array([mem_mb, self.mem[pm]]))
        return float(worth[0] - worth[1])

    def counts_at(self, pm: int, counts: Ints) -> tuple[Counts, Counts]:
        """(what leaves, what arrives) in a pattern, by group and place."""
        a, b = len(self.single), len(self.pair)
        leaving: Counts = {}
        arriving: Counts = {}
        first = int(self.cluster.pm_nodes[pm, 0])
        for index in np.flatnonzero(counts).tolist():
            if index < 4 * a:
                side, group = index // (2 * a), int(self.single[index % a])
                into, place = (index // a) % 2 == 0, self.cluster.place_at[True, (first + side,)]
            else:
                group, into = int(self.pair[(index - 4 * a) % b]), index < 4 * a + b
                place = self.cluster.place_at[True, (first, first + 1)]
            (arriving if into else leaving)[group, place] = int(counts[index])
        return leaving, arriving

    def flow(self, picked: Sequence[Pattern]) -> Flow:
        """What the picked patterns do together."""
        leaving: Counts = {}
        arriving: Counts = {}
        for one in picked:
            out, into = self.counts_at(one.pm, one.counts)
            leaving |= out
            arriving |= into
        return net_flow(leaving, arriving, frozenset(vm for one in picked for vm in one.leavers))
