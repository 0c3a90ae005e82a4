"""From what conntrack counts to what the levels are about: payload bytes, estimated.

Conntrack counts IP bytes, headers and the packet at hand included; levels are about payload sent before it. A GSO
packet is one packet with one header to it, so the headers are known well: every TCP packet of a Linux host carries 32
bytes of TCP header (timestamps on, the default), its SYN 8 more. Where timestamps are off the estimate is low by 12
bytes per packet; a SACK makes it high by 8 to 32 bytes.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from hostagent.datapath.base import Settings

TCP: Final = 6
UDP: Final = 17

IPV4_HEADER_BYTES: Final = 20
IPV6_HEADER_BYTES: Final = 40
TCP_HEADER_BYTES: Final = 32  # 20 and the timestamp option, padded
UDP_HEADER_BYTES: Final = 8
SYN_EXTRA_BYTES: Final = 8  # MSS, SACK permitted and window scale beside the timestamp

# The packet that thresholds are translated for: a full-size TCP segment over IPv4 and Ethernet.
_HEADERS_BYTES: Final = IPV4_HEADER_BYTES + TCP_HEADER_BYTES
_SEGMENT_PAYLOAD_BYTES: Final = 1500 - _HEADERS_BYTES
_OPENING_BYTES: Final = 2 * _HEADERS_BYTES + SYN_EXTRA_BYTES  # SYN, and the acknowledgement that ends the handshake

MEAN_HEADERS_BYTES: Final = _HEADERS_BYTES  # of a packet of unknown kind


def conntrack_thresholds(settings: Settings) -> tuple[int, ...]:
    """Conntrack byte counts at which a packet is on the next level; one per threshold, strictly ascending.

    Exact for full-size segments sent one by one. With GSO a flow sinks up to one GSO packet early, and up to
    3.6 % of the threshold late.
    """
    return tuple(
        threshold + _OPENING_BYTES + 1500 + -(-threshold // _SEGMENT_PAYLOAD_BYTES) * _HEADERS_BYTES
        for threshold in settings.thresholds.bytes
    )


def payload_bytes(
    ip_bytes: npt.NDArray[np.uint64],
    packets: npt.NDArray[np.uint64],
    protocol: npt.NDArray[np.uint8],
    ipv6: npt.NDArray[np.bool_],
    saw_syn: npt.NDArray[np.bool_],
) -> npt.NDArray[np.uint64]:
    """Payload of flows from conntrack's counters of one direction; all arrays of shape (n,)."""
    headers = np.where(ipv6, IPV6_HEADER_BYTES, IPV4_HEADER_BYTES)
    headers = headers + np.where(protocol == TCP, TCP_HEADER_BYTES, UDP_HEADER_BYTES)
    syn = np.where(saw_syn & (protocol == TCP) & (packets > 0), SYN_EXTRA_BYTES, 0)
    payload = ip_bytes.astype(np.int64) - packets.astype(np.int64) * headers - syn
    estimate: npt.NDArray[np.uint64] = np.maximum(payload, 0).astype(np.uint64)
    return estimate
