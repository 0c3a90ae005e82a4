"""What TCP did and what the path is like, seen from inside the namespaces."""

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from testbed.netns.enter import call_in
from testbed.netns.star import StarPlan

_RTT_PORT = 5009
_RTT_TRIES = 20


@dataclass(frozen=True)
class TcpCounters:
    """Sums over the senders since the star was built."""

    retransmitted_segments: int
    timeouts: int
    syn_retransmits: int

    def since(self, before: "TcpCounters") -> "TcpCounters":
        """What was added since `before`."""
        return TcpCounters(
            self.retransmitted_segments - before.retransmitted_segments,
            self.timeouts - before.timeouts,
            self.syn_retransmits - before.syn_retransmits,
        )


def tcp_counters(star: StarPlan) -> TcpCounters:
    """The senders' TCP counters."""
    totals = [0, 0, 0]
    for host in star.sender_hosts:
        values = call_in(host.namespace, _read_counters)
        totals = [total + value for total, value in zip(totals, values, strict=True)]
    return TcpCounters(*totals)


def base_rtt_us(star: StarPlan) -> float:
    """Smallest time of a TCP handshake from the first sender to the receiver, microseconds."""
    address = (star.receiver.address, _RTT_PORT)
    listener = call_in(star.receiver.namespace, lambda: socket.create_server(address))

    def shortest_handshake() -> int:
        best_ns = 1 << 62
        for _ in range(_RTT_TRIES):
            with socket.socket() as probe:
                began_ns = time.monotonic_ns()
                probe.connect(address)
                best_ns = min(best_ns, time.monotonic_ns() - began_ns)
        return best_ns

    with listener:
        return call_in(star.sender_hosts[0].namespace, shortest_handshake) / 1e3


def _read_counters() -> tuple[int, int, int]:
    # /proc/net is the network namespace of the process's first thread; thread-self is ours.
    general = _table(Path("/proc/thread-self/net/snmp"), "Tcp:")
    extended = _table(Path("/proc/thread-self/net/netstat"), "TcpExt:")
    return general["RetransSegs"], extended["TCPTimeouts"], extended["TCPSynRetrans"]


def _table(path: Path, prefix: str) -> dict[str, int]:
    names, values = (line.split()[1:] for line in path.read_text().splitlines() if line.startswith(prefix))
    return dict(zip(names, map(int, values), strict=True))
