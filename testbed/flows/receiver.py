"""Receives flows and answers each when its last byte is there. Runs in the receiver's namespace.

One thread per connection: the kernel does the waiting (MSG_WAITALL) and the throwing away (MSG_TRUNC: payload is
counted, not copied), so a thread wakes up once per megabyte. Says `ready`; ends when its standard input closes.

    python -m testbed.flows.receiver ADDRESS [CONGESTION_CONTROL]
"""

import os
import socket
import sys
import threading

from testbed.flows.protocol import CHUNK_BYTES, HEADER, PORT, REPLY, Transport, be_punctual, receive_exactly, say

_DISCARD = bytearray(CHUNK_BYTES)  # never written to: recv_into wants a buffer of the size it is allowed to take


def serve(address: str, transport: Transport) -> None:
    """Accept flows on `address` for ever."""
    listener = transport.open(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, PORT))
    listener.listen(4096)
    say("ready")
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_receive, args=(connection,), daemon=True).start()


def _receive(connection: socket.socket) -> None:
    """One flow: count its bytes, answer, wait for the sender to close."""
    try:
        with connection:
            header = receive_exactly(connection, HEADER.size)
            if len(header) < HEADER.size:
                return
            flow, size = HEADER.unpack(header)
            received = HEADER.size
            while received < size:
                ask = min(size - received, CHUNK_BYTES)
                got = connection.recv_into(_DISCARD, ask, socket.MSG_WAITALL | socket.MSG_TRUNC)
                if got == 0:
                    break
                received += got
            connection.sendall(REPLY.pack(flow, received))
    except OSError:
        return  # the sender sees a missing or short answer and counts the flow as lost


def main() -> None:
    """Serve until standard input closes."""
    be_punctual()
    threading.Thread(target=serve, args=(sys.argv[1], Transport.of(sys.argv[2:])), daemon=True).start()
    sys.stdin.read()
    os._exit(0)  # threads may still wait for flows that nobody finishes


if __name__ == "__main__":
    main()
