"""What changes while a solver tries moves: free room per node, where each VM is, who is with whom.

`apply` and `undo` touch only the few numbers a move changes (a few microseconds each). Everything else here is a
vectorised question about all places at once: where does it fit, where is it allowed, what would it gain.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from central.planner.model.cluster import Bools, Cluster, Ints
from central.planner.model.objective import Objective, SlotTerm

Floats = npt.NDArray[np.float64]


class State:
    """A cluster in the middle of a plan."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.free_cores = cluster.free_cores.copy()
        self.free_mem_mb = cluster.free_mem_mb.copy()
        self.vm_place = cluster.vm_place.copy()
        self.history: list[tuple[int, int, int]] = []  # (vm, from, to)
        self._parts = [
            [
                (int(cluster.group_cores[g, i]), int(cluster.group_mem_mb[g, i]))
                for i in range(int(cluster.group_arity[g]))
            ]
            for g in range(cluster.groups)
        ]
        self._nodes = [[int(n) for n in row if n >= 0] for row in cluster.place_nodes]
        self._group = cluster.vm_group.tolist()
        # residents[set, domain]: members there now, VMs on PMs that are not ACTIVE included
        width = int(cluster.set_domain.max()) + 1 if cluster.set_domain.size else 0
        self.residents: Ints = np.zeros((len(cluster.set_members), width), dtype=np.int64)
        for number, members in enumerate(cluster.set_members):
            pms = [cluster.mapping.vms[member].pm for member in members]
            np.add.at(self.residents[number], cluster.set_domain[number, pms], 1)

    def copy(self) -> "State":
        """An independent state with the same content and an empty history."""
        twin = object.__new__(State)
        twin.__dict__.update(self.__dict__)
        twin.free_cores, twin.free_mem_mb = self.free_cores.copy(), self.free_mem_mb.copy()
        twin.vm_place, twin.residents, twin.history = self.vm_place.copy(), self.residents.copy(), []
        return twin

    def apply(self, vm: int, place: int) -> None:
        """Move `vm` to `place`. Whether it fits and may is the caller's to know."""
        source = int(self.vm_place[vm])
        self._shift(vm, source, place)
        self.history.append((vm, source, place))

    def undo(self) -> None:
        """Take the last move back."""
        vm, source, place = self.history.pop()
        self._shift(vm, place, source)

    def _shift(self, vm: int, source: int, place: int) -> None:
        free_cores, free_mem_mb = self.free_cores, self.free_mem_mb
        parts = self._parts[self._group[vm]]
        for (cores, mem_mb), node in zip(parts, self._nodes[source], strict=True):
            free_cores[node] += cores
            free_mem_mb[node] += mem_mb
        for (cores, mem_mb), node in zip(parts, self._nodes[place], strict=True):
            free_cores[node] -= cores
            free_mem_mb[node] -= mem_mb
        self.vm_place[vm] = place
        for number in self.cluster.vm_sets[vm]:
            domain = self.cluster.set_domain[number]
            self.residents[number, domain[self.cluster.place_pm[source]]] -= 1
            self.residents[number, domain[self.cluster.place_pm[place]]] += 1

    def fits(self, group: int) -> Bools:
        """(places of the group's kind,) where one more of the group fits now."""
        cluster = self.cluster
        places = cluster.group_places[group]
        nodes = cluster.place_nodes[places.start : places.stop]
        result: Bools = np.ones(len(places), dtype=np.bool_)
        for part in range(int(cluster.group_arity[group])):
            node = nodes[:, part]
            result &= self.free_cores[node] >= cluster.group_cores[group, part]
            result &= self.free_mem_mb[node] >= cluster.group_mem_mb[group, part]
        return result

    def fits_at(self, group: int, place: int) -> bool:
        """Whether one more of the group fits at one place now."""
        return all(
            self.free_cores[node] >= cores and self.free_mem_mb[node] >= mem_mb
            for (cores, mem_mb), node in zip(self._parts[group], self._nodes[place], strict=True)
        )

    def fits_vm_at(self, vm: int, place: int) -> bool:
        """Whether the VM fits at `place` once it has left where it is (they may share a node).

        The source of a live migration is given up only at the end, but on a node that is in both places the VM's
        memory and cores are its own.
        """
        group, source = self._group[vm], int(self.vm_place[vm])
        if self.cluster.place_pm[source] != self.cluster.place_pm[place]:
            return self.fits_at(group, place)
        own = dict(zip(self._nodes[source], self._parts[group], strict=True))
        for (cores, mem_mb), node in zip(self._parts[group], self._nodes[place], strict=True):
            mine = own.get(node, (0, 0))
            if self.free_cores[node] + mine[0] < cores or self.free_mem_mb[node] + mine[1] < mem_mb:
                return False
        return True

    def forbidden_pms(self, vm: int) -> Bools | None:
        """(PMs,) where anti-affinity keeps the VM away from; None if it is in no set."""
        sets = self.cluster.vm_sets[vm]
        if not sets:
            return None
        pm = self.cluster.place_pm[self.vm_place[vm]]
        result: Bools = np.zeros(self.cluster.set_domain.shape[1], dtype=np.bool_)
        for number in sets:
            domain = self.cluster.set_domain[number]
            others = self.residents[number] > 0
            others[domain[pm]] = False  # alone there, or broken already: staying in the domain breaks nothing more
            result |= others[domain]
        return result

    def allowed_at(self, vm: int, pm: int) -> bool:
        """Whether anti-affinity lets the VM go to that PM now."""
        own = self.cluster.place_pm[self.vm_place[vm]]
        for number in self.cluster.vm_sets[vm]:
            domain = self.cluster.set_domain[number]
            if domain[own] != domain[pm] and self.residents[number, domain[pm]] > 0:
                return False
        return True


