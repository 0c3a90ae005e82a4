"""A mapping: which VM is on which PM and NUMA nodes. Frozen; the one description checker, solvers and formats share.

Positions in `pms` and `vms` identify machines inside the planner; `name` is what the operator calls them.
`check_mapping` refuses a mapping that contradicts itself, naming the object.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from fabricpilot.errors import UsageError

Name = int | str
Granularity = Literal["host", "rack"]
ACTIVE = "ACTIVE"


@dataclass(frozen=True)
class NumaNode:
    """Size of one NUMA node."""

    number: int
    cores: int
    mem_mb: int


@dataclass(frozen=True)
class PhysicalMachine:
    """A server. Only one whose status is ACTIVE gives VMs away, takes them, or counts in the fragment rate."""

    name: Name
    nodes: tuple[NumaNode, ...]
    rack: Name = ""
    status: str = ACTIVE
    cluster: str = ""

    @property
    def active(self) -> bool:
        """Whether it takes part in planning."""
        return self.status == ACTIVE


@dataclass(frozen=True)
class Share:
    """What a VM takes on one NUMA node (by the node's number)."""

    node: int
    cores: int
    mem_mb: int


@dataclass(frozen=True)
class VirtualMachine:
    """A VM and where it runs: `pm` is a position in `Mapping.pms`, one share per NUMA node it spans."""

    name: Name
    pm: int
    shares: tuple[Share, ...]
    type_name: str = ""
    movable: bool = True
    tenant: str = ""

    @property
    def mem_mb(self) -> int:
        """Memory a migration has to copy."""
        return sum(share.mem_mb for share in self.shares)

    @property
    def cores(self) -> int:
        """Cores over all its nodes."""
        return sum(share.cores for share in self.shares)


@dataclass(frozen=True)
class AntiAffinity:
    """No two `members` (positions in `Mapping.vms`) may share a PM ("host") or a rack ("rack")."""

    members: tuple[int, ...]
    granularity: Granularity = "host"
    cluster: str = ""


@dataclass(frozen=True)
class Mapping:
    """A whole cluster at one moment."""

    pms: tuple[PhysicalMachine, ...]
    vms: tuple[VirtualMachine, ...]
    anti_affinity: tuple[AntiAffinity, ...] = ()
    vm_types: tuple[str, ...] = ()
    maximum_migration: int | None = None
    name: str = field(default="mapping", compare=False)

    @cached_property
    def pm_by_name(self) -> dict[str, int]:
        """Position of each PM by its name as text."""
        return {str(pm.name): index for index, pm in enumerate(self.pms)}

    @cached_property
    def vm_by_name(self) -> dict[str, int]:
        """Position of each VM by its name as text."""
        return {str(vm.name): index for index, vm in enumerate(self.vms)}


def check_mapping(mapping: Mapping) -> None:
    """Refuse a mapping that contradicts itself.

    Raises:
        UsageError: duplicate names, a share on an unknown node or twice on one node, a node with more given away than
            it has. The message names the object. Affinity sets that are broken already are no error: a plan may not
            break more, and may heal them.
    """
    for kind, names in (("PM", [pm.name for pm in mapping.pms]), ("VM", [vm.name for vm in mapping.vms])):
        twice = [name for name, count in Counter(map(str, names)).items() if count > 1]
        if twice:
            raise UsageError(f"{kind} {twice[0]} appears twice: names must be unique in a mapping")
    for pm in mapping.pms:
        if not pm.nodes:
            raise UsageError(f"PM {pm.name} has no NUMA node: give at least one")
        if len({node.number for node in pm.nodes}) != len(pm.nodes):
            raise UsageError(f"PM {pm.name} names a NUMA node twice")
        for node in pm.nodes:
            if node.cores < 0 or node.mem_mb < 0:
                raise UsageError(f"PM {pm.name} node {node.number} has a negative size")
    used: Counter[tuple[int, int, str]] = Counter()
    for vm in mapping.vms:
        _check_vm(mapping, vm)
        for share in vm.shares:
            used[vm.pm, share.node, "cores"] += share.cores
            used[vm.pm, share.node, "mem_mb"] += share.mem_mb
    for index, pm in enumerate(mapping.pms):
        for node in pm.nodes:
            for what, size in (("cores", node.cores), ("mem_mb", node.mem_mb)):
                if used[index, node.number, what] > size:
                    raise UsageError(
                        f"PM {pm.name} node {node.number} is over-committed: its VMs take "
                        f"{used[index, node.number, what]} {what} of {size}"
                    )
    for number, group in enumerate(mapping.anti_affinity):
        if len(set(group.members)) != len(group.members):
            raise UsageError(f"anti-affinity set {number} names a VM twice")


def _check_vm(mapping: Mapping, vm: VirtualMachine) -> None:
    numbers = {node.number for node in mapping.pms[vm.pm].nodes}
    if not vm.shares:
        raise UsageError(f"VM {vm.name} takes nothing: give its cores and memory on at least one NUMA node")
    if len({share.node for share in vm.shares}) != len(vm.shares):
        raise UsageError(f"VM {vm.name} names a NUMA node twice")
    for share in vm.shares:
        if share.node not in numbers:
            raise UsageError(f"VM {vm.name} is on NUMA node {share.node}, which PM {mapping.pms[vm.pm].name} has not")
        if share.cores < 0 or share.mem_mb < 0:
            raise UsageError(f"VM {vm.name} takes a negative amount on NUMA node {share.node}")
