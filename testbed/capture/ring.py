"""Captures packets into a ring that the kernel fills by itself (AF_PACKET, TPACKET_V2), for a bounded time.

The ring is large enough for the whole window and is read only afterwards. So nothing is missed because a reader was
slow, and the capture takes no CPU from the traffic that is measured. What the kernel could not store it counts.

It looks at what arrives on the switch's ports from the senders: there is every packet a sender's egress program let
out, in front of the bottleneck's queue, which drops and reorders.
"""

import ctypes
import mmap
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fabricpilot.errors import KernelError
from testbed.netns.enter import call_in

SNAP_BYTES = 128  # Ethernet, the longest IPv4 and TCP headers nearly whole, and never payload worth keeping

_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_PACKET_RX_RING = 5
_PACKET_STATISTICS = 6
_PACKET_VERSION = 10
_TPACKET_V2 = 1
_TP_STATUS_USER = 1
_SO_ATTACH_FILTER = 26
_PACKET_OUTGOING = 4

_FRAME_BYTES = 256  # 66 bytes of the kernel's own in front of the packet
_BLOCK_BYTES = 1 << 20
_FRAMES_PER_BLOCK = _BLOCK_BYTES // _FRAME_BYTES
_HEADER = struct.Struct("=IIIHHII")  # status, len, snaplen, mac, net, sec, nsec


@dataclass(frozen=True)
class CapturedPacket:
    """One packet: when (CLOCK_REALTIME), how long it was, and its first `SNAP_BYTES` bytes."""

    time_ns: int
    wire_bytes: int
    data: bytes


class RingCapture:
    """Captures what arrives on all ports of a namespace but those named, from construction until `stop`."""

    def __init__(self, namespace: str, ignored_ports: tuple[str, ...], packets: int) -> None:
        """Start to capture.

        Args:
            namespace: network namespace of the ports.
            ignored_ports: ports whose packets are not wanted.
            packets: how many the ring holds.

        Raises:
            KernelError: the kernel has no packet rings (CONFIG_PACKET), or too little memory for this one.
        """
        blocks = -(-packets // _FRAMES_PER_BLOCK)
        try:
            self._socket = call_in(namespace, lambda: _open(ignored_ports, blocks))
        except OSError as error:
            raise KernelError(
                f"cannot capture in {namespace}: {error.strerror}; packet rings need CONFIG_PACKET"
            ) from error
        self._map = mmap.mmap(self._socket.fileno(), blocks * _BLOCK_BYTES)
        self.began_ns = time.time_ns()
        self.ended_ns = 0
        self.missed = 0

    def stop(self) -> None:
        """Capture no more; `missed` then tells how many packets did not fit."""
        _attach_filter(self._socket, [(0x06, 0, 0, 0)])  # nothing passes
        self.ended_ns = time.time_ns()
        self._packets, self.missed = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))

    def packets(self) -> Iterator[CapturedPacket]:
        """What was captured, in order of arrival; call after `stop`."""
        for frame in range(len(self._map) // _FRAME_BYTES):
            offset = frame * _FRAME_BYTES
            status, wire_bytes, captured, start, _, sec, nsec = _HEADER.unpack_from(self._map, offset)
            if not status & _TP_STATUS_USER:
                return
            data = self._map[offset + start : offset + start + captured]
            yield CapturedPacket(sec * 1_000_000_000 + nsec, wire_bytes, data)

    def save(self, path: Path) -> int:
        """Write a pcap file (nanoseconds, Ethernet); returns how many packets it holds."""
        from scapy.utils import RawPcapWriter

        count = 0
        with path.open("wb") as file:
            writer = RawPcapWriter(file, linktype=1, nano=True, snaplen=SNAP_BYTES)
            writer.write_header(None)
            for packet in self.packets():
                sec, nsec = divmod(packet.time_ns, 1_000_000_000)
                writer.write_packet(packet.data, sec=sec, usec=nsec, caplen=len(packet.data), wirelen=packet.wire_bytes)
                count += 1
            writer.flush()
        return count

    def close(self) -> None:
        """Let go of the ring's memory. Idempotent."""
        self._map.close()
        self._socket.close()


def _open(ignored_ports: tuple[str, ...], blocks: int) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))  # on every port
    try:
        opened.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V2)
        _attach_filter(opened, _arrivals_except([socket.if_nametoindex(port) for port in ignored_ports]))
        # Packets that came before the filter are thrown away when the ring takes their place.
        request = struct.pack("=IIII", _BLOCK_BYTES, blocks, _FRAME_BYTES, blocks * _FRAMES_PER_BLOCK)
        opened.setsockopt(_SOL_PACKET, _PACKET_RX_RING, request)
        _counters(opened)  # reading resets them: those packets were not missed
    except BaseException:
        opened.close()
        raise
    return opened


def _counters(opened: socket.socket) -> int:
    """Packets that found no room since this was last asked."""
    _, dropped = struct.unpack("=II", opened.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    return int(dropped)


def _arrivals_except(ignored: list[int]) -> list[tuple[int, int, int, int]]:
    """A classic BPF program: the first `SNAP_BYTES` of what arrives on other ports than these, nothing of the rest."""
    load_byte, load_word, jump_equal, give = 0x30, 0x20, 0x15, 0x06
    packet_type, interface = 0xFFFFF004, 0xFFFFF008  # SKF_AD_OFF + SKF_AD_PKTTYPE, + SKF_AD_IFINDEX
    tests = [(load_byte, 0, 0, packet_type), (jump_equal, len(ignored) + 2, 0, _PACKET_OUTGOING)]
    tests.append((load_word, 0, 0, interface))
    tests += [(jump_equal, len(ignored) - n, 0, index) for n, index in enumerate(ignored)]
    return [*tests, (give, 0, 0, SNAP_BYTES), (give, 0, 0, 0)]


def _attach_filter(opened: socket.socket, program: list[tuple[int, int, int, int]]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(code))  # struct sock_fprog
    opened.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
