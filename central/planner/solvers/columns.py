"""Column generation: the grouped program, decomposed by PM. Fast on large clusters, with a bound that is nearly tight.

Only a few equations tie PMs together: as many VMs of each group arrive as leave, and MNL. Everything else is one PM's
own business. So (Dantzig and Wolfe): a column is a whole pattern for one PM, what it takes in and gives away and what
slots that gains; the master program picks one pattern per PM such that groups balance and MNL holds; its duals are
prices, at which `pricing` finds each PM's best new pattern exactly. When no PM has a better one, the master's value is
the bound; at any prices, toll * MNL plus the sum of the PMs' best is a bound too (Lagrange). As there are only a dozen
tying equations, all but about a dozen PMs have a whole pattern already in the continuous master, so the integer master
over the generated columns comes within a slot or two of the bound, nearly whatever the size of the cluster.

Holds where VMs take one node, or two nodes evenly, PMs have at most two nodes, at most one term spans two nodes and MNL
is the only limit; `applies` says. Elsewhere the program of `grouped` is used. Memory is left out of the patterns at
first, which is several times faster; it comes in when a term asks for it or a pattern was found that does not fit it.
The bound stays valid either way: leaving a constraint out can only raise it.
"""

from dataclasses import dataclass, replace

import numpy as np

from central.planner.model.cluster import Bools, Cluster, Ints
from central.planner.model.problem import Deadline, Limits
from central.planner.model.state import Floats, State, Valuation
from central.planner.solvers.gains import rows_value
from central.planner.solvers.grouped import Counts, Flow, Result, net_flow
from central.planner.solvers.program import INFINITY, Program

BETTER = 1e-6  # a pattern must beat the dual of its PM by this much to be worth a column
MOST_LEVELS = 256  # cores, and units of memory, per node: the knapsacks grow with their product
SMOOTH = 0.5  # how much the last good prices weigh against the master's, which jump about at first


def applies(cluster: Cluster, valuation: Valuation, limits: Limits, cost_per_gb: float = 0.0) -> bool:
    """Whether the decomposition holds for this problem."""
    plain = cost_per_gb == 0.0 and limits.max_bytes is None and limits.per_pm is None and limits.per_tenant is None
    shapes = all(arity == 1 or (arity == 2 and alike) for arity, alike in cluster.group_kind)
    terms = all(term.nodes <= 2 for term in valuation.terms) and sum(t.nodes == 2 for t in valuation.terms) <= 1
    small = cluster.pm_nodes.shape[1] <= 2 and int(cluster.node_cores.max(initial=0)) <= MOST_LEVELS
    sized = bool((cluster.group_cores[:, 0] > 0).all())
    measured = not any(term.mem_mb for term in valuation.terms) or memory_levels(cluster) <= MOST_LEVELS
    return plain and shapes and terms and small and sized and measured


def memory_unit_mb(cluster: Cluster) -> int:
    """The largest amount of which every VM's memory per node is a multiple."""
    return max(1, int(np.gcd.reduce(cluster.group_mem_mb.ravel())) if cluster.group_mem_mb.size else 1)


def memory_levels(cluster: Cluster) -> int:
    """Units of memory on the largest node."""
    return int(cluster.node_mem_mb.max(initial=0)) // memory_unit_mb(cluster)


@dataclass(frozen=True)
class _Column:
    pm: int
    gain: float
    arrivals: int
    net: Ints  # (groups,) arrivals - departures
    pattern: Floats
    known: bool  # part of the plan that the search started from: together these always are a solution


