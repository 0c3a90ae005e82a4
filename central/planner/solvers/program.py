"""A linear integer program built from numpy arrays and solved by HiGHS; knows nothing of clusters.

Columns and rows are added in blocks; the matrix is assembled once. HiGHS maximises. `solve` returns values and a bound
that is proven even when time ran out.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from central.planner.model.cluster import Ints
from central.planner.model.state import Floats

INFINITY = float("inf")


@dataclass(frozen=True)
class Outcome:
    """What HiGHS found. `values` is None when it found no solution; `bound` is proven; `infeasible` is proven too."""

    values: Floats | None
    objective: float
    bound: float
    proven: bool
    infeasible: bool


@dataclass
class Program:
    """Maximise cost @ x subject to row bounds, column bounds and integrality (all columns unless said otherwise)."""

    lower: list[Floats] = field(default_factory=list)
    upper: list[Floats] = field(default_factory=list)
    cost: list[Floats] = field(default_factory=list)
    integer: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    entries: list[tuple[Ints, Ints, Floats]] = field(default_factory=list)  # (rows, columns, coefficients)
    row_lower: list[Floats] = field(default_factory=list)
    row_upper: list[Floats] = field(default_factory=list)
    columns: int = 0
    rows: int = 0

    def add_columns(self, upper: npt.ArrayLike, cost: npt.ArrayLike = 0.0, integer: bool = True) -> Ints:
        """Columns from 0 to `upper`; their numbers."""
        top = np.atleast_1d(np.asarray(upper, dtype=float))
        count = len(top)
        self.lower.append(np.zeros(count))
        self.upper.append(top)
        self.cost.append(np.broadcast_to(np.asarray(cost, dtype=float), count).copy())
        self.integer.append(np.full(count, integer))
        self.columns += count
        return np.arange(self.columns - count, self.columns)

    def add_rows(self, count: int, lower: npt.ArrayLike = -INFINITY, upper: npt.ArrayLike = INFINITY) -> Ints:
        """Rows with these bounds; their numbers."""
        self.row_lower.append(np.broadcast_to(np.asarray(lower, dtype=float), count).copy())
        self.row_upper.append(np.broadcast_to(np.asarray(upper, dtype=float), count).copy())
        self.rows += count
        return np.arange(self.rows - count, self.rows)

    def enter(self, rows: npt.ArrayLike, columns: npt.ArrayLike, coefficients: npt.ArrayLike) -> None:
        """Add coefficients; entries at one position add up."""
        row, column = np.broadcast_arrays(np.asarray(rows, dtype=np.int64), np.asarray(columns, dtype=np.int64))
        value = np.broadcast_to(np.asarray(coefficients, dtype=float), row.shape)
        self.entries.append((row.ravel(), column.ravel(), value.ravel()))

    def solve(
        self,
        seconds: float,
        *,
        start: Floats | None = None,
        absolute_gap: float = 0.0,
        threads: int = 1,
        seed: int = 0,
    ) -> Outcome:
        """Solve within `seconds`. `absolute_gap`: stop once bound - objective is no more than that."""
        import highspy
        from scipy.sparse import coo_matrix

        if seconds <= 0.02:
            return Outcome(None, -INFINITY, INFINITY, False, False)
        rows, columns, values = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        matrix = coo_matrix((values, (rows, columns)), shape=(self.rows, self.columns)).tocsc()
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = self.columns, self.rows
        model.col_cost_ = np.concatenate(self.cost)
        model.col_lower_, model.col_upper_ = np.concatenate(self.lower), np.concatenate(self.upper)
        model.row_lower_, model.row_upper_ = np.concatenate(self.row_lower), np.concatenate(self.row_upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        model.a_matrix_.start_, model.a_matrix_.index_ = matrix.indptr, matrix.indices
        model.a_matrix_.value_ = matrix.data
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        integer = np.concatenate(self.integer)
        if integer.any():
            model.integrality_ = [kinds[int(one)] for one in integer]
        model.sense_ = highspy.ObjSense.kMaximize
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", threads)
        solver.setOptionValue("random_seed", seed)
        solver.setOptionValue("time_limit", float(seconds))
        solver.setOptionValue("mip_rel_gap", 0.0)
        solver.setOptionValue("mip_abs_gap", max(1e-6, absolute_gap))
        solver.passModel(model)
        if start is not None:
            hint = highspy.HighsSolution()
            hint.col_value = list(start)
            solver.setSolution(hint)
        solver.run()
        return _outcome(solver, bool(integer.any()))


def _outcome(solver: "highspy.Highs", mixed: bool) -> Outcome:  # type: ignore[name-defined]  # noqa: F821
    import highspy

    status, info = solver.getModelStatus(), solver.getInfo()
    infeasible = status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible)
    optimal = status == highspy.HighsModelStatus.kOptimal
    if infeasible:
        return Outcome(None, -INFINITY, -INFINITY, True, True)
    feasible = info.primal_solution_status == 2
    bound = float(info.mip_dual_bound) if mixed else (float(info.objective_function_value) if optimal else INFINITY)
    values = np.array(solver.getSolution().col_value) if feasible else None
    objective = float(info.objective_function_value) if feasible else -INFINITY
    return Outcome(values, objective, bound, optimal, False)
