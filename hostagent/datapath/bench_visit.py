"""Packets of many flows for the benchmarks: BPF_PROG_TEST_RUN repeats one frame, a visitor makes it another flow's.

The visitor is a tc program of some thirty instructions. It picks the next flow (in order, or at random by a linear
congruential generator that comes by every flow once), writes the flow's source address, the next sequence number and
the DSCP the packet shall arrive with into the frame, and tail-calls the program to be measured. The same with an empty
program behind it is the baseline, so that neither the visitor nor the kernel's loop counts.
"""

import os
import struct
from types import TracebackType
from typing import Final, Self

import numpy as np

from hostagent.datapath import bpf_syscall as bpf

TCP_SYN: Final = 0x02
TCP_ACK: Final = 0x10
_PAYLOAD_BYTES: Final = 1448
_MULTIPLIER: Final = 0x9E3779B5  # = 1 mod 4, so that with an odd increment every flow is visited (Hull and Dobell)
_MAP_TYPE_PROG_ARRAY: Final = 3

# index = index * multiplier + increment & mask; sequence and tos are written into each frame.
_VISIT_DTYPE: Final = np.dtype(
    [(name, "<u4") for name in ("index", "multiplier", "increment", "mask", "sequence", "tos")]
)


def frame(tcp_flags: int, payload_bytes: int) -> bytes:
    """An Ethernet frame of one TCP flow over IPv4; checksums as a NIC with offload would get them."""
    total_bytes = 40 + payload_bytes
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, total_bytes, 1, 0x4000, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    tcp = struct.pack("!HHIIBBHHH", 40000, 80, 1, 1, 0x50, tcp_flags, 65535, 0, 0)
    return b"\x02\0\0\0\0\2\x02\0\0\0\0\1\x08\0" + ip + tcp + bytes(payload_bytes)


SYN: Final = frame(TCP_SYN, 0)
DATA: Final = frame(TCP_ACK, _PAYLOAD_BYTES)
ACK: Final = frame(TCP_ACK, 0)
NOT_IP: Final = bytes(12) + b"\x08\x06" + bytes(46)


class Visitor:
    """The visitor program, loaded; give it back with `close` or use it in a `with`.

    Raises:
        OSError: the kernel refuses the program.
    """

    def __init__(self) -> None:
        self._visit = bpf.map_create(bpf.MAP_TYPE_ARRAY, 4, _VISIT_DTYPE.itemsize, 1, "fp_visit")
        self._next = bpf.map_create(_MAP_TYPE_PROG_ARRAY, 4, 4, 1, "fp_next")
        self._program = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, _program(self._visit, self._next))
        self.empty = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, bpf.RETURN_UNSPEC)
        self._packets = 0

    def visit(
        self, program: int, packet: bytes, packets: int, flows: int = 1, *, at_random: bool = False, tos: int = 0
    ) -> int:
        """Mean nanoseconds per packet, visitor included, over `packets` packets.

        Args:
            program: what is measured; `self.empty` for the baseline.
            packet: the frame that each flow sends.
            packets: how many.
            flows: a power of two, at most 2^24.
            at_random: in which order flows take their turns.
            tos: the second byte of the IP header, as each packet arrives with.
        """
        step = (_MULTIPLIER, 1) if at_random else (1, 1)
        self._packets += packets
        state = np.array([(0, *step, flows - 1, self._packets % 2**31, tos)], _VISIT_DTYPE)
        zero = np.zeros(1, np.uint32)
        bpf.update(self._visit, zero, state)
        bpf.update(self._next, zero, np.array([program], np.uint32))
        return bpf.prog_test_run(self._program, packet, repeat=packets)[3]

    def close(self) -> None:
        """Let go of programs and maps."""
        for fd in (self._visit, self._next, self._program, self.empty):
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _program(visit: int, following: int) -> bytes:
    """The visitor's instructions; comments in the kernel's own notation."""
    field = {name: _VISIT_DTYPE.fields[name][1] for name in _VISIT_DTYPE.names or ()}  # type: ignore[index]

    def instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
        return struct.pack("<BBhi", code, source << 4 | target, offset, value)

    def map_address(target: int, fd: int) -> bytes:
        return instruction(0x18, target, 1, 0, fd) + instruction(0)

    load, store, store_byte = 0x61, 0x63, 0x73
    add, multiply, both = 0x0C, 0x2C, 0x5C  # 32 bits wide
    head = [
        instruction(0xBF, 6, 1),  # r6 = r1
        instruction(0x62, 10, 0, -4, 0),  # *(u32 *)(r10 - 4) = 0
        instruction(0xBF, 2, 10),  # r2 = r10
        instruction(0x07, 2, 0, 0, -4),  # r2 += -4
        map_address(1, visit),  # r1 = map
        instruction(0x85, value=1),  # r0 = map_lookup_elem(r1, r2)
    ]
    change = [
        instruction(load, 1, 0, field["index"]),
        instruction(load, 2, 0, field["multiplier"]),
        instruction(multiply, 1, 2),  # w1 *= w2
        instruction(load, 2, 0, field["increment"]),
        instruction(add, 1, 2),  # w1 += w2
        instruction(load, 2, 0, field["mask"]),
        instruction(both, 1, 2),  # w1 &= w2
        instruction(store, 0, 1, field["index"]),
        instruction(load, 3, 0, field["sequence"]),
        instruction(load, 4, 0, field["tos"]),
        instruction(load, 2, 6, 76),  # r2 = skb->data
        instruction(load, 5, 6, 80),  # r5 = skb->data_end
        instruction(0xBF, 7, 2),  # r7 = r2
        instruction(0x07, 7, 0, 0, 54),  # r7 += Ethernet, IPv4 and TCP headers
    ]
    write = [
        instruction(0x67, 1, 0, 0, 8),  # r1 <<= 8
        instruction(0x47, 1, 0, 0, 10),  # r1 |= 10, so the address is 10.x.y.z
        instruction(store, 2, 1, 26),  # source address
        instruction(store_byte, 2, 4, 15),  # type of service
        instruction(0x07, 3, 0, 0, 1),  # r3 += 1: enough to be no repetition
        instruction(store, 0, 3, field["sequence"]),
        instruction(0xDC, 3, 0, 0, 32),  # r3 = be32(r3)
        instruction(store, 2, 3, 38),  # sequence number
    ]
    tail = [
        instruction(0xBF, 1, 6),  # r1 = r6
        map_address(2, following),  # r2 = map
        instruction(0xB7, 3, 0, 0, 0),  # r3 = 0
        instruction(0x85, value=12),  # tail_call(r1, r2, r3)
        instruction(0xB7, 0, 0, 0, -1),  # r0 = TC_ACT_UNSPEC
        instruction(0x95),  # exit
    ]

    def length(parts: list[bytes]) -> int:
        return sum(len(part) for part in parts) // 8

    too_short = instruction(0x2D, 7, 5, length(write))  # if r7 > r5 skip the writing
    missing = instruction(0x15, 0, 0, length(change) + 1 + length(write))  # if r0 == 0 likewise: cannot be
    return b"".join([*head, missing, *change, too_short, *write, *tail])
