"""Column generation: the grouped program, decomposed by PM. Fast on large clusters, with a bound that is nearly tight.

Only a few rows tie PMs together: as many VMs of each group arrive as leave, MNL, and limits on bytes and tenants where
there are any. Everything else is one PM's own business. So (Dantzig and Wolfe): a column is a whole pattern for one PM,
what it takes in and gives away and what slots that gains; the master program picks one pattern per PM such that the
ties hold; its duals are prices, at which `patterns` finds each PM's best new pattern exactly. When no PM has a better
one, the master's value is the bound; at any prices the Lagrange value is a bound too. As there are only a dozen ties,
all but about a dozen PMs have a whole pattern already in the continuous master, so the integer master over the columns
comes within a slot or two of the bound, nearly whatever the size of the cluster.

Holds where VMs take one node, or two nodes evenly, PMs have at most two nodes and at most one term spans two nodes;
`patterns.applies` says. Elsewhere the program of `grouped` is used.
"""

from typing import TYPE_CHECKING

import numpy as np

from central.planner.model.cluster import Ints
from central.planner.model.problem import Deadline, Limits
from central.planner.model.state import Floats, State, Valuation
from central.planner.solvers.budget import Budget
from central.planner.solvers.grouped import Flow, Result
from central.planner.solvers.patterns import MOST_LEVELS, Pricer, memory_levels
from central.planner.solvers.program import INFINITY, Program
from central.planner.solvers.ties import Pattern

if TYPE_CHECKING:
    import highspy

SMOOTH = 0.5  # how much the last good prices weigh against the master's, which jump about at first
FIRST_TOLLS = (0.9, 0.5, 0.2)  # slots a move is held to cost, for the first columns
LEAST_STEP_S = 0.02  # a step that begins with less than this left is not begun


