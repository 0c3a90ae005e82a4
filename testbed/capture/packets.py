"""Dissects a capture with scapy into the few facts the check needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_ETHERNET_BYTES, _IPV4_BYTES, _IPV6_BYTES, _TCP_BYTES = 14, 20, 40, 20  # fixed parts of the headers
_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"  # EtherType
_TCP = 6


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
    fin: bool = False
    sequence: int = 0  # of the first payload byte


def read_packets(path: Path) -> Iterator[SeenPacket]:
    """TCP packets of a pcap file, in the order they are in it; whatever is not TCP over IP is passed over.

    Only the fixed part of each header is handed to scapy: what is not needed (TCP's options above all) would cost
    more time than everything that is.
    """
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6
    from scapy.utils import RawPcapReader

    with RawPcapReader(str(path)) as reader:
        per_ns = 1 if reader.nano else 1000
        for data, meta in reader:
            kind = data[12:14]
            if kind == _IPV4:
                ip: Any = IP(data[_ETHERNET_BYTES : _ETHERNET_BYTES + _IPV4_BYTES])
                protocol, header_bytes, ip_id, dscp = ip.proto, ip.ihl * 4, ip.id, ip.tos >> 2
                ip_payload_bytes = ip.len - header_bytes
            elif kind == _IPV6:
                ip = IPv6(data[_ETHERNET_BYTES : _ETHERNET_BYTES + _IPV6_BYTES])
                protocol, header_bytes, ip_id, dscp = ip.nh, _IPV6_BYTES, None, ip.tc >> 2
                ip_payload_bytes = ip.plen
            else:
                continue
            if protocol != _TCP:
                continue
            start = _ETHERNET_BYTES + header_bytes
            tcp: Any = TCP(data[start : start + _TCP_BYTES])
            yield SeenPacket(
                time_ns=meta.sec * 1_000_000_000 + meta.usec * per_ns,
                flow=FlowKey(ip.src, ip.dst, tcp.sport, tcp.dport),
                ip_id=ip_id,
                payload_bytes=ip_payload_bytes - tcp.dataofs * 4,
                syn=bool(tcp.flags.S),
                dscp=dscp,
                fin=bool(tcp.flags.F),
                sequence=tcp.seq + tcp.flags.S,
            )
