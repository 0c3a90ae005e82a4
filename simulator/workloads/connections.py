"""Connection logs as traces: conntrack's list with accounting, and NetFlow/IPFIX as CSV.

conntrack  lines of `conntrack -L -o timestamp` or `conntrack -E -e DESTROY -o timestamp` with
           net.netfilter.nf_conntrack_acct=1: each direction with payload becomes one flow. Sizes are IP bytes less
           headers of 40 bytes (TCP) or 28 (UDP) per packet. Lines without a timestamp all start at 0.
netflow    CSV with a header as nfdump (`-o csv`) writes it; needs the columns ts, sa, da and ibyt; pr, ipkt if there.
"""

import csv
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np

from fabricpilot.errors import UsageError
from simulator.workloads.trace import Trace

FORMATS = ("conntrack", "netflow")

_HEADER_BYTES = {"tcp": 40, "udp": 28}
_Flow = tuple[float, int, str, str]  # start in seconds, payload bytes, source, destination


def read_connections(path: Path | str, form: str) -> Trace:
    """The flows of a connection log; hosts are numbered in order of appearance, time starts with the first flow.

    Raises:
        UsageError: unknown format, unreadable, malformed (names the line), or no flow with payload.
    """
    path = Path(path)
    if form not in FORMATS:
        raise UsageError(f"log format '{form}' is unknown; choose from: {', '.join(FORMATS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    flows = list(_conntrack(text) if form == "conntrack" else _netflow(path, text))
    if not flows:
        raise UsageError(f"{path} has no flow with payload; is accounting on (net.netfilter.nf_conntrack_acct=1)?")
    hosts: dict[str, int] = {}
    source = [hosts.setdefault(flow[2], len(hosts)) for flow in flows]
    destination = [hosts.setdefault(flow[3], len(hosts)) for flow in flows]
    start_s = np.array([flow[0] for flow in flows])
    return Trace.of(start_s - start_s.min(), [flow[1] for flow in flows], source, destination)


def _conntrack(text: str) -> Iterator[_Flow]:
    for line in text.splitlines():
        protocol = next((p for p in _HEADER_BYTES if re.search(rf"\b{p}\b", line)), None)
        if protocol is None:
            continue
        stamp = re.search(r"\[(\d+\.\d+)\s*\]", line) or re.search(r"\bstart=(\d+(?:\.\d+)?)", line)
        start_s = float(stamp[1]) if stamp else 0.0
        # Both directions: src dst sport dport packets bytes, in this order.
        for src, dst, packets, size in re.findall(
            r"src=(\S+) dst=(\S+) sport=\d+ dport=\d+ packets=(\d+) bytes=(\d+)", line
        ):
            payload = int(size) - _HEADER_BYTES[protocol] * int(packets)
            if payload > 0:
                yield start_s, payload, src, dst


def _netflow(path: Path, text: str) -> Iterator[_Flow]:
    rows = csv.reader(text.splitlines())
    header = [name.strip() for name in next(rows, [])]
    missing = [name for name in ("ts", "sa", "da", "ibyt") if name not in header]
    if missing:
        raise UsageError(f"{path}:1: no column {', '.join(missing)}; expected the header of `nfdump -o csv`")
    at = {name: header.index(name) for name in header}
    for number, row in enumerate(rows, 2):
        if not row or row[0].startswith("Summary"):
            break  # nfdump ends with a summary
        try:
            protocol = row[at["pr"]].strip().lower() if "pr" in at else "tcp"
            packets = int(row[at["ipkt"]]) if "ipkt" in at else 1
            payload = int(row[at["ibyt"]]) - _HEADER_BYTES.get(protocol, 28) * packets
            start_s = datetime.fromisoformat(row[at["ts"]].strip()).timestamp()
            flow = (start_s, payload, row[at["sa"]].strip(), row[at["da"]].strip())
        except (ValueError, IndexError) as error:
            raise UsageError(f"{path}:{number}: '{','.join(row)}' is not a flow: {error}") from error
        if payload > 0:
            yield flow