class Master:
    """The restricted master program over the columns generated so far."""

    def __init__(self, state: State, valuation: Valuation, limits: Limits, pms: Bools | None = None) -> None:
        self.state, self.cluster, self.valuation, self.limits = state, state.cluster, valuation, limits
        cluster = self.cluster
        active = np.zeros(len(cluster.mapping.pms), dtype=np.bool_)
        active[cluster.node_pm[cluster.node_active]] = True
        self.pms: Ints = np.flatnonzero(active if pms is None else active & pms)
        self.single = np.array([g for g, (n, _) in enumerate(cluster.group_kind) if n == 1], dtype=np.int64)
        self.pair = np.array([g for g, (n, _) in enumerate(cluster.group_kind) if n == 2], dtype=np.int64)
        self._arrays()
        self.columns: list[_Column] = []
        self.seen: set[bytes] = set()
        self.bound = INFINITY
        self.prices: Floats = np.zeros(cluster.groups)
        self.toll = 0.5

    def _arrays(self) -> None:
        """What `pricing` reads. Which VMs share a node is all that counts, so groups lose their names here."""
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
        moves = cluster.vm_movable[placed]
        np.add.at(self.outs, (pm[~two & moves], side[~two & moves], position[group[~two & moves]]), 1)
        np.add.at(self.pair_outs, (pm[two & moves], position[group[two & moves]]), 1)
        terms = list(zip(self.valuation.terms, self.valuation.coefficients, strict=True))
        one = [(t, c) for t, c in terms if t.nodes == 1]
        both = [(t.cores, t.mem_mb, c) for t, c in terms if t.nodes == 2]
        self.terms = (
            np.array([t.cores for t, _ in one], dtype=np.int64),
            np.array([t.mem_mb for t, _ in one], dtype=np.int64),
            np.array([c for _, c in one], dtype=float),
            *(both[0] if both else (0, 0, 0.0)),
        )
        self.single_mem = cluster.group_mem_mb[self.single, 0]
        self.pair_mem = cluster.group_mem_mb[self.pair, 0]
        self.by_memory = any(t.mem_mb for t, _ in terms)
        self.too_large = 0  # patterns met that do not fit in memory

    def _held(self) -> tuple[object, ...]:
        """`held` and the groups' sizes as `pricing.price_all` wants them; memory in units, or left out."""
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

    def price(self, prices: Floats, toll: float) -> tuple[float, int]:
        """Find every PM's best pattern at these prices; (the Lagrange bound there, number of new columns)."""
        from central.planner.solvers.pricing import price_all

        a, b = len(self.single), len(self.pair)
        patterns = np.zeros((len(self.pms), 2 + 4 * a + 2 * b))
        price_all(self.pms, *self._held(), (prices[self.single], prices[self.pair], toll), self.terms, patterns)
        bound = toll * self.limits.mnl + float(np.maximum(patterns[:, 0], 0.0).sum())
        added = 0
        for row in np.flatnonzero(patterns[:, 0] > BETTER):
            added += self._add(int(self.pms[row]), patterns[row])
        return bound, added

    def _add(self, pm: int, pattern: Floats, known: bool = False) -> bool:
        key = pm.to_bytes(4, "little") + pattern[2:].astype(np.int16).tobytes()
        if key in self.seen:
            return False
        self.seen.add(key)
        a, b = len(self.single), len(self.pair)
        parts = pattern[2:].astype(np.int64)
        into, out = parts[: 4 * a].reshape(2, 2, a)[:, 0], parts[: 4 * a].reshape(2, 2, a)[:, 1]
        pair_into, pair_out = parts[4 * a : 4 * a + b], parts[4 * a + b :]
        held = (into - out) @ self.single_mem + (pair_into - pair_out) @ self.pair_mem
        if (held > self.mem[pm]).any():
            self.too_large += 1
            return False
        net = np.zeros(self.cluster.groups, dtype=np.int64)
        net[self.single] = (into - out).sum(axis=0)
        net[self.pair] = pair_into - pair_out
        arrivals = int(into.sum() + pair_into.sum())
        self.columns.append(_Column(pm, float(pattern[1]), arrivals, net, pattern, known))
        return True

    def solve(
        self, deadline: Deadline, *, start: Flow | None = None, integer_share: float = 0.5, seed: int = 0
    ) -> Result:
        """Generate columns until the master is optimal or `1 - integer_share` of the time is gone; then round."""
        if start is not None:
            self._seed_columns(start)
        self._generate(Deadline(deadline.left_s * (1.0 - integer_share)))
        before = self.valuation.value(self.cluster, self.state.free_cores, self.state.free_mem_mb)
        flow, gain = self._round(deadline, seed)
        whole = all(float(one).is_integer() for one in self.valuation.coefficients)
        bound = float(np.floor(self.bound + 1e-6)) if whole and np.isfinite(self.bound) else self.bound
        return Result(flow, before + gain, before + bound, bound - gain < (0.5 if whole else 1e-4))

    def _generate(self, deadline: Deadline) -> None:
        import highspy

        cluster = self.cluster
        for toll in (0.9, 0.5, 0.2):  # first columns: groups priced by their cores
            for per_slot in (0.0, 0.5):
                prices = per_slot * cluster.group_cores.sum(axis=1) / 16.0
                bound, _ = self.price(prices, toll)
                if bound < self.bound:
                    self.bound, self.prices, self.toll = bound, prices, toll
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("simplex_strategy", 4)  # primal: new columns leave the old basis feasible
        solver.setOptionValue("presolve", "off")
        rows = cluster.groups + 1 + len(self.pms)
        lower = np.concatenate([np.zeros(cluster.groups), np.full(1 + len(self.pms), -INFINITY)])
        upper = np.concatenate([np.zeros(cluster.groups), [float(self.limits.mnl)], np.ones(len(self.pms))])
        empty = np.zeros(0, dtype=np.int32)
        solver.addRows(rows, lower, upper, 0, np.zeros(rows, dtype=np.int32), empty, np.zeros(0))
        solver.changeObjectiveSense(highspy.ObjSense.kMaximize)
        row_of = np.full(len(cluster.mapping.pms), -1)
        row_of[self.pms] = cluster.groups + 1 + np.arange(len(self.pms))
        sent = 0
        smooth = SMOOTH
        self.rounds = 0
        while not deadline.over:
            self.rounds += 1
            sent = self._send(solver, row_of, sent)
            solver.setOptionValue("time_limit", solver.getRunTime() + deadline.left_s)
            solver.run()
            if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
                return
            value = solver.getInfo().objective_function_value
            if self.bound - value < 1e-6 or (np.floor(self.bound + 1e-6) <= value + 1e-6 and self._whole()):
                return
            dual = np.array(solver.getSolution().row_dual)
            prices, toll = dual[: cluster.groups], max(0.0, float(dual[cluster.groups]))
            bound, added = self.price(
                smooth * self.prices + (1 - smooth) * prices, smooth * self.toll + (1 - smooth) * toll
            )
            if bound < self.bound:
                self.bound = bound
                self.prices, self.toll = (
                    smooth * self.prices + (1 - smooth) * prices,
                    smooth * self.toll + (1 - smooth) * toll,
                )
            if not added:
                bound, added = self.price(prices, toll)
                if bound < self.bound:
                    self.bound, self.prices, self.toll = bound, prices, toll
                if not added:
                    # Optimal without regard to memory. Where that hid better patterns, go on with it.
                    if self.by_memory or not self.too_large or memory_levels(cluster) > MOST_LEVELS:
                        return
                    self.by_memory = True

    def _whole(self) -> bool:
        return all(float(one).is_integer() for one in self.valuation.coefficients)

    def _send(self, solver: "highspy.Highs", row_of: Ints, sent: int) -> int:  # type: ignore[name-defined]  # noqa: F821
        fresh = self.columns[sent:]
        if fresh:
            starts: list[int] = []
            index: list[int] = []
            value: list[float] = []
            for column in fresh:
                starts.append(len(index))
                touched = np.flatnonzero(column.net)
                index += [*touched.tolist(), self.cluster.groups, int(row_of[column.pm])]
                value += [*column.net[touched].tolist(), column.arrivals, 1.0]
            count = len(fresh)
            solver.addCols(
                count,
                np.array([column.gain for column in fresh]),
                np.zeros(count),
                np.full(count, INFINITY),
                len(index),
                np.array(starts, dtype=np.int32),
                np.array(index, dtype=np.int32),
                np.array(value, dtype=float),
            )
        return len(self.columns)

    def _seed_columns(self, flow: Flow) -> None:
        """Columns of a known flow, so that rounding is never worse than it."""
        a, b = len(self.single), len(self.pair)
        parts: dict[int, Floats] = {}
        single = {int(g): i for i, g in enumerate(self.single)}
        pair = {int(g): i for i, g in enumerate(self.pair)}
        for counts, out in ((flow.arriving, 0), (flow.leaving, 1)):
            for (group, place), count in counts.items():
                pm = int(self.cluster.place_pm[place])
                pattern = parts.setdefault(pm, np.zeros(2 + 4 * a + 2 * b))
                if group in single:
                    side = int(self.cluster.place_nodes[place, 0] - self.cluster.pm_nodes[pm, 0])
                    pattern[2 + (2 * side + out) * a + single[group]] += count
                else:
                    pattern[2 + 4 * a + out * b + pair[group]] += count
        for pm, pattern in parts.items():
            sums = pattern[2 : 2 + 4 * a].reshape(2, 2, a)
            net, pairs = sums[:, 1] - sums[:, 0], pattern[2 + 4 * a + b :] - pattern[2 + 4 * a : 2 + 4 * a + b]
            sizes, pair_sizes = self.cluster.group_cores[self.single, 0], self.cluster.group_cores[self.pair, 0]
            cores = self.free[pm] + (net @ sizes + pairs @ pair_sizes).astype(np.int64)
            mem_mb = self.mem[pm] + (net @ self.single_mem + pairs @ self.pair_mem).astype(np.int64)
            pattern[1] = float(
                rows_value(self.valuation, np.array([cores, self.free[pm]]), np.array([mem_mb, self.mem[pm]]))
                @ [1.0, -1.0]
            )
            self._add(pm, pattern, known=True)

    def _round(self, deadline: Deadline, seed: int) -> tuple[Flow | None, float]:
        """The best whole choice among the columns."""
        program = Program()
        columns = self.columns
        if not columns:
            return Flow({}, {}), 0.0
        chosen = program.add_columns(np.ones(len(columns)), np.array([column.gain for column in columns]))
        nets = np.array([column.net for column in columns])
        balance = program.add_rows(self.cluster.groups, 0.0, 0.0)
        row, group = np.nonzero(nets)
        program.enter(balance[group], chosen[row], nets[row, group])
        program.enter(
            program.add_rows(1, upper=float(self.limits.mnl)), chosen, np.array([c.arrivals for c in columns])
        )
        each = program.add_rows(len(self.cluster.mapping.pms), upper=1.0)
        program.enter(each[np.array([column.pm for column in columns])], chosen, 1.0)
        known = np.array([column.known for column in columns], dtype=float)
        gap = 0.999 if self._whole() else 1e-4
        outcome = program.solve(deadline.left_s, absolute_gap=gap, seed=seed, start=known)
        picked = [column for column in columns if column.known]
        if outcome.values is not None:
            picked = [columns[i] for i in np.flatnonzero(outcome.values > 0.5)]
        return self._flow(picked), sum(column.gain for column in picked)

    def _flow(self, picked: list[_Column]) -> Flow:
        a, b = len(self.single), len(self.pair)
        leaving: Counts = {}
        arriving: Counts = {}
        for column in picked:
            pm = column.pm
            parts = column.pattern[2:].astype(np.int64)
            for side in range(2):
                node = int(self.cluster.pm_nodes[pm, 0]) + side
                for i, group in enumerate(self.single.tolist()):
                    into, out = parts[2 * side * a + i], parts[(2 * side + 1) * a + i]
                    if into or out:
                        place = self.cluster.place_at[True, (node,)]
                        _count(arriving, (group, place), int(into))
                        _count(leaving, (group, place), int(out))
            for i, group in enumerate(self.pair.tolist()):
                into, out = parts[4 * a + i], parts[4 * a + b + i]
                if into or out:
                    first = int(self.cluster.pm_nodes[pm, 0])
                    place = self.cluster.place_at[True, (first, first + 1)]
                    _count(arriving, (group, place), int(into))
                    _count(leaving, (group, place), int(out))
        return net_flow(leaving, arriving)


