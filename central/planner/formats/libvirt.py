"""A mapping from libvirt: a folder per host with what `virsh` prints.

    <folder>/<host>/capabilities.xml    virsh capabilities        nodes: cpus and memory of each NUMA cell
    <folder>/<host>/<domain>.xml        virsh dumpxml <domain>    a VM: vcpu, memory, and numatune if it is pinned

A domain with `<numatune><memory nodeset=.../>` sits on those nodes, evenly; one without is taken to sit on the node
with the most room left, largest domain first. A `<rack>` file beside capabilities.xml (one word) names the host's rack.
"""

import xml.etree.ElementTree as Xml
from pathlib import Path

from central.planner.model.mapping import Mapping, NumaNode, PhysicalMachine, Share, VirtualMachine, check_mapping
from fabricpilot.errors import UsageError

KIB = {"b": 1 / 1024, "bytes": 1 / 1024, "kib": 1, "k": 1, "mib": 1024, "m": 1024, "gib": 1024**2, "g": 1024**2}
RACK_FILE = "rack"


def read_folder(folder: Path) -> Mapping:
    """The mapping that a folder of `virsh` output describes.

    Raises:
        UsageError: no host, XML that is not what virsh prints, or an inconsistent mapping; the message names the file.
    """
    hosts = sorted(path.parent for path in folder.glob("*/capabilities.xml"))
    if not hosts:
        raise UsageError(f"mapping {folder}: expected <host>/capabilities.xml (virsh capabilities) in it, found none")
    pms: list[PhysicalMachine] = []
    vms: list[VirtualMachine] = []
    for host in hosts:
        nodes = _nodes(host / "capabilities.xml")
        rack = (host / RACK_FILE).read_text().strip() if (host / RACK_FILE).exists() else ""
        domains = [_domain(path) for path in sorted(host.glob("*.xml")) if path.name != "capabilities.xml"]
        vms += _placed(domains, nodes, len(pms))
        pms.append(PhysicalMachine(host.name, nodes, rack))
    mapping = Mapping(tuple(pms), tuple(vms), name=str(folder))
    check_mapping(mapping)
    return mapping


def _root(path: Path) -> Xml.Element:
    try:
        return Xml.parse(path).getroot()
    except (OSError, Xml.ParseError) as error:
        raise UsageError(f"{path}: not XML as virsh prints it: {error}") from None


def _nodes(path: Path) -> tuple[NumaNode, ...]:
    nodes = []
    for cell in _root(path).findall("./host/topology/cells/cell"):
        memory = cell.find("memory")
        cpus = cell.find("cpus")
        if memory is None or cpus is None:
            raise UsageError(f"{path}: NUMA cell {cell.get('id')} lacks memory or cpus")
        nodes.append(NumaNode(int(cell.get("id", "0")), int(cpus.get("num", "0")), _kib(memory, path) // 1024))
    if not nodes:
        raise UsageError(f"{path}: no NUMA cells in host/topology")
    return tuple(nodes)


def _kib(element: Xml.Element, path: Path) -> int:
    unit = (element.get("unit") or "KiB").lower()
    if unit not in KIB or not (element.text or "").strip().isdigit():
        raise UsageError(f"{path}: memory {element.text!r} {unit}: expected a number of bytes, KiB, MiB or GiB")
    return int(int((element.text or "0").strip()) * KIB[unit])


def _domain(path: Path) -> tuple[str, int, int, list[int]]:
    """(name, cores, MB, pinned nodes)."""
    root = _root(path)
    name, vcpu, memory = root.findtext("name"), root.find("vcpu"), root.find("memory")
    if not name or vcpu is None or memory is None or not (vcpu.text or "").strip().isdigit():
        raise UsageError(f"{path}: a domain needs name, vcpu and memory")
    tuned = root.find("./numatune/memory")
    nodeset = tuned.get("nodeset") if tuned is not None else None
    return name, int((vcpu.text or "0").strip()), _kib(memory, path) // 1024, _numbers(nodeset, path) if nodeset else []


def _numbers(nodeset: str, path: Path) -> list[int]:
    """`0,2-3` -> [0, 2, 3]."""
    found: list[int] = []
    try:
        for part in nodeset.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise UsageError(f"{path}: nodeset {nodeset!r}: expected numbers such as 0,2-3") from None
    return found


def _placed(
    domains: list[tuple[str, int, int, list[int]]], nodes: tuple[NumaNode, ...], pm: int
) -> list[VirtualMachine]:
    left = {node.number: node.cores for node in nodes}
    vms = []
    for name, cores, mem_mb, pinned in sorted(domains, key=lambda one: (not one[3], -one[1], one[0])):
        spread = pinned or [max(left, key=lambda number: left[number])]
        shares = []
        for position, number in enumerate(spread):
            # A remainder goes to the first nodes, so that nothing is lost.
            part = cores // len(spread) + (position < cores % len(spread))
            part_mb = mem_mb // len(spread) + (position < mem_mb % len(spread))
            left[number] = left.get(number, 0) - part
            shares.append(Share(number, part, part_mb))
        vms.append(VirtualMachine(name, pm, tuple(shares)))
    return vms
