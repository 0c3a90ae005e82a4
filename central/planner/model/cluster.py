"""A mapping as arrays, the form every solver works on. Built once, never changed; `state.State` holds what changes.

NUMA nodes of all PMs are numbered through. A *group* is a kind of VM: all that take the same cores and memory on the
same number of nodes are interchangeable as far as room goes (and of the same tenant if `by_tenant`). That is what
makes the exact solver small: thousands of VMs, a dozen groups. A *place* is an ordered choice of nodes of one ACTIVE
PM that a group's shares can go to; places are numbered through, those of one *kind* (number of shares, and whether
the shares are all alike, so that order does not matter) in one range.
"""

from collections.abc import Sequence
from itertools import combinations, permutations

import numpy as np
import numpy.typing as npt

from central.planner.model.mapping import Mapping, Share
from central.planner.model.plan import Place

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
GroupKey = tuple[tuple[tuple[int, int], ...], str]


class Cluster:
    """Arrays of one mapping. Read-only by convention.

    Shapes: N nodes, P places, V VMs, G groups, M PMs, A the most shares a VM has, S anti-affinity sets.

    Attributes:
        node_pm: (N,) PM of each node.
        node_cores, node_mem_mb: (N,) size.
        node_active: (N,) whether its PM is ACTIVE.
        place_nodes: (P, A) nodes of each place, -1 beyond its arity.
        place_pm: (P,) PM of each place.
        pm_nodes: (M, most nodes of a PM) nodes of each PM, -1 beyond its number.
        group_cores, group_mem_mb: (G, A) what each share takes, 0 beyond the arity.
        group_arity: (G,) number of shares.
        group_places: per group, the range of places of its kind.
        vm_group: (V,) group of each VM.
        vm_place: (V,) place of each VM in the mapping, -1 if its PM is not ACTIVE.
        vm_movable: (V,) may it move at all (allowed, on an ACTIVE PM, not fixed).
        set_members: per set, its VMs; vm_sets: per VM, its sets.
        set_domain: (S, M) which domain (PM or rack) each PM is to each set.
        free_cores, free_mem_mb: (N,) in the mapping.
    """

    def __init__(self, mapping: Mapping, fixed: frozenset[int] = frozenset(), by_tenant: bool = False) -> None:
        self.mapping = mapping
        self._build_nodes(mapping)
        self._build_groups(mapping, by_tenant)
        self._build_places(mapping)
        self.vm_movable: Bools = np.array(
            [vm.movable and mapping.pms[vm.pm].active and index not in fixed for index, vm in enumerate(mapping.vms)],
            dtype=np.bool_,
        )
        self._build_sets(mapping)

    def _build_nodes(self, mapping: Mapping) -> None:
        self.first_node: list[int] = []
        self.node_at: dict[tuple[int, int], int] = {}
        pm_of: list[int] = []
        cores: list[int] = []
        mem_mb: list[int] = []
        for index, pm in enumerate(mapping.pms):
            self.first_node.append(len(pm_of))
            for node in pm.nodes:
                self.node_at[index, node.number] = len(pm_of)
                pm_of.append(index)
                cores.append(node.cores)
                mem_mb.append(node.mem_mb)
        self.node_pm: Ints = np.array(pm_of, dtype=np.int64)
        self.node_cores: Ints = np.array(cores, dtype=np.int64)
        self.node_mem_mb: Ints = np.array(mem_mb, dtype=np.int64)
        self.node_active: Bools = np.array([mapping.pms[pm].active for pm in pm_of], dtype=np.bool_)
        self.free_cores: Ints = self.node_cores.copy()
        self.free_mem_mb: Ints = self.node_mem_mb.copy()
        for vm in mapping.vms:
            for share in vm.shares:
                held = self.node_at[vm.pm, share.node]
                self.free_cores[held] -= share.cores
                self.free_mem_mb[held] -= share.mem_mb

    def _build_groups(self, mapping: Mapping, by_tenant: bool) -> None:
        found: dict[GroupKey, int] = {}
        of_vm = []
        for vm in mapping.vms:
            shares = tuple(sorted(((share.cores, share.mem_mb) for share in vm.shares), reverse=True))
            of_vm.append(found.setdefault((shares, vm.tenant if by_tenant else ""), len(found)))
        keys = list(found)
        widest = max((len(shares) for shares, _ in keys), default=1)
        self.vm_group: Ints = np.array(of_vm, dtype=np.int64)
        self.group_cores: Ints = np.zeros((len(keys), widest), dtype=np.int64)
        self.group_mem_mb: Ints = np.zeros((len(keys), widest), dtype=np.int64)
        for group, (shares, _) in enumerate(keys):
            for position, (cores, mem_mb) in enumerate(shares):
                self.group_cores[group, position] = cores
                self.group_mem_mb[group, position] = mem_mb
        self.group_arity: Ints = np.array([len(shares) for shares, _ in keys], dtype=np.int64)
        self.group_tenant: list[str] = [tenant for _, tenant in keys]
        self.group_kind = [(len(shares), len(set(shares)) <= 1) for shares, _ in keys]

    def _build_places(self, mapping: Mapping) -> None:
        self.place_at: dict[tuple[bool, tuple[int, ...]], int] = {}
        rows: list[tuple[int, ...]] = []
        ranges: dict[tuple[int, bool], range] = {}
        for arity, alike in sorted(set(self.group_kind)):
            start = len(rows)
            for index, pm in enumerate(mapping.pms):
                if pm.active:
                    nodes = range(self.first_node[index], self.first_node[index] + len(pm.nodes))
                    chosen = combinations(nodes, arity) if alike else permutations(nodes, arity)
                    for row in chosen:
                        self.place_at[alike, row] = len(rows)
                        rows.append(row)
            ranges[arity, alike] = range(start, len(rows))
        widest = self.group_cores.shape[1]
        self.place_nodes: Ints = np.full((len(rows), widest), -1, dtype=np.int64)
        for position, row in enumerate(rows):
            self.place_nodes[position, : len(row)] = row
        self.place_pm: Ints = self.node_pm[self.place_nodes[:, 0]] if rows else np.zeros(0, dtype=np.int64)
        most = max((len(pm.nodes) for pm in mapping.pms), default=1)
        self.pm_nodes: Ints = np.full((len(mapping.pms), most), -1, dtype=np.int64)
        for index, pm in enumerate(mapping.pms):
            self.pm_nodes[index, : len(pm.nodes)] = self.first_node[index] + np.arange(len(pm.nodes))
        self.group_places: list[range] = [ranges[kind] for kind in self.group_kind]
        self.vm_place: Ints = np.array([self._place_of(index) for index in range(len(mapping.vms))], dtype=np.int64)

    def _place_of(self, index: int) -> int:
        vm = self.mapping.vms[index]
        if not self.mapping.pms[vm.pm].active:
            return -1
        alike = self.group_kind[self.vm_group[index]][1]
        nodes = [self.node_at[vm.pm, share.node] for share in self._ordered(index)]
        return self.place_at[alike, tuple(sorted(nodes) if alike else nodes)]

    def _ordered(self, index: int) -> Sequence[Share]:
        """The VM's shares in the order of its group: largest first."""
        return sorted(self.mapping.vms[index].shares, key=lambda share: (share.cores, share.mem_mb), reverse=True)

    def _build_sets(self, mapping: Mapping) -> None:
        self.set_members = [np.array(group.members, dtype=np.int64) for group in mapping.anti_affinity]
        self.vm_sets: list[list[int]] = [[] for _ in mapping.vms]
        rack_number: dict[str, int] = {}
        rack_of = [rack_number.setdefault(str(pm.rack), len(rack_number)) for pm in mapping.pms]
        pm_of = list(range(len(mapping.pms)))
        self.set_domain: Ints = np.array(
            [pm_of if group.granularity == "host" else rack_of for group in mapping.anti_affinity], dtype=np.int64
        ).reshape(len(mapping.anti_affinity), len(mapping.pms))
        for number, group in enumerate(mapping.anti_affinity):
            for member in group.members:
                self.vm_sets[member].append(number)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.group_arity)

    def nodes_of(self, place: int) -> Ints:
        """Nodes of a place, without the padding."""
        row = self.place_nodes[place]
        nodes: Ints = row[row >= 0]
        return nodes

    def target(self, vm: int, place: int) -> Place:
        """The place as a plan names it: node numbers in the order of the VM's own shares."""
        pm = int(self.place_pm[place])
        first = self.first_node[pm]
        numbers = [self.mapping.pms[pm].nodes[int(node) - first].number for node in self.nodes_of(place)]
        shares = self.mapping.vms[vm].shares
        order = sorted(range(len(shares)), key=lambda i: (shares[i].cores, shares[i].mem_mb), reverse=True)
        result = [0] * len(shares)
        for position, share in enumerate(order):
            result[share] = numbers[position]
        return Place(pm, tuple(result))

    def place_index(self, vm: int, place: Place) -> int:
        """The inverse of `target`."""
        shares = self.mapping.vms[vm].shares
        order = sorted(range(len(shares)), key=lambda i: (shares[i].cores, shares[i].mem_mb), reverse=True)
        nodes = [self.node_at[place.pm, place.nodes[share]] for share in order]
        alike = self.group_kind[self.vm_group[vm]][1]
        return self.place_at[alike, tuple(sorted(nodes) if alike else nodes)]
