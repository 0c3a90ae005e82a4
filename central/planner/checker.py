"""The independent checker: replays a plan move by move and recomputes what it is worth.

It shares nothing with the solvers but the frozen data classes, uses plain integers in dictionaries, and trusts
nothing: every move is held against capacity per NUMA node at that moment, anti-affinity at that moment, permission,
ACTIVE machines on both ends and the limits. `check` returns the worth after every move, or the first violation.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from central.planner.model.mapping import Mapping, NumaNode
from central.planner.model.objective import Objective, SlotTerm
from central.planner.model.plan import Move, Place, TermWorth, Worth
from central.planner.model.problem import Limits


@dataclass(frozen=True)
class Report:
    """What the replay found. `worths[0]` is before the first move; `violation` is None for a good plan."""

    worths: tuple[Worth, ...]
    violation: str | None
    vm_places: tuple[Place, ...]


class Replay:
    """The cluster as the checker sees it while it replays."""

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self.place = [Place(vm.pm, tuple(share.node for share in vm.shares)) for vm in mapping.vms]
        self.node: dict[tuple[int, int], NumaNode] = {
            (index, node.number): node for index, pm in enumerate(mapping.pms) for node in pm.nodes
        }
        self.free_cores = {key: node.cores for key, node in self.node.items()}
        self.free_mem_mb = {key: node.mem_mb for key, node in self.node.items()}
        for vm in range(len(mapping.vms)):
            self._take(vm, 1)
        self.sets_of: dict[int, list[int]] = {}
        self.resident: Counter[tuple[int, object]] = Counter()
        for number, group in enumerate(mapping.anti_affinity):
            for member in group.members:
                self.sets_of.setdefault(member, []).append(number)
                self.resident[number, self._domain(number, mapping.vms[member].pm)] += 1
        active = [key for key in self.node if mapping.pms[key[0]].active]
        self.all_free_cores = sum(self.free_cores[key] for key in active)
        self.all_free_mem_mb = sum(self.free_mem_mb[key] for key in active)
        self.changed = {pm for pm, _ in active}  # PMs whose slots `worth` has to count anew
        self.slots: Counter[int] = Counter()
        self.slots_of: dict[tuple[int, int], int] = {}

    def _domain(self, number: int, pm: int) -> object:
        group = self.mapping.anti_affinity[number]
        return pm if group.granularity == "host" else ("rack", self.mapping.pms[pm].rack)

    def _take(self, vm: int, sign: int) -> None:
        place = self.place[vm]
        for share, number in zip(self.mapping.vms[vm].shares, place.nodes, strict=True):
            self.free_cores[place.pm, number] -= sign * share.cores
            self.free_mem_mb[place.pm, number] -= sign * share.mem_mb

    def move(self, move: Move) -> str | None:
        """Carry one move out; the violation as text, or None."""
        vm, target = self.mapping.vms[move.vm], move.target
        if not vm.movable:
            return f"VM {vm.name} does not allow migration"
        if move.source != self.place[move.vm]:
            return f"VM {vm.name} is not where the move takes it from"
        if target == move.source:
            return f"VM {vm.name} is moved to where it is"
        for pm in (move.source.pm, target.pm):
            if not self.mapping.pms[pm].active:
                return f"PM {self.mapping.pms[pm].name} is {self.mapping.pms[pm].status}, not ACTIVE"
        if len(target.nodes) != len(vm.shares) or len(set(target.nodes)) != len(target.nodes):
            return f"VM {vm.name} takes {len(vm.shares)} different NUMA nodes, the move names {list(target.nodes)}"
        self.changed |= {move.source.pm, target.pm}
        self._take(move.vm, -1)
        for number in self.sets_of.get(move.vm, ()):
            self.resident[number, self._domain(number, move.source.pm)] -= 1
        self.place[move.vm] = target
        for share, number in zip(vm.shares, target.nodes, strict=True):
            key = (target.pm, number)
            if key not in self.node:
                return f"PM {self.mapping.pms[target.pm].name} has no NUMA node {number}"
            if self.free_cores[key] < share.cores or self.free_mem_mb[key] < share.mem_mb:
                return (
                    f"PM {self.mapping.pms[target.pm].name} node {number} has {self.free_cores[key]} cores and "
                    f"{self.free_mem_mb[key]} MB free, VM {vm.name} needs {share.cores} and {share.mem_mb}"
                )
        self._take(move.vm, 1)
        for number in self.sets_of.get(move.vm, ()):
            # A live migration runs on both sides for a while, but a VM is no conflict with itself.
            domain = (number, self._domain(number, target.pm))
            if self.resident[domain] > 0 and self._domain(number, move.source.pm) != domain[1]:
                kind = self.mapping.anti_affinity[number].granularity
                return f"VM {vm.name} would share a {kind} with another of anti-affinity set {number}"
            self.resident[domain] += 1
        return None

    def together(self, moves: Sequence[Move]) -> str | None:
        """Whether all of `moves` fit while none of their VMs has left yet; the violation as text, or None."""
        arriving: Counter[tuple[int, int, str]] = Counter()
        joining: Counter[tuple[int, object]] = Counter()
        for move in moves:
            for share, number in zip(self.mapping.vms[move.vm].shares, move.target.nodes, strict=True):
                arriving[move.target.pm, number, "cores"] += share.cores
                arriving[move.target.pm, number, "mem"] += share.mem_mb
            for number in self.sets_of.get(move.vm, ()):
                domain = self._domain(number, move.target.pm)
                if domain != self._domain(number, move.source.pm):
                    joining[number, domain] += 1
        for (pm, number, what), amount in arriving.items():
            if amount > (self.free_cores if what == "cores" else self.free_mem_mb)[pm, number]:
                return f"PM {self.mapping.pms[pm].name} node {number} has no room for all of it at once"
        for key, count in joining.items():
            if self.resident[key] + count > 1:
                return f"two of anti-affinity set {key[0]} would be together for a while"
        return None

    def worth(self, objective: Objective) -> Worth:
        """Slots and fragment rate of the cluster as it is now; counts anew only the PMs that changed."""
        nodes_of: dict[int, list[tuple[int, int]]] = {pm: [] for pm in self.changed}
        for pm in self.changed:
            for node in self.mapping.pms[pm].nodes:
                nodes_of[pm].append((self.free_cores[pm, node.number], self.free_mem_mb[pm, node.number]))
        terms = []
        total = 0.0
        for position, term in enumerate(objective.terms):
            for pm, nodes in nodes_of.items():
                now = _slots(nodes, term)
                self.slots[position] += now - self.slots_of.get((position, pm), 0)
                self.slots_of[position, pm] = now
            free, used = (self.all_free_cores, term.cores) if term.cores else (self.all_free_mem_mb, term.mem_mb)
            rate = 1.0 - self.slots[position] * used * term.nodes / free if free else 0.0
            terms.append(TermWorth(term.label, self.slots[position], rate))
            total += term.weight * rate
        self.changed = set()
        return Worth(total, tuple(terms))


def _slots(nodes: Sequence[tuple[int, int]], term: SlotTerm) -> int:
    """How often `term` fits on one PM whose nodes have these (cores, MB) free."""
    fits = []
    for cores, mem_mb in nodes:
        by_cores = cores // term.cores if term.cores else None
        by_mem = mem_mb // term.mem_mb if term.mem_mb else None
        fits.append(min(count for count in (by_cores, by_mem) if count is not None))
    if term.nodes == 1:
        return sum(fits)
    count = 0
    # `count + 1` requests on `term.nodes` different nodes each fit if the nodes offer enough, none more than once each.
    while sum(min(fit, count + 1) for fit in fits) >= term.nodes * (count + 1):
        count += 1
    return count


def check(mapping: Mapping, moves: Sequence[Move], objective: Objective, limits: Limits) -> Report:
    """Replay `moves`; stops at the first violation. Batches are checked too: see `_batch_violation`."""
    replay = Replay(mapping)
    worths = [replay.worth(objective)]
    touched: Counter[str] = Counter()
    copied_mb = 0

    def stop(position: int, why: str) -> Report:
        return Report(tuple(worths), f"move {position}: {why}", tuple(replay.place))

    for position, move in enumerate(moves):
        vm = mapping.vms[move.vm]
        copied_mb += vm.mem_mb
        touched[f"tenant {vm.tenant}"] += 1
        for pm in {move.source.pm, move.target.pm}:
            touched[f"PM {mapping.pms[pm].name}"] += 1
            if limits.per_pm is not None and touched[f"PM {mapping.pms[pm].name}"] > limits.per_pm:
                return stop(position, f"more than {limits.per_pm} moves touch PM {mapping.pms[pm].name}")
        if position >= limits.mnl:
            return stop(position, f"more than {limits.mnl} moves (MNL)")
        if move.vm in limits.fixed:
            return stop(position, f"VM {vm.name} must stay (cool-down)")
        if limits.max_bytes is not None and copied_mb * 2**20 > limits.max_bytes:
            return stop(position, f"more than {limits.max_bytes} bytes of memory are copied")
        if limits.per_tenant is not None and vm.tenant and touched[f"tenant {vm.tenant}"] > limits.per_tenant:
            return stop(position, f"more than {limits.per_tenant} moves of tenant {vm.tenant}")
        violation = replay.move(move)
        if violation:
            return stop(position, violation)
        worths.append(replay.worth(objective))
    return Report(tuple(worths), _batch_violation(mapping, moves), tuple(replay.place))


def _batch_violation(mapping: Mapping, moves: Sequence[Move]) -> str | None:
    """Moves of one batch must be possible together: in the worst case all arrive before any of them has left."""
    if any(later.batch < earlier.batch for earlier, later in pairwise(moves)):
        return "batches are not in ascending order"
    replay = Replay(mapping)
    for batch in sorted({move.batch for move in moves}):
        together = [move for move in moves if move.batch == batch]
        if len({move.vm for move in together}) != len(together):
            return f"batch {batch} moves a VM twice"
        violation = replay.together(together)
        if violation:
            return f"batch {batch}: {violation}"
        for move in together:
            replay.move(move)
    return None
