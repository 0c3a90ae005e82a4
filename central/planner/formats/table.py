"""A mapping as one CSV table: a line per NUMA node of a PM and a line per share of a VM.

    kind,name,pm,node,cores,mem_mb,status,rack,tenant,movable,host_set,rack_set
    pm,pm-1,,0,44,184388,ACTIVE,r1,,,,
    vm,web-1,pm-1,0,4,8192,,,shop,yes,web,

Only kind, name, node, cores and mem_mb are needed on every line, and pm on a VM's. VMs with the same host_set
(rack_set) must not share a host (rack).
"""

import csv
import io
from pathlib import Path

from central.planner.model.mapping import (
    ACTIVE,
    AntiAffinity,
    Granularity,
    Mapping,
    NumaNode,
    PhysicalMachine,
    Share,
    VirtualMachine,
    check_mapping,
)
from fabricpilot.errors import UsageError

NEEDED = ("kind", "name", "node", "cores", "mem_mb")
NO = ("no", "false", "0")


def read_file(path: Path) -> Mapping:
    """The mapping in a CSV file.

    Raises:
        UsageError: unreadable or inconsistent; the message names the line or the object.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"mapping {path}: {error}") from None
    return parse(text, str(path))


def parse(text: str, source: str = "mapping") -> Mapping:
    """The mapping in CSV text; see `read_file`."""
    reader = csv.DictReader(io.StringIO(text))
    missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
    if missing:
        raise UsageError(f"{source}: the first line lacks {', '.join(missing)}; expected {','.join(NEEDED)},...")
    pms: dict[str, tuple[list[NumaNode], dict[str, str]]] = {}
    vms: dict[str, tuple[list[Share], dict[str, str]]] = {}
    for number, raw in enumerate(reader, start=2):
        row = {
            key: (value or "").strip() for key, value in raw.items() if key is not None and not isinstance(value, list)
        }
        where = f"{source}, line {number}"
        try:
            node, cores, mem_mb = (int(row[name]) for name in ("node", "cores", "mem_mb"))
        except ValueError:
            raise UsageError(f"{where}: node, cores and mem_mb must be whole numbers") from None
        if row["kind"] == "pm":
            pms.setdefault(row["name"], ([], row))[0].append(NumaNode(node, cores, mem_mb))
        elif row["kind"] == "vm":
            shares, first = vms.setdefault(row["name"], ([], row))
            if first.get("pm") != row.get("pm"):
                raise UsageError(f"{where}: VM {row['name']} is on PM {first.get('pm')} and on PM {row.get('pm')}")
            shares.append(Share(node, cores, mem_mb))
        else:
            raise UsageError(f"{where}: kind is {row['kind']!r}, expected pm or vm")
    index = {name: position for position, name in enumerate(pms)}
    for name, (_, row) in vms.items():
        if row.get("pm", "") not in index:
            raise UsageError(f"{source}: VM {name} is on PM {row.get('pm', '')!r}, which the table does not have")
    mapping = Mapping(
        tuple(
            PhysicalMachine(name, tuple(nodes), row.get("rack", ""), row.get("status") or ACTIVE)
            for name, (nodes, row) in pms.items()
        ),
        tuple(
            VirtualMachine(
                name,
                index[row["pm"]],
                tuple(shares),
                movable=row.get("movable", "").lower() not in NO,
                tenant=row.get("tenant", ""),
            )
            for name, (shares, row) in vms.items()
        ),
        _sets(vms),
        name=source,
    )
    check_mapping(mapping)
    return mapping


def _sets(vms: dict[str, tuple[list[Share], dict[str, str]]]) -> tuple[AntiAffinity, ...]:
    kinds: tuple[tuple[str, Granularity], ...] = (("host_set", "host"), ("rack_set", "rack"))
    found: dict[tuple[Granularity, str], list[int]] = {}
    for position, (_, row) in enumerate(vms.values()):
        for column, granularity in kinds:
            if row.get(column):
                found.setdefault((granularity, row[column]), []).append(position)
    return tuple(AntiAffinity(tuple(members), granularity) for (granularity, _), members in found.items())