def fewest(
    state: State, valuation: Valuation, limits: Limits, value_needed: float, deadline: Deadline, seed: int
) -> Result:
    """The fewest moves that reach a value: the most value with trial numbers of moves, each proven by its bound.

    The columns stay from one MNL to the next; only the master's limit changes. Value and bound of the result are minus
    the number of moves.
    """
    before = valuation.value(state.cluster, state.free_cores, state.free_mem_mb)
    master = Master(state, valuation, limits)
    low, high = 1, limits.mnl  # low: no fewer moves can do; high: the fewest known to do, or the limit
    flow: Flow | None = None
    trial = min(high, max(low, int(np.ceil(value_needed - before))))  # about one slot a move
    while low <= high and not deadline.over:
        master.limits = replace(limits, mnl=trial)
        master.bound = INFINITY
        result = master.solve(deadline.part(0.5), seed=seed)
        if result.flow is not None and result.value >= value_needed:
            flow, high = result.flow, result.flow.moves - 1
        elif result.bound < value_needed:
            low = trial + 1
        else:
            break  # neither found nor excluded: too little time, or a gap
        # Value per move is nearly constant, so the answer is near: aim where it points, then go down one at a time.
        rate = max((result.value - before) / max(1, trial), 1e-9)
        trial = high if flow is not None else min(high, max(low, int(np.ceil((value_needed - before) / rate))))
    if flow is None:
        return Result(None, -INFINITY, -float(low), False, low > limits.mnl)
    return Result(flow, -float(flow.moves), -float(low), low > high)


def _count(counts: Counts, key: tuple[int, int], number: int) -> None:
    if number:
        counts[key] = counts.get(key, 0) + number
