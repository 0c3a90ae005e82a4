"""What a bulk transfer costs where nothing else can: one TCP connection whose two ends are one thread.

The thread sends, the kernel hands the bytes over the veth pair on the way, and the thread takes them out again without
copying them. Nobody waits for anybody, no other CPU is needed, and the time of the same transfer with and without
something on the NIC can be told apart to some 10 ns per 64 KiB, where throughput between two processes scatters by
more than all variants cost. It shows the sender's side at its worst: its CPU does nothing but send.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from hostagent.datapath import bench_wire as net

_PORT: Final = 10
_CHUNK_BYTES: Final = 128 << 10
_AHEAD_BYTES: Final = 4 * _CHUNK_BYTES
_TRANSFER_BYTES: Final = 8 << 20
_REPEATS: Final = 8
_MSG_TRUNC: Final = 0x20  # TCP: drop what would have been copied


class BothEnds:
    """The connection; `there` is the network namespace at the other end of the wire."""

    def __init__(self, sending: socket.socket, receiving: socket.socket) -> None:
        self._sending, self._receiving = sending, receiving
        self._chunk = bytes(_CHUNK_BYTES)
        for end in (sending, receiving):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")  # it keeps no time: nothing waits

    def ns_per_64_kib(self) -> float:
        """Of the fastest of a few transfers."""
        self._transfer()
        return min(self._transfer() for _ in range(_REPEATS)) * (64 << 10)

    def _transfer(self) -> float:
        """Nanoseconds per byte."""
        send, receive, into = self._sending.send, self._receiving.recv_into, bytearray(_CHUNK_BYTES * 8)
        sent = received = 0
        began = time.perf_counter_ns()
        while received < sent or sent < _TRANSFER_BYTES:
            if sent < _TRANSFER_BYTES and sent - received < _AHEAD_BYTES:
                with suppress(BlockingIOError):
                    sent += send(self._chunk)
            with suppress(BlockingIOError):
                received += receive(into, len(into), _MSG_TRUNC)
        return (time.perf_counter_ns() - began) / sent


@contextmanager
def both_ends(there: str) -> Iterator[BothEnds]:
    """A connection to the other end of the wire, both ends held here."""
    with ExitStack() as stack:
        with net.inside(there):
            listener = stack.enter_context(socket.create_server(("", _PORT)))
        sending = stack.enter_context(net.connected(_PORT))
        receiving = stack.enter_context(listener.accept()[0])
        yield BothEnds(sending, receiving)
