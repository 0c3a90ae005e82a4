"""The published VMR2L mapping format (one JSON object per mapping), read and written.

Clusters in one file are merged; each machine remembers its cluster so that writing separates them again. The
`free_*` fields are never trusted: free is total minus the VMs. Shares of nothing on a node are dropped. A tenant,
which the published files do not have, is read from and written to an optional `tenant` field of a VM instance.
"""

import gzip
from pathlib import Path
from typing import Any, Literal

import msgspec

from central.planner.model.mapping import (
    ACTIVE,
    AntiAffinity,
    Granularity,
    Mapping,
    Name,
    NumaNode,
    PhysicalMachine,
    Share,
    VirtualMachine,
    check_mapping,
)
from fabricpilot.errors import UsageError


class _HostNuma(msgspec.Struct):
    node: int
    total_cpu: int
    memory_huge_total_mb: int


class _Host(msgspec.Struct):
    node_id: Name
    numa: list[_HostNuma]
    status: str = ACTIVE
    rack_id: Name = ""


class _VmNuma(msgspec.Struct):
    node: int
    cpu: int
    mem_mb: int


class _Vm(msgspec.Struct):
    instance_id: Name
    host_id: Name
    numa: list[_VmNuma]
    instance_type: str = ""
    allow_migration: bool = True
    tenant: str = ""


class _Deployment(msgspec.Struct):
    granularity: Literal["host", "rack"]
    data: list[Name]


class _Other(msgspec.Struct):
    deployment_set: list[_Deployment] = []


class _Cluster(msgspec.Struct):
    host_info: list[_Host]
    vm_instance: list[_Vm]
    cluster_name: str = ""
    other_requirement: _Other = msgspec.field(default_factory=_Other)


class _General(msgspec.Struct):
    maximum_migration: int | None = None


class _File(msgspec.Struct):
    cluster_list: list[_Cluster]
    vm_type_list: list[Any] = []
    general_requirement: _General = msgspec.field(default_factory=_General)