@dataclass(frozen=True)
class Valuation:
    """An objective over the arrays of one cluster: `value` is what solvers maximise, in slots of the first term.

    The objective is then `base - scale * value` (base: with no slot at all).
    """

    terms: tuple[SlotTerm, ...]
    coefficients: tuple[float, ...]
    scale: float
    base: float

    @staticmethod
    def of(objective: Objective, cluster: Cluster) -> "Valuation":
        """Coefficients of `objective` for this cluster's free resources."""
        cores = max(1, int(cluster.free_cores[cluster.node_active].sum()))
        mem_mb = max(1, int(cluster.free_mem_mb[cluster.node_active].sum()))
        per_slot = [
            term.weight * term.nodes * (term.cores / cores if term.cores else term.mem_mb / mem_mb)
            for term in objective.terms
        ]
        base = sum(term.weight for term in objective.terms)
        return Valuation(objective.terms, tuple(one / per_slot[0] for one in per_slot), per_slot[0], base)

    @property
    def by_node(self) -> bool:
        """Whether every term asks for one node only: then value is a sum over nodes."""
        return all(term.nodes == 1 for term in self.terms)

    def node_value(self, free_cores: Ints, free_mem_mb: Ints) -> Floats:
        """Value of nodes with that much free, terms on one node only; any shape."""
        total: Floats = np.zeros(free_cores.shape)
        for term, coefficient in zip(self.terms, self.coefficients, strict=True):
            if term.nodes == 1:
                total += coefficient * _fit(term, free_cores, free_mem_mb)
        return total

    def value(self, cluster: Cluster, free_cores: Ints, free_mem_mb: Ints) -> float:
        """Value of the whole cluster."""
        active = cluster.node_active
        total = float(self.node_value(free_cores[active], free_mem_mb[active]).sum())
        if not self.by_node:
            total += float(self.pm_value(cluster, free_cores, free_mem_mb).sum())
        return total

    def pm_value(self, cluster: Cluster, free_cores: Ints, free_mem_mb: Ints) -> Floats:
        """(PMs,) value of the terms that span several nodes."""
        pms = len(cluster.mapping.pms)
        total: Floats = np.zeros(pms)
        for term, coefficient in zip(self.terms, self.coefficients, strict=True):
            if term.nodes == 1:
                continue
            fit = np.where(cluster.node_active, _fit(term, free_cores, free_mem_mb), 0)
            for count in range(1, int(fit.max(initial=0)) + 1):
                offered = np.bincount(cluster.node_pm, np.minimum(fit, count), pms)
                total += coefficient * (offered >= term.nodes * count)
        return total

    def objective(self, value: float) -> float:
        """The objective (a fragment rate) at that value."""
        return self.base - self.scale * value

    def value_needed(self, goal: float) -> float:
        """The value at which the objective is `goal`."""
        return (self.base - goal) / self.scale


def _fit(term: SlotTerm, free_cores: Ints, free_mem_mb: Ints) -> Ints:
    by_cores = free_cores // term.cores if term.cores else None
    by_mem = free_mem_mb // term.mem_mb if term.mem_mb else None
    if by_cores is None:
        assert by_mem is not None
        return by_mem
    return by_cores if by_mem is None else np.minimum(by_cores, by_mem)