class Master:
    """The restricted master program over the columns generated so far."""

    def __init__(self, pricer: Pricer) -> None:
        """Build it; `pricer` knows state, valuation and limits, and makes the columns."""
        self.pricer = pricer
        self.state, self.cluster, self.valuation = pricer.state, pricer.cluster, pricer.valuation
        self.ties = pricer.ties
        self.columns: list[Pattern] = []
        self.bound = INFINITY
        self.duals: Floats = np.zeros(self.ties.size)
        self.whole = not pricer.cost_per_mb and all(float(one).is_integer() for one in self.valuation.coefficients)

    def allow(self, mnl: int) -> None:
        """From now on at most that many moves. The columns stay."""
        self.ties.upper[self.cluster.groups] = mnl
        self.bound = INFINITY

    def solve(
        self, deadline: Deadline, *, start: Flow | None = None, integer_share: float = 0.5, seed: int = 0
    ) -> Result:
        """Generate columns until the master is optimal or `1 - integer_share` of the time is gone; then round."""
        if start is not None:
            self.columns += self.pricer.known(start)
        self._generate(deadline.part(1.0 - integer_share))
        before = self.valuation.value(self.cluster, self.state.free_cores, self.state.free_mem_mb)
        flow, gain = self._round(deadline, seed)
        bound = float(np.floor(self.bound + 1e-6)) if self.whole and np.isfinite(self.bound) else self.bound
        return Result(flow, before + gain, before + bound, bound - gain < (0.5 if self.whole else 1e-4))

    def _price(self, duals: Floats, deadline: Deadline) -> int:
        """Add the columns that are worth having at these prices; how many."""
        sensible = self.ties.sensible(duals)
        bound, found = self.pricer.price(sensible, deadline)
        if bound < self.bound:
            self.bound, self.duals = bound, sensible
        self.columns += found
        return len(found)

    def _generate(self, deadline: Deadline) -> None:
        cluster = self.cluster
        for toll in FIRST_TOLLS:  # groups priced by their cores
            for per_slot in (0.0, 0.5):
                guess: Floats = np.zeros(self.ties.size)
                guess[: cluster.groups] = per_slot * cluster.group_cores.sum(axis=1) / 16.0
                guess[cluster.groups] = toll
                self._price(guess, deadline)
        solver, row_of = self._restricted()
        sent = 0
        self.rounds = 0
        while not deadline.over:
            self.rounds += 1
            sent = self._send(solver, row_of, sent)
            duals, value = _solved(solver, deadline, self.ties.size)
            if duals is None or self._met(value):
                return
            if self._price(SMOOTH * self.duals + (1 - SMOOTH) * duals, deadline) or self._price(duals, deadline):
                continue
            if deadline.left_s <= 0.0:
                return
            # Optimal without regard to memory. Where that hid better patterns, go on with it.
            pricer = self.pricer
            if pricer.by_memory or not pricer.too_large or memory_levels(cluster) > MOST_LEVELS:
                return
            pricer.by_memory = True

    def _met(self, value: float) -> bool:
        """Whether the master's value is the bound, or so near that no whole solution lies between."""
        return self.bound - value < 1e-6 or (self.whole and np.floor(self.bound + 1e-6) <= value + 1e-6)

    def _restricted(self) -> tuple["highspy.Highs", Ints]:
        """The continuous master without columns, and the row of each PM in it."""
        import highspy

        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("simplex_strategy", 4)  # primal: new columns leave the old basis feasible
        solver.setOptionValue("presolve", "off")
        pms = self.pricer.pms
        lower = np.concatenate([self.ties.lower, np.full(len(pms), -INFINITY)])
        upper = np.concatenate([self.ties.upper, np.ones(len(pms))])
        empty = np.zeros(0, dtype=np.int32)
        solver.addRows(len(lower), lower, upper, 0, np.zeros(len(lower), dtype=np.int32), empty, np.zeros(0))
        solver.changeObjectiveSense(highspy.ObjSense.kMaximize)
        row_of = np.full(len(self.cluster.mapping.pms), -1)
        row_of[pms] = self.ties.size + np.arange(len(pms))
        return solver, row_of

    def _send(self, solver: "highspy.Highs", row_of: Ints, sent: int) -> int:
        """Give the continuous master the columns it does not have yet."""
        fresh = self.columns[sent:]
        if fresh:
            starts: list[int] = []
            index: list[int] = []
            value: list[float] = []
            for column in fresh:
                starts.append(len(index))
                touched = np.flatnonzero(column.ties)
                index += [*touched.tolist(), int(row_of[column.pm])]
                value += [*column.ties[touched].tolist(), 1.0]
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

    def _round(self, deadline: Deadline, seed: int) -> tuple[Flow | None, float]:
        """The best whole choice among the columns."""
        program = Program()
        columns = self.columns
        if not columns:
            return Flow({}, {}), 0.0
        picked = [column for column in columns if column.known]
        if deadline.left_s > LEAST_STEP_S:
            chosen = program.add_columns(np.ones(len(columns)), np.array([column.gain for column in columns]))
            ties = np.array([column.ties for column in columns])
            row, tie = np.nonzero(ties)
            rows = program.add_rows(self.ties.size, self.ties.lower, self.ties.upper)
            program.enter(rows[tie], chosen[row], ties[row, tie])
            each = program.add_rows(len(self.cluster.mapping.pms), upper=1.0)
            program.enter(each[np.array([column.pm for column in columns])], chosen, 1.0)
            known = np.array([column.known for column in columns], dtype=float)
            gap = 0.999 if self.whole else 1e-4
            outcome = program.solve(deadline.left_s, absolute_gap=gap, seed=seed, start=known)
            if outcome.values is not None:
                picked = [columns[i] for i in np.flatnonzero(outcome.values > 0.5)]
        return self.pricer.flow(picked), sum(column.gain for column in picked)


def _solved(solver: "highspy.Highs", deadline: Deadline, ties: int) -> tuple[Floats | None, float]:
    """(duals of the ties, value) of the continuous master; None for the duals if it was not solved in time."""
    import highspy

    solver.setOptionValue("time_limit", solver.getRunTime() + deadline.left_s)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None, -INFINITY
    duals: Floats = np.array(solver.getSolution().row_dual)[:ties]
    return duals, float(solver.getInfo().objective_function_value)


def fewest(
    state: State,
    valuation: Valuation,
    limits: Limits,
    value_needed: float,
    deadline: Deadline,
    seed: int,
    spent: Budget | None = None,
) -> Result:
    """The fewest moves that reach a value: the most value with trial numbers of moves, each proven by its bound.

    The columns stay from one MNL to the next; only the master's limit changes. Value and bound of the result are minus
    the number of moves.
    """
    before = valuation.value(state.cluster, state.free_cores, state.free_mem_mb)
    master = Master(Pricer(state, valuation, limits, spent))
    low, high = 1, limits.mnl  # low: no fewer moves can do; high: the fewest known to do, or the limit
    flow: Flow | None = None
    trial = min(high, max(low, int(np.ceil(value_needed - before))))  # about one slot a move
    while low <= high and not deadline.over:
        master.allow(trial)
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