def read_file(path: Path) -> Mapping:
    """The mapping in a file, `.json` or `.json.gz`.

    Raises:
        UsageError: unreadable, truncated or inconsistent; the message names the object.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError) as error:
        raise UsageError(f"mapping {path}: {error}") from None
    return parse(raw, str(path))


def parse(raw: bytes, source: str = "mapping") -> Mapping:
    """The mapping in JSON text `raw`; `source` is how errors call it.

    Raises:
        UsageError: truncated, of another form, or inconsistent; the message names the object.
    """
    try:
        document = msgspec.json.decode(raw, type=_File)
    except msgspec.DecodeError as error:
        raise UsageError(f"{source} is not a VMR2L mapping: {error}") from None
    pms: list[PhysicalMachine] = []
    for cluster in document.cluster_list:
        pms.extend(_pm(host, cluster.cluster_name) for host in cluster.host_info)
    pm_index = {str(pm.name): index for index, pm in enumerate(pms)}
    vms: list[VirtualMachine] = []
    for cluster in document.cluster_list:
        vms.extend(_vm(entry, pm_index) for entry in cluster.vm_instance)
    vm_index = {str(vm.name): index for index, vm in enumerate(vms)}
    sets = [
        AntiAffinity(_members(entry, vm_index, number), entry.granularity, cluster.cluster_name)
        for cluster in document.cluster_list
        for number, entry in enumerate(cluster.other_requirement.deployment_set)
    ]
    types = tuple(str(entry) for entry in document.vm_type_list if isinstance(entry, str | int))
    limit = document.general_requirement.maximum_migration
    mapping = Mapping(tuple(pms), tuple(vms), tuple(sets), types, limit, name=source)
    check_mapping(mapping)
    return mapping


def document(mapping: Mapping) -> dict[str, Any]:
    """The mapping as the published format writes it."""
    used: dict[tuple[int, int], list[int]] = {}
    for vm in mapping.vms:
        for share in vm.shares:
            amounts = used.setdefault((vm.pm, share.node), [0, 0])
            amounts[0] += share.cores
            amounts[1] += share.mem_mb
    names = list(dict.fromkeys(pm.cluster for pm in mapping.pms)) or [""]
    return {
        "cluster_list": [_cluster_document(mapping, name, used) for name in names],
        "vm_type_list": list(mapping.vm_types),
        "general_requirement": (
            {} if mapping.maximum_migration is None else {"maximum_migration": mapping.maximum_migration}
        ),
    }


def write_file(mapping: Mapping, path: Path) -> None:
    """Write the mapping to `path`, compressed if it ends in .gz."""
    raw = msgspec.json.encode(document(mapping))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def _pm(host: _Host, cluster: str) -> PhysicalMachine:
    nodes = tuple(NumaNode(numa.node, numa.total_cpu, numa.memory_huge_total_mb) for numa in host.numa)
    return PhysicalMachine(host.node_id, nodes, host.rack_id, host.status, cluster)


def _vm(entry: _Vm, pm_index: dict[str, int]) -> VirtualMachine:
    pm = pm_index.get(str(entry.host_id))
    if pm is None:
        raise UsageError(f"VM {entry.instance_id} is on host {entry.host_id}, which the mapping does not have")
    shares = tuple(Share(part.node, part.cpu, part.mem_mb) for part in entry.numa if part.cpu or part.mem_mb)
    return VirtualMachine(entry.instance_id, pm, shares, entry.instance_type, entry.allow_migration, entry.tenant)


def _members(entry: _Deployment, vm_index: dict[str, int], number: int) -> tuple[int, ...]:
    for name in entry.data:
        if str(name) not in vm_index:
            raise UsageError(f"deployment_set {number} names VM {name}, which the mapping does not have")
    return tuple(vm_index[str(name)] for name in entry.data)


def _cluster_document(mapping: Mapping, name: str, used: dict[tuple[int, int], list[int]]) -> dict[str, Any]:
    inside = {index for index, pm in enumerate(mapping.pms) if pm.cluster == name}
    vms = [vm for vm in mapping.vms if vm.pm in inside]
    hosts = []
    for index in sorted(inside):
        pm = mapping.pms[index]
        numa = []
        for node in pm.nodes:
            cores, mem_mb = used.get((index, node.number), (0, 0))
            numa.append(
                {
                    "node": node.number,
                    "total_cpu": node.cores,
                    "free_cpu": node.cores - cores,
                    "memory_huge_total_mb": node.mem_mb,
                    "memory_huge_free_mb": node.mem_mb - mem_mb,
                }
            )
        hosts.append(
            {
                "node_id": pm.name,
                "status": pm.status,
                "node_cpu": sum(node.cores for node in pm.nodes),
                "node_mem_mb": sum(node.mem_mb for node in pm.nodes),
                "numa": numa,
                "rack_id": pm.rack,
            }
        )
    return {
        "cluster_name": name,
        "host_info": hosts,
        "vm_type_info": [{"vm_type": kind, "flavor_limit": None} for kind in sorted({vm.type_name for vm in vms})],
        "vm_instance": [_vm_document(mapping, vm) for vm in vms],
        "other_requirement": {
            "deployment_set": [
                {"granularity": group.granularity, "data": [mapping.vms[member].name for member in group.members]}
                for group in mapping.anti_affinity
                if group.cluster == name
            ]
        },
    }


def _vm_document(mapping: Mapping, vm: VirtualMachine) -> dict[str, Any]:
    entry = {
        "instance_id": vm.name,
        "instance_type": vm.type_name,
        "host_id": mapping.pms[vm.pm].name,
        "numa": [{"node": share.node, "cpu": share.cores, "mem_mb": share.mem_mb} for share in vm.shares],
        "allow_migration": vm.movable,
    }
    return entry | {"tenant": vm.tenant} if vm.tenant else entry


__all__ = ["Granularity", "document", "parse", "read_file", "write_file"]
