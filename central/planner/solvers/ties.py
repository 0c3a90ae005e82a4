"""The rows that tie PMs together in the master program of `columns`, and the columns that enter them.

In order: one row per group (as many VMs arrive as leave), the moves, the MB copied, the moves of each tenant.
"""

from dataclasses import dataclass

import numpy as np

from central.planner.model.cluster import Cluster, Ints
from central.planner.model.problem import Limits
from central.planner.model.state import Floats
from central.planner.solvers.budget import Budget
from central.planner.solvers.program import INFINITY


@dataclass(frozen=True)
class Pattern:
    """A column. `ties` are its coefficients in the rows of `Ties`; `leavers` the VMs that leave, where that matters."""

    pm: int
    gain: float
    ties: Floats
    counts: Ints  # into node 0 (A), out of 0 (A), into 1, out of 1, pairs in (B), pairs out (B)
    leavers: tuple[int, ...]
    known: bool  # part of the plan that the search started from: together these always are a solution


class Ties:
    """The rows that tie PMs together, and their limits."""

    def __init__(self, cluster: Cluster, limits: Limits, spent: Budget | None) -> None:
        self.groups = cluster.groups
        capped = limits.per_tenant is not None
        names = dict.fromkeys(vm.tenant for vm in cluster.mapping.vms if vm.tenant and capped)
        self.tenant_row = {name: self.groups + 2 + row for row, name in enumerate(names)}
        self.size = self.groups + 2 + len(names)
        self.upper: Floats = np.zeros(self.size)
        self.upper[self.groups] = limits.mnl
        self.upper[self.groups + 1] = INFINITY if limits.max_bytes is None else limits.max_bytes // 2**20
        for name, row in self.tenant_row.items():
            used = spent.per_tenant[name] if spent else 0
            self.upper[row] = max(0, (limits.per_tenant or 0) - used)
        self.lower: Floats = np.full(self.size, -INFINITY)
        self.lower[: self.groups] = 0.0
        # The tenant's row of every VM, -1 where its moves are not counted.
        self.row_of_vm: Ints = np.array([self.tenant_row.get(vm.tenant, -1) for vm in cluster.mapping.vms])

    def sensible(self, duals: Floats) -> Floats:
        """Duals of the limits are not negative, and there is none where there is no limit."""
        result = duals.copy()
        result[self.groups :] = np.maximum(result[self.groups :], 0.0)
        result[~np.isfinite(self.upper)] = 0.0
        return result

    def worth(self, duals: Floats) -> float:
        """Limits times prices."""
        held = np.isfinite(self.upper)
        return float(self.upper[held] @ duals[held])
