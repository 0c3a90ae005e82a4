"""Sends one host's share of a trace and times every flow. Runs in the sender's namespace.

Open loop: a flow starts when the trace says so, whatever became of those before. Its completion time runs from
the scheduled start (so a generator that is late cannot hide it) until the receiver's answer that the last byte is
there. One thread and one TCP connection per flow; `sendall` leaves the waiting to the kernel, so that a flow costs a
few wake-ups whatever its size.

    python -m testbed.flows.sender TRACE.csv NUMBER ADDRESS [CONGESTION_CONTROL [hints]]

Says `ready`; reads one line, the CLOCK_MONOTONIC nanoseconds at which the trace begins; then says a line per flow,
`FLOW LATE_NS FCT_NS` or `FLOW LATE_NS lost REASON`, and `end`. Ends when its standard input closes.
"""

import csv
import gc
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from testbed.flows.protocol import HEADER, PORT, REPLY, Transport, be_punctual, receive_exactly, say

_FILLER = memoryview(bytes(1 << 22))


@dataclass(frozen=True)
class Flow:
    """One line of the trace."""

    number: int
    start_ns: int
    size_bytes: int


def read_share(path: Path, sender: int) -> list[Flow]:
    """The flows of one sender, in order of their start."""
    with path.open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [
            Flow(int(row["flow"]), int(row["start_ns"]), int(row["size_bytes"]))
            for row in rows
            if int(row["sender"]) == sender
        ]


def send_all(flows: list[Flow], address: str, begin_ns: int, transport: Transport) -> None:
    """Start every flow at its time; return when all have ended."""
    threads = []
    for flow in flows:
        due_ns = begin_ns + flow.start_ns
        while (left_ns := due_ns - time.monotonic_ns()) > 0:
            time.sleep(left_ns / 1e9)
        thread = threading.Thread(target=_send, args=(flow, address, due_ns, transport), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    say("end")


def _send(flow: Flow, address: str, due_ns: int, transport: Transport) -> None:
    late_ns = time.monotonic_ns() - due_ns
    try:
        with transport.open(socket.AF_INET6 if ":" in address else socket.AF_INET) as connection:
            connection.connect((address, PORT))
            transport.announce(connection, flow.size_bytes)
            _write(connection, flow)
            connection.shutdown(socket.SHUT_WR)
            reply = receive_exactly(connection, REPLY.size)
            fct_ns = time.monotonic_ns() - due_ns
    except OSError as error:
        say(f"{flow.number} {late_ns} lost {error.strerror or error}")
        return
    if reply == REPLY.pack(flow.number, flow.size_bytes):
        say(f"{flow.number} {late_ns} {fct_ns}")
    else:
        say(f"{flow.number} {late_ns} lost wrong answer {reply.hex()}")


def _write(connection: socket.socket, flow: Flow) -> None:
    """Header and filler, `size_bytes` in all; MSG_MORE keeps the header from leaving alone in a packet."""
    left = flow.size_bytes - HEADER.size
    connection.sendall(HEADER.pack(flow.number, flow.size_bytes), socket.MSG_MORE if left else 0)
    while left:
        part = _FILLER[: min(left, len(_FILLER))]
        connection.sendall(part)
        left -= len(part)


def main() -> None:
    """Send one share, then wait for standard input to close."""
    path, sender, address = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    transport = Transport.of(sys.argv[4:])
    flows = read_share(path, sender)
    be_punctual()
    gc.disable()  # a collection in mid-run would make flows late; what this process allocates is bounded by its trace
    say("ready")
    line = sys.stdin.readline()
    if line:
        threading.Thread(target=send_all, args=(flows, address, int(line), transport), daemon=True).start()
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
