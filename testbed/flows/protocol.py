"""What one flow says on its TCP connection; sender and receiver share it.

The flow is the first `size` bytes of the connection: a header (flow number, size) and filler, so what the network
carries is exactly the size the trace demands. The sender then closes its half. The receiver answers with the flow
number and the bytes it got, which is how the sender knows that the last byte has arrived. Only the standard library:
these processes start fast and stay small.
"""

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

PORT = 5001
HEADER = struct.Struct("!IQ")  # flow number, size in bytes
REPLY = struct.Struct("!IQ")  # flow number, bytes received
MIN_FLOW_BYTES = HEADER.size  # smaller flows are rounded up to this when a trace is made
CHUNK_BYTES = 1 << 20

# What ebpf/hint.h listens for; examples/message_hint.py is the client for applications.
_SOL_FABRICPILOT, _MESSAGE_BYTES = 0x4650, 1


@dataclass(frozen=True)
class Transport:
    """How the ends of every flow are set up; sender and receiver processes get it as arguments.

    Attributes:
        congestion_control: stated, so that no machine's default (bbr on some) decides a result. Set per socket: a
            network namespace may not choose one that the machine restricts, a process with CAP_NET_ADMIN (all of the
            testbed) may.
        hints: senders say the size of each flow before they write it.
    """

    congestion_control: str = "cubic"
    hints: bool = False

    @property
    def arguments(self) -> list[str]:
        """For the command line of sender and receiver."""
        return [self.congestion_control, "hints"] if self.hints else [self.congestion_control]

    @classmethod
    def of(cls, arguments: Sequence[str]) -> "Transport":
        """What `arguments` say; nothing at all is the default."""
        return cls(arguments[0], "hints" in arguments[1:]) if arguments else cls()

    def open(self, family: int) -> socket.socket:
        """A TCP socket as every flow of the testbed uses it."""
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(PermissionError):  # only without root, where nothing is measured
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self.congestion_control.encode())
        return made

    def announce(self, connection: socket.socket, size_bytes: int) -> None:
        """Say how large the flow is, where that is wanted.

        Raises:
            OSError: nobody listens (ENOPROTOOPT), which under a scheme that ranks by hints is a failure.
        """
        if self.hints:
            connection.setsockopt(_SOL_FABRICPILOT, _MESSAGE_BYTES, struct.pack("=Q", size_bytes))


ORDINARY = Transport()


def be_punctual() -> None:
    """Run this process before ordinary ones: a generator that waits for a CPU is late, and lateness counts as FCT.

    It sleeps nearly all the time, so nobody else is kept waiting. Without the right to do so it stays ordinary.
    """
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def receive_exactly(connection: socket.socket, count: int) -> bytes:
    """`count` bytes, or fewer if the other side closed before."""
    parts = []
    while count:
        part = connection.recv(count, socket.MSG_WAITALL)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def say(line: str) -> None:
    """One line to whoever started this process; one write, so that lines of several threads do not mix."""
    os.write(1, line.encode() + b"\n")
