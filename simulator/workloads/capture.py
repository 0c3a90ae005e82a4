"""Real packet captures as traces: every TCP or UDP flow of a pcap file becomes one flow of its payload and start.

scapy reads the packets one at a time, so memory depends on the number of flows only. A flow that is silent for longer
than `idle_s` and then goes on becomes a new message.
"""

from pathlib import Path

import numpy as np

from fabricpilot.errors import UsageError
from simulator.workloads.trace import Trace

IDLE_S = 0.5

_Key = tuple[str, str, int, int, int]


def read_pcap(path: Path | str, idle_s: float = IDLE_S) -> Trace:
    """The flows of a capture (pcap or pcapng), one per direction of a connection.

    Hosts are numbered in order of appearance. Packets without payload (pure ACK, SYN) start no flow. Sizes come from
    the IP header, so packets cut short by a snapshot length count in full.

    Raises:
        UsageError: unreadable, no capture, or no packet with TCP or UDP payload.
    """
    from scapy.error import Scapy_Exception
    from scapy.utils import PcapReader

    path = Path(path)
    started: list[float] = []
    sizes: list[int] = []
    ends: list[tuple[int, int]] = []
    current: dict[_Key, tuple[int, float]] = {}  # flow -> (index of its message, time of its last packet)
    hosts: dict[str, int] = {}
    try:
        with PcapReader(str(path)) as packets:
            for packet in packets:
                found = _payload(packet)
                if found is None or found[1] == 0:
                    continue
                key, size = found
                at_s = float(packet.time)
                index, last_s = current.get(key, (-1, -np.inf))
                if index < 0 or at_s - last_s > idle_s:
                    index = len(sizes)
                    started.append(at_s)
                    sizes.append(0)
                    source = hosts.setdefault(key[0], len(hosts))
                    ends.append((source, hosts.setdefault(key[1], len(hosts))))
                sizes[index] += size
                current[key] = (index, at_s)
    except (OSError, Scapy_Exception, EOFError) as error:
        raise UsageError(f"cannot read the capture {path}: {error}") from error
    if not sizes:
        raise UsageError(f"the capture {path} has no TCP or UDP packet with payload")
    between = np.array(ends)
    start_s = np.array(started)
    return Trace.of(start_s - start_s.min(), np.array(sizes), between[:, 0], between[:, 1])


def _payload(packet: object) -> tuple[_Key, int] | None:
    """5-tuple and payload bytes of a packet; None where it is neither TCP nor UDP over IP."""
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.inet6 import IPv6

    for network in (IP, IPv6):
        if network not in packet:  # type: ignore[operator]
            continue
        ip = packet[network]  # type: ignore[index]
        for protocol, transport in ((6, TCP), (17, UDP)):
            if transport not in ip:
                continue
            segment = ip[transport]
            if network is IP:
                size = ip.len - 4 * ip.ihl if ip.len is not None else len(ip.payload)
            else:
                size = ip.plen if ip.plen is not None else len(ip.payload)
            header = 4 * (segment.dataofs or 5) if transport is TCP else 8
            key = (str(ip.src), str(ip.dst), int(segment.sport), int(segment.dport), protocol)
            return key, max(int(size) - header, 0)
    return None
