"""Bulk TCP flows between namespaces of the star, from threads of this process.

A socket belongs to the namespace in which it was opened, so one process can hold both ends of every flow; a few hundred
Mbit/s cost little. Enough to load a bottleneck; `testbed.flows` is what measures completion times.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fabricpilot.errors import KernelError
from testbed.flows.protocol import be_punctual
from testbed.netns.enter import call_in
from testbed.netns.star import Host

_CHUNK_BYTES = 1 << 18
_PORT = 5201
_SO_SNDBUFFORCE = 32
_SEND_BUFFER_BYTES = 1 << 20  # so that a sender waiting for a CPU is not a sender without data
_TIMEOUT_S = 10.0


@dataclass
class BulkFlow:
    """One flow: the sender's socket, the receiver's, and what has arrived."""

    sender: socket.socket
    receiver: socket.socket
    received_bytes: int = 0

    @property
    def congestion_control(self) -> str:
        """What the sender's socket really uses now: `reno` where ECN could not be agreed on."""
        name = self.sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        return name.split(b"\0")[0].decode()

    def send(self) -> None:
        """Send until the connection is shut down."""
        be_punctual()  # a sender that waits for a CPU may hold the socket, and with it the ACKs that have come
        data = bytes(_CHUNK_BYTES)
        with suppress(OSError):
            while True:
                self.sender.sendall(data)

    def receive(self) -> None:
        """Receive until the connection is shut down."""
        be_punctual()
        room = bytearray(_CHUNK_BYTES)
        with suppress(OSError):
            while count := self.receiver.recv_into(room):
                self.received_bytes += count

    def close(self) -> None:
        """End both directions; `send` and `receive` return."""
        for end in (self.sender, self.receiver):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def bulk_flows(senders: list[Host], receiver: Host, congestion_control: str) -> Iterator[list[BulkFlow]]:
    """One endless flow from each sender to the receiver, inside the block.

    Raises:
        KernelError: the kernel does not offer that congestion control.
    """
    with ExitStack() as opened:
        listener = opened.enter_context(_socket_in(receiver, congestion_control))
        listener.bind((receiver.address, _PORT))
        listener.listen(len(senders))
        flows, threads = [], []
        for sender in senders:
            connecting = _socket_in(sender, congestion_control)
            opened.callback(connecting.close)
            connecting.connect((receiver.address, _PORT))
            flow = BulkFlow(connecting, listener.accept()[0])
            opened.callback(flow.close)
            for end in (flow.sender, flow.receiver):
                end.settimeout(None)
            flows.append(flow)
        for flow in flows:
            threads += [threading.Thread(target=flow.receive), threading.Thread(target=flow.send)]
        for thread in threads:
            thread.start()
        try:
            yield flows
        finally:
            for flow in flows:
                flow.close()
            for thread in threads:
                thread.join()


def _socket_in(host: Host, congestion_control: str) -> socket.socket:
    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.settimeout(_TIMEOUT_S)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
        options: Any = congestion_control.encode()
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, options)
        except OSError as error:
            made.close()
            raise KernelError(f"the kernel has no congestion control '{congestion_control}'") from error
        return made

    return call_in(host.namespace, make)
