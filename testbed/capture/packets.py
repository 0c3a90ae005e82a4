"""Dissects a capture with scapy into the few facts the check needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_ETHERNET_BYTES = 14


class FlowKey(NamedTuple):
    """The 5-tuple of a TCP flow, less the protocol."""

    source: str
    destination: str
    source_port: int
    destination_port: int


class SeenPacket(NamedTuple):
    """One TCP packet as an outsider sees it."""

    time_ns: int  # CLOCK_REALTIME
    flow: FlowKey
    ip_id: int | None  # IPv4 identification, None for IPv6: Linux counts it up per socket, packet by packet
    payload_bytes: int
    syn: bool
    dscp: int


def read_packets(path: Path) -> Iterator[SeenPacket]:
    """TCP packets of a pcap file, in the order they are in it; whatever is not TCP is passed over."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6
    from scapy.utils import RawPcapReader

    with RawPcapReader(str(path)) as reader:
        per_ns = 1 if reader.nano else 1000
        for data, meta in reader:
            kind = {b"\x08\x00": IP, b"\x86\xdd": IPv6}.get(data[12:14])
            if kind is None:
                continue
            packet: Any = kind(data[_ETHERNET_BYTES:])
            tcp = packet.getlayer(TCP)
            if tcp is None:
                continue
            if kind is IP:
                payload_bytes = packet.len - packet.ihl * 4 - tcp.dataofs * 4
                dscp, ip_id = packet.tos >> 2, packet.id
            else:
                payload_bytes = packet.plen - tcp.dataofs * 4
                dscp, ip_id = packet.tc >> 2, None
            yield SeenPacket(
                time_ns=meta.sec * 1_000_000_000 + meta.usec * per_ns,
                flow=FlowKey(packet.src, packet.dst, tcp.sport, tcp.dport),
                ip_id=ip_id,
                payload_bytes=payload_bytes,
                syn="S" in tcp.flags,
                dscp=dscp,
            )
