"""The exact model: the grouped integer program.

VMs that are alike are interchangeable, so the program does not say which VM goes where but how many of group g leave
place p and how many arrive there (integers out[g,p], in[g,p]), and how many slots each node holds afterwards:

    maximise    sum over terms and nodes of coefficient * slots
    subject to  sum over p of in[g,p] = sum over p of out[g,p]                 for each group g
                free + sum cores * (out - in) >= cores of the slots            for each node and term; memory likewise
                sum in <= MNL, and bytes, moves per PM and moves per tenant likewise

A term over n nodes of one PM has t slots there with y[node] <= t each and sum y >= n * t. With a goal the moves are
minimised instead. Anti-affinity is relaxed here (which twin goes is chosen in `realise`), so the bound stays proven.
`Counts` is the result: what leaves and arrives, still without names.
"""

from dataclasses import dataclass

import numpy as np

from central.planner.model.cluster import Bools, Cluster, Ints
from central.planner.model.objective import SlotTerm
from central.planner.model.problem import Limits
from central.planner.model.state import Floats, State, Valuation
from central.planner.solvers.program import INFINITY, Outcome, Program

Counts = dict[tuple[int, int], int]  # (group, place) -> how many VMs


@dataclass(frozen=True)
class Flow:
    """How many VMs of each group leave and arrive where."""

    leaving: Counts
    arriving: Counts
    leavers: frozenset[int] = frozenset()  # VMs that should be among those that leave, where it matters which

    @property
    def moves(self) -> int:
        """Number of moves it takes at least."""
        return sum(self.arriving.values())


@dataclass(frozen=True)
class Result:
    """A flow (None if none was found), its value, and the proven bound on the value (or on the moves, with a goal)."""

    flow: Flow | None
    value: float
    bound: float
    proven: bool
    infeasible: bool = False


