"""Traces from and to files.

Formats:
    csv   a header, then one flow per line: `start_s,size_bytes,source,destination` (the two hosts may be left out)
    pias  PIAS's testbed: `milliseconds since the flow before  size in KiB  sender`, all to one receiver

Packet captures and connection logs become traces in `capture` and `connections`.
"""

import csv
from pathlib import Path

import numpy as np

from fabricpilot.errors import UsageError
from simulator.workloads.trace import Trace

FORMATS = ("csv", "pias")

KIB = 1024

# PIAS's request generator sleeps for the gap it reads, then issues the request, which takes time of its own: replayed
# with this much more per flow, single completion times of each of the testbed's web-search runs agree best.
PIAS_REQUEST_S = 300e-6


def read_trace(path: Path | str, form: str = "csv") -> Trace:
    """A trace from a file in one of `FORMATS`.

    Raises:
        UsageError: unknown format, unreadable or empty file, or a line that is not a flow; names the line.
    """
    path = Path(path)
    if form not in FORMATS:
        raise UsageError(f"trace format '{form}' is unknown; choose from: {', '.join(FORMATS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the trace {path}: {error}") from error
    if not text.strip():
        raise UsageError(f"the trace {path} is empty; it needs at least one flow")
    return _read_pias(path, text) if form == "pias" else _read_csv(path, text)


def write_trace(trace: Trace, path: Path | str) -> None:
    """Write a trace as csv; `read_trace` gives the same flows back.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            out = csv.writer(file)
            out.writerow(("start_s", "size_bytes", "source", "destination"))
            columns = (
                trace.start_s.tolist(),
                trace.size_bytes.tolist(),
                trace.source.tolist(),
                trace.destination.tolist(),
            )
            out.writerows(zip(*columns, strict=True))
    except OSError as error:
        raise UsageError(f"cannot write the trace {path}: {error.strerror}") from error


def _read_pias(path: Path, text: str) -> Trace:
    gap_ms: list[float] = []
    size_kib: list[float] = []
    sender: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            gap, size, host = line.split()
            gap_ms.append(float(gap))
            size_kib.append(float(size))
            sender.append(int(host))
        except ValueError as error:
            raise UsageError(f"{path}:{number}: '{line.strip()}' is not 'gap_ms size_KiB sender'") from error
        if not (gap_ms[-1] >= 0 and size_kib[-1] > 0 and sender[-1] >= 0) or not np.isfinite(gap_ms[-1] + size_kib[-1]):
            raise UsageError(f"{path}:{number}: '{line.strip()}': gap and sender must be 0 or more, the size above 0")
    start_s = np.cumsum(np.array(gap_ms) / 1e3 + PIAS_REQUEST_S)
    size_bytes = np.rint(np.array(size_kib) * KIB).astype(np.int64)
    source = np.array(sender) + 1  # the receiver is host 0
    return Trace.of(start_s, size_bytes, source, np.zeros(len(source)))


def _read_csv(path: Path, text: str) -> Trace:
    rows = csv.reader(text.splitlines())
    header = [name.strip() for name in next(rows)]
    if header[:2] != ["start_s", "size_bytes"] or header[2:] not in ([], ["source", "destination"]):
        raise UsageError(f"{path}:1: header '{','.join(header)}'; expected start_s,size_bytes[,source,destination]")
    flows: list[tuple[float, int, int, int]] = []
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        try:
            hosts = (int(row[2]), int(row[3])) if len(header) == 4 else (1, 0)
            if len(row) != len(header):
                raise ValueError
            flows.append((float(row[0]), int(row[1]), *hosts))
        except (ValueError, IndexError) as error:
            raise UsageError(f"{path}:{number}: '{','.join(row)}' is not a flow '{','.join(header)}'") from error
    if not flows:
        raise UsageError(f"the trace {path} has no flows; it needs at least one")
    start_s, size_bytes, source, destination = zip(*flows, strict=True)
    return Trace.of(start_s, size_bytes, source, destination)
