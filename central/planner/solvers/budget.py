"""What of the limits is still left while a heuristic adds moves."""

from collections import Counter

from central.planner.model.mapping import Mapping
from central.planner.model.problem import Limits


class Budget:
    """Counts moves, bytes, and moves per PM and tenant against the limits."""

    def __init__(self, mapping: Mapping, limits: Limits) -> None:
        self.mapping = mapping
        self.limits = limits
        self.moves = 0
        self.copied_bytes = 0
        self.per_pm: Counter[int] = Counter()
        self.per_tenant: Counter[str] = Counter()

    def copy(self) -> "Budget":
        """An independent one with the same counts."""
        twin = Budget(self.mapping, self.limits)
        twin.moves, twin.copied_bytes = self.moves, self.copied_bytes
        twin.per_pm, twin.per_tenant = self.per_pm.copy(), self.per_tenant.copy()
        return twin

    @property
    def moves_left(self) -> int:
        """Moves that MNL still allows."""
        return self.limits.mnl - self.moves

    @property
    def only_mnl(self) -> bool:
        """Whether MNL is the only limit (caps and bytes need no look at every VM then)."""
        limits = self.limits
        return limits.max_bytes is None and limits.per_pm is None and limits.per_tenant is None

    def allows(self, vm: int, source_pm: int, target_pm: int) -> bool:
        """Whether one more move of this VM is within every limit."""
        limits, machine = self.limits, self.mapping.vms[vm]
        if self.moves >= limits.mnl or vm in limits.fixed:
            return False
        if limits.max_bytes is not None and self.copied_bytes + machine.mem_mb * 2**20 > limits.max_bytes:
            return False
        if limits.per_pm is not None and max(self.per_pm[pm] for pm in (source_pm, target_pm)) >= limits.per_pm:
            return False
        if limits.per_tenant is None or not machine.tenant:
            return True
        return self.per_tenant[machine.tenant] < limits.per_tenant

    def spend(self, vm: int, source_pm: int, target_pm: int, sign: int = 1) -> None:
        """Count a move, or take it back with `sign` -1."""
        self.moves += sign
        self.copied_bytes += sign * self.mapping.vms[vm].mem_mb * 2**20
        for pm in {source_pm, target_pm}:
            self.per_pm[pm] += sign
        self.per_tenant[self.mapping.vms[vm].tenant] += sign