class Grouped:
    """The program for one state of a cluster, perhaps only for some PMs of it."""

    def __init__(
        self,
        state: State,
        valuation: Valuation,
        limits: Limits,
        *,
        pms: Bools | None = None,
        value_needed: float | None = None,
        room: SlotTerm | None = None,
        cost_per_gb: float = 0.0,
    ) -> None:
        """Build it.

        Args:
            state: where everything is.
            valuation: what slots are worth.
            limits: what is still allowed from this state on.
            pms: (M,) only these PMs take part; all if None.
            value_needed: reach this value with the fewest moves, instead of the highest value.
            room: instead of any value, let one request of this kind fit with the fewest moves.
            cost_per_gb: value taken off per GB of memory copied.
        """
        self.state, self.cluster, self.valuation, self.limits = state, state.cluster, valuation, limits
        active = np.zeros(len(self.cluster.mapping.pms), dtype=np.bool_)
        active[self.cluster.node_pm[self.cluster.node_active]] = True
        self.pms: Bools = active if pms is None else active & pms
        self.program = Program()
        self.cost_per_gb = cost_per_gb
        self.fewest = value_needed is not None or room is not None
        self._columns()
        self._rows()
        self.hosts: tuple[Ints, Ints] = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        self.chosen_host: int | None = None
        self.slots: list[tuple[SlotTerm, Ints, Ints, Ints]] = []
        if room is not None:
            self._room(room)
        else:
            self._slots(value_needed)

    def _columns(self) -> None:
        cluster, state = self.cluster, self.state
        movable = np.flatnonzero(cluster.vm_movable & (state.vm_place >= 0))
        movable = movable[self.pms[cluster.place_pm[state.vm_place[movable]]]]
        keys, counts = np.unique(
            np.stack([cluster.vm_group[movable], state.vm_place[movable]]), axis=1, return_counts=True
        )
        self.out_group, self.out_place = keys[0], keys[1]
        # Room a node could have at most: what is free and all that may leave.
        self.most_cores, self.most_mem_mb = state.free_cores.copy(), state.free_mem_mb.copy()
        for part in range(cluster.place_nodes.shape[1]):
            node = cluster.place_nodes[self.out_place, part]
            held = node >= 0
            np.add.at(self.most_cores, node[held], (cluster.group_cores[self.out_group, part] * counts)[held])
            np.add.at(self.most_mem_mb, node[held], (cluster.group_mem_mb[self.out_group, part] * counts)[held])
        groups, places, tops = [], [], []
        for group in np.unique(self.out_group).tolist():
            place = np.arange(cluster.group_places[group].start, cluster.group_places[group].stop)
            place = place[self.pms[cluster.place_pm[place]]]
            top = np.full(len(place), float(self.limits.mnl))
            for part in range(int(cluster.group_arity[group])):
                node = cluster.place_nodes[place, part]
                for most, each in ((self.most_cores, cluster.group_cores), (self.most_mem_mb, cluster.group_mem_mb)):
                    if each[group, part]:
                        top = np.minimum(top, most[node] // each[group, part])
            place, top = place[top > 0], top[top > 0]
            groups.append(np.full(len(place), group))
            places.append(place)
            tops.append(top)
        none = [np.zeros(0, dtype=np.int64)]
        self.in_group, self.in_place = np.concatenate(groups or none), np.concatenate(places or none)
        self.out = self.program.add_columns(counts)
        memory_gb = cluster.group_mem_mb.sum(axis=1)[self.in_group] / 1024
        cost = np.full(len(self.in_group), -1.0) if self.fewest else -self.cost_per_gb * memory_gb
        self.arrive = self.program.add_columns(np.concatenate(tops or none), cost)

    def _rows(self) -> None:
        cluster, program, limits = self.cluster, self.program, self.limits
        balance = program.add_rows(cluster.groups, 0.0, 0.0)
        program.enter(balance[self.out_group], self.out, -1.0)
        program.enter(balance[self.in_group], self.arrive, 1.0)
        program.enter(program.add_rows(1, upper=float(limits.mnl)), self.arrive, 1.0)
        memory = cluster.group_mem_mb.sum(axis=1)
        if limits.max_bytes is not None:
            row = program.add_rows(1, upper=float(limits.max_bytes // 2**20))
            program.enter(row, self.arrive, memory[self.in_group])
        if limits.per_pm is not None:
            # A move inside one PM counts once there, but once as leaving and once as arriving here: slightly stricter.
            row = program.add_rows(len(self.pms), upper=float(limits.per_pm))
            program.enter(row[cluster.place_pm[self.out_place]], self.out, 1.0)
            program.enter(row[cluster.place_pm[self.in_place]], self.arrive, 1.0)
        if limits.per_tenant is not None:
            names = {name: index for index, name in enumerate(dict.fromkeys(cluster.group_tenant))}
            row = program.add_rows(len(names), upper=float(limits.per_tenant))
            tenant = np.array([names[name] for name in cluster.group_tenant], dtype=np.int64)
            keep = np.array([bool(cluster.group_tenant[group]) for group in self.in_group], dtype=np.bool_)
            program.enter(row[tenant[self.in_group[keep]]], self.arrive[keep], 1.0)
        self.nodes = np.flatnonzero(self.pms[cluster.node_pm])
        self.node_row = np.full(len(cluster.node_pm), -1, dtype=np.int64)
        self.node_row[self.nodes] = np.arange(len(self.nodes))

    def _usage(self, cores: bool) -> Ints:
        """Rows `cores (or MB) that arrive - that leave + ... <= free`, one per node; their numbers."""
        cluster, program = self.cluster, self.program
        free = self.state.free_cores if cores else self.state.free_mem_mb
        each = cluster.group_cores if cores else cluster.group_mem_mb
        rows = program.add_rows(len(self.nodes), upper=free[self.nodes].astype(float))
        for part in range(cluster.place_nodes.shape[1]):
            for sign, column, group, place in (
                (-1.0, self.out, self.out_group, self.out_place),
                (1.0, self.arrive, self.in_group, self.in_place),
            ):
                node = cluster.place_nodes[place, part]
                amount = np.where(node >= 0, each[group, part], 0)
                used = amount > 0
                program.enter(rows[self.node_row[node[used]]], column[used], sign * amount[used])
        return rows

    def _slots(self, value_needed: float | None) -> None:
        cluster, program = self.cluster, self.program
        scored: list[tuple[Ints, float]] = []
        cores_bound = mem_bound = False
        for term, coefficient in zip(self.valuation.terms, self.valuation.coefficients, strict=True):
            cost = 0.0 if self.fewest else coefficient
            top = np.full(len(self.nodes), INFINITY)
            if term.cores:
                top = np.minimum(top, self.most_cores[self.nodes] // term.cores)
            if term.mem_mb:
                top = np.minimum(top, self.most_mem_mb[self.nodes] // term.mem_mb)
            per_node = program.add_columns(top, cost if term.nodes == 1 else 0.0)
            if term.cores:
                program.enter(self._usage(cores=True), per_node, float(term.cores))
                cores_bound = True
            if term.mem_mb:
                program.enter(self._usage(cores=False), per_node, float(term.mem_mb))
                mem_bound = True
            counted = per_node
            together = np.zeros(0, dtype=np.int64)
            if term.nodes > 1:
                pms = np.unique(cluster.node_pm[self.nodes])
                at = np.searchsorted(pms, cluster.node_pm[self.nodes])
                together = counted = program.add_columns(np.full(len(pms), float(top.max(initial=0.0))), cost)
                spread = program.add_rows(len(pms), lower=0.0)
                program.enter(spread[at], per_node, 1.0)
                program.enter(spread, together, -float(term.nodes))
                each = program.add_rows(len(self.nodes), upper=0.0)
                program.enter(each, per_node, 1.0)
                program.enter(each, together[at], -1.0)
            scored.append((counted, coefficient))
            self.slots.append((term, per_node, together, counted))
        if not cores_bound:
            self._usage(cores=True)
        if not mem_bound:
            self._usage(cores=False)
        if value_needed is not None:
            row = program.add_rows(1, lower=value_needed - 1e-7)
            for columns, coefficient in scored:
                program.enter(row, columns, coefficient)

    def _room(self, room: SlotTerm) -> None:
        """One request on `room.nodes` nodes of one PM: choose the PM and its nodes, and leave that much there."""
        cluster, program = self.cluster, self.program
        chosen = program.add_columns(np.ones(len(self.nodes)))
        pms = np.unique(cluster.node_pm[self.nodes])
        at = np.searchsorted(pms, cluster.node_pm[self.nodes])
        host = program.add_columns(np.ones(len(pms)))
        self.hosts = (pms, host)
        program.enter(program.add_rows(1, 1.0, 1.0), host, 1.0)
        rows = program.add_rows(len(pms), 0.0, 0.0)
        program.enter(rows[at], chosen, 1.0)
        program.enter(rows, host, -float(room.nodes))
        program.enter(self._usage(cores=True), chosen, float(room.cores))
        program.enter(self._usage(cores=False), chosen, float(room.mem_mb))

    def exclude_hosts(self, pms: set[int]) -> None:
        """Do not put the request that room is made for on these PMs."""
        numbers, columns = self.hosts
        banned = columns[np.isin(numbers, list(pms))]
        if len(banned):
            self.program.enter(self.program.add_rows(1, upper=0.0), banned, 1.0)

    @property
    def exact_gap(self) -> float:
        """A gap below which a solution is optimal: values step by 1 where coefficients are whole numbers."""
        whole = self.cost_per_gb == 0.0 and all(float(one).is_integer() for one in self.valuation.coefficients)
        whole = whole or self.fewest
        return 0.999 if whole else 1e-4

    def solve(self, seconds: float, *, hint: Flow | None = None, threads: int = 1, seed: int = 0) -> Result:
        """Solve; a `hint` gives HiGHS a plan to beat."""
        start = None if hint is None else self._start(hint)
        outcome: Outcome = self.program.solve(
            seconds, start=start, absolute_gap=self.exact_gap, threads=threads, seed=seed
        )
        # A move inside one PM counts twice against a cap per PM here: good plans, but nothing is proven.
        exact = self.limits.per_pm is None
        bound = outcome.bound if exact and (np.isfinite(outcome.bound) or outcome.infeasible) else INFINITY
        if outcome.values is None:
            return Result(None, -INFINITY, bound, False, outcome.infeasible and exact)
        chosen = self.hosts[0][outcome.values[self.hosts[1]] > 0.5]
        self.chosen_host = int(chosen[0]) if len(chosen) else None
        return Result(self._flow(outcome.values), outcome.objective, bound, outcome.proven and exact)

    def _flow(self, values: Floats) -> Flow:
        out = np.rint(values[self.out]).astype(np.int64)
        arrive = np.rint(values[self.arrive]).astype(np.int64)
        leaving: Counts = {(int(self.out_group[i]), int(self.out_place[i])): int(out[i]) for i in np.flatnonzero(out)}
        arriving: Counts = {
            (int(self.in_group[i]), int(self.in_place[i])): int(arrive[i]) for i in np.flatnonzero(arrive)
        }
        return net_flow(leaving, arriving)

    def _start(self, flow: Flow) -> Floats | None:
        """Column values of a flow, or None if the program has no column for a part of it."""
        values: Floats = np.zeros(self.program.columns)
        out_at = {(int(g), int(p)): int(c) for g, p, c in zip(self.out_group, self.out_place, self.out, strict=True)}
        in_at = {(int(g), int(p)): int(c) for g, p, c in zip(self.in_group, self.in_place, self.arrive, strict=True)}
        cores, mem_mb = self.state.free_cores.copy(), self.state.free_mem_mb.copy()
        for counts, column_at, sign in ((flow.leaving, out_at, 1), (flow.arriving, in_at, -1)):
            for (group, place), count in counts.items():
                if (group, place) not in column_at:
                    return None
                values[column_at[group, place]] = count
                for part, node in enumerate(self.cluster.nodes_of(place)):
                    cores[node] += sign * count * self.cluster.group_cores[group, part]
                    mem_mb[node] += sign * count * self.cluster.group_mem_mb[group, part]
        for term, per_node, together, _ in self.slots:
            fit = np.full(len(self.nodes), np.iinfo(np.int64).max)
            if term.cores:
                fit = np.minimum(fit, cores[self.nodes] // term.cores)
            if term.mem_mb:
                fit = np.minimum(fit, mem_mb[self.nodes] // term.mem_mb)
            if not len(together):
                values[per_node] = fit
                continue
            pms, at = np.unique(self.cluster.node_pm[self.nodes], return_inverse=True)
            slots = np.zeros(len(pms), dtype=np.int64)
            for count in range(1, int(fit.max(initial=0)) + 1):
                slots[np.bincount(at, np.minimum(fit, count), len(pms)) >= term.nodes * count] = count
            values[together] = slots
            values[per_node] = np.minimum(fit, slots[at])
        return values


def net_flow(leaving: Counts, arriving: Counts, leavers: frozenset[int] = frozenset()) -> Flow:
    """The flow without VMs of a group that leave a place to which others of the group come."""
    leaving, arriving = dict(leaving), dict(arriving)
    for key in set(leaving) & set(arriving):
        both = min(leaving[key], arriving[key])
        for counts in (leaving, arriving):
            counts[key] -= both
            if not counts[key]:
                del counts[key]
    return Flow(leaving, arriving, leavers)


def flow_between(cluster: Cluster, before: Ints, after: Ints) -> Flow:
    """The flow that takes VM places `before` (V,) to `after` (V,)."""
    leaving: Counts = {}
    arriving: Counts = {}
    moved = np.flatnonzero(before != after).tolist()
    for vm in moved:
        group = int(cluster.vm_group[vm])
        for counts, place in ((leaving, int(before[vm])), (arriving, int(after[vm]))):
            counts[group, place] = counts.get((group, place), 0) + 1
    return net_flow(leaving, arriving, frozenset(moved))
