"""Seeded mappings of the published shapes, because the authors' data cannot be had.

Logic: VM sizes are drawn from a base mix, tilted so that the wanted number of VMs fills the wanted share of all cores;
VMs arrive one by one and go to the fullest of a few PMs drawn at random (what an online allocator under load does);
then VMs leave and others arrive (`churn`), which is what makes fragments. Affinity sets, racks, tenants, VMs that may
not move and hosts that are down are added last. Same shape and seed: same mapping.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from central.planner.model.mapping import (
    ACTIVE,
    AntiAffinity,
    Mapping,
    NumaNode,
    PhysicalMachine,
    Share,
    VirtualMachine,
)
from fabricpilot.errors import UsageError

# VM sizes in cores, how common each is before tilting, and how often it is spread over two nodes.
SIZES_CORES = (2, 4, 8, 16, 32, 64, 88)
BASE_MIX = (0.20, 0.28, 0.24, 0.16, 0.08, 0.025, 0.015)
TWO_NODES = (0.0, 0.0, 0.05, 0.15, 0.25, 1.0, 1.0)


@dataclass(frozen=True)
class Shape:
    """What kind of mapping to make."""

    pms: int = 279
    vms: int = 2089
    used_share: float = 0.88  # of all cores
    node_cores: int = 44
    node_mem_mb: int = 184_388
    nodes_per_pm: int = 2
    mem_gb_per_core: tuple[int, ...] = (2,)  # drawn per VM
    churn: float = 1.5  # VMs that leave and are replaced, per VM
    candidates: int = 2  # PMs the allocator looks at
    pms_per_rack: int = 20
    affinity_sets: int = 0
    affinity_share: float = 0.5  # of the VMs, over all sets together
    rack_sets: float = 0.1  # share of the sets that hold for racks
    tenants: int = 40
    immovable_share: float = 0.0
    outage_pms: int = 0
    clusters: int = 1


SHAPES = {
    "tiny": Shape(pms=8, vms=60),
    "small": Shape(pms=40, vms=300),
    "medium": Shape(),
    "large": Shape(pms=1176, vms=4546, used_share=0.80),
    "multi": Shape(mem_gb_per_core=(2, 4, 8), used_share=0.72),
    "affinity": Shape(affinity_sets=300),
}
MOST_TURNED_AWAY = 50  # in a row; then the smallest size comes
# Workload levels of the medium shape (VMR2L trains and tests on several).
LEVELS = {"low": 0.70, "middle": 0.80, "high": 0.88}


def shape(name: str, level: str | None = None) -> Shape:
    """A named shape, at a workload level if one is given.

    Raises:
        UsageError: no such shape or level.
    """
    if name not in SHAPES:
        raise UsageError(f"shape {name!r} is unknown: expected one of {', '.join(SHAPES)}")
    if level is None:
        return SHAPES[name]
    if level not in LEVELS:
        raise UsageError(f"level {level!r} is unknown: expected one of {', '.join(LEVELS)}")
    wanted = LEVELS[level]
    return replace(SHAPES[name], used_share=wanted, vms=round(SHAPES[name].vms * wanted / SHAPES[name].used_share))


def generate(kind: Shape, seed: int) -> Mapping:
    """A mapping of that shape; the same for the same seed."""
    return _Yard(kind, seed).mapping(seed)


class _Yard:
    """The cluster while it fills."""

    def __init__(self, kind: Shape, seed: int) -> None:
        self.kind = kind
        self.random = np.random.default_rng(seed)
        self.cores = np.full((kind.pms, kind.nodes_per_pm), kind.node_cores, dtype=np.int64)
        self.mem_mb = np.full((kind.pms, kind.nodes_per_pm), kind.node_mem_mb, dtype=np.int64)
        self.vms: list[tuple[int, tuple[int, ...], int, int, int]] = []  # pm, nodes, cores and MB per node, type
        self.mix = self._tilted()
        for _ in range(int((1 + kind.churn) * kind.vms)):
            while len(self.vms) >= kind.vms:
                self._leave()
            self._arrive()
        while len(self.vms) < kind.vms:
            self._arrive()

    def _tilted(self) -> npt.NDArray[np.float64]:
        """The base mix times exp(t * cores), t such that the mean is what the used share asks for."""
        kind = self.kind
        sizes = np.array([size for size in SIZES_CORES if size <= kind.node_cores * kind.nodes_per_pm], dtype=float)
        base = np.array(BASE_MIX[: len(sizes)])
        wanted = kind.used_share * kind.pms * kind.nodes_per_pm * kind.node_cores / kind.vms
        low, high = -1.0, 1.0
        mix = base
        for _ in range(60):
            tilt = (low + high) / 2
            mix = base * np.exp(tilt * sizes)
            mix /= mix.sum()
            low, high = (tilt, high) if mix @ sizes < wanted else (low, tilt)
        return mix

    def _arrive(self) -> None:
        kind, random = self.kind, self.random
        tries = 0
        while True:  # a size that fits nowhere is turned away, as the real allocator does, and another one comes
            size = int(random.choice(len(self.mix), p=self.mix)) if tries < MOST_TURNED_AWAY else 0
            total = SIZES_CORES[size]
            spread = kind.nodes_per_pm > 1 and (total > kind.node_cores or random.random() < TWO_NODES[size])
            parts = 2 if spread else 1
            cores = total // parts
            mem_mb = cores * int(random.choice(kind.mem_gb_per_core)) * 1024
            fits = (self.cores >= cores) & (self.mem_mb >= mem_mb)
            able = np.flatnonzero(fits.sum(axis=1) >= parts)
            if able.size:
                break
            tries += 1
            if tries > 2 * MOST_TURNED_AWAY:  # not even the smallest: the cluster is full, so somebody leaves
                self._leave()
                tries = 0
        seen = random.choice(able, size=min(kind.candidates, able.size), replace=False)
        pm = int(seen[np.argmin(self.cores[seen].sum(axis=1))])
        nodes = np.flatnonzero(fits[pm])
        nodes = nodes[np.argsort(self.cores[pm, nodes], kind="stable")][:parts]
        self.cores[pm, nodes] -= cores
        self.mem_mb[pm, nodes] -= mem_mb
        self.vms.append((pm, tuple(sorted(int(node) for node in nodes)), cores, mem_mb, total))

    def _leave(self) -> None:
        chosen = int(self.random.integers(len(self.vms)))
        self.vms[chosen], self.vms[-1] = self.vms[-1], self.vms[chosen]
        pm, nodes, cores, mem_mb, _ = self.vms.pop()
        self.cores[pm, list(nodes)] += cores
        self.mem_mb[pm, list(nodes)] += mem_mb

    def mapping(self, seed: int) -> Mapping:
        """The frozen mapping, with everything that is added at the end."""
        kind, random = self.kind, self.random
        per_cluster = -(-kind.pms // kind.clusters)
        down = set(random.choice(kind.pms, kind.outage_pms, replace=False).tolist()) if kind.outage_pms else set()
        numa = tuple(NumaNode(number, kind.node_cores, kind.node_mem_mb) for number in range(kind.nodes_per_pm))
        pms = tuple(
            PhysicalMachine(
                f"pm-{index:04d}",
                numa,
                f"rack-{index // kind.pms_per_rack:03d}",
                "OUTAGE" if index in down else ACTIVE,
                f"cluster-{index // per_cluster}",
            )
            for index in range(kind.pms)
        )
        order = random.permutation(len(self.vms))
        still = random.random(len(self.vms)) < kind.immovable_share
        weight = 1.0 / np.arange(1, kind.tenants + 1)
        tenant = random.choice(kind.tenants, len(self.vms), p=weight / weight.sum())
        vms = []
        for index, position in enumerate(order):
            pm, nodes, cores, mem_mb, total = self.vms[position]
            vms.append(
                VirtualMachine(
                    f"vm-{index:05d}",
                    pm,
                    tuple(Share(node, cores, mem_mb) for node in nodes),
                    f"{total}c{mem_mb * len(nodes) // 1024}g" + ("-2numa" if len(nodes) > 1 else ""),
                    not bool(still[index]),
                    f"tenant-{tenant[index]:02d}",
                )
            )
        sets = self._affinity(vms)
        types = tuple(sorted({vm.type_name for vm in vms}))
        return Mapping(pms, tuple(vms), sets, types, None, name=f"generated, seed {seed}")

    def _affinity(self, vms: list[VirtualMachine]) -> tuple[AntiAffinity, ...]:
        """Disjoint sets of VMs that already are apart, over `affinity_share` of the VMs."""
        kind = self.kind
        if not kind.affinity_sets:
            return ()
        chosen = self.random.permutation(len(vms))[: int(kind.affinity_share * len(vms))]
        racks = self.random.random(kind.affinity_sets) < kind.rack_sets
        members: list[list[int]] = [[] for _ in range(kind.affinity_sets)]
        taken: list[set[int]] = [set() for _ in range(kind.affinity_sets)]
        for turn, vm in enumerate(chosen.tolist()):
            for step in range(50):
                number = (turn + step) % kind.affinity_sets
                domain = vms[vm].pm // kind.pms_per_rack if racks[number] else vms[vm].pm
                if domain not in taken[number] and len(members[number]) < 8:
                    taken[number].add(domain)
                    members[number].append(vm)
                    break
        return tuple(
            AntiAffinity(tuple(sorted(group)), "rack" if racks[number] else "host", "cluster-0")
            for number, group in enumerate(members)
            if len(group) > 1
        )
