"""Tell fabricpilot how large the message is that you are about to write to a TCP socket, in one call.

    hint_message(connection, len(body))
    connection.sendall(body)

Where the host's agent listens (hint_cgroups in [datapath]) all of the message travels on the level of its size from its
first byte on. Everywhere else the kernel does not know the option, and the call changes nothing. Needs nothing but this
file. As a program it sends messages over one connection and says of each how large it is:

    python examples/message_hint.py 10.0.0.2 5001 1000000 4000 25000000
"""

import errno
import socket
import struct
import sys

SOL_FABRICPILOT = 0x4650
FABRICPILOT_MESSAGE_BYTES = 1


def hint_message(connection: socket.socket, size_bytes: int) -> bool:
    """Say that the next message on `connection` has `size_bytes`; whether anybody wanted to know.

    Raises:
        OSError: an error of the socket.
    """
    try:
        connection.setsockopt(SOL_FABRICPILOT, FABRICPILOT_MESSAGE_BYTES, struct.pack("=Q", size_bytes))
    except OSError as error:
        if error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            return False
        raise
    return True


def main(host: str, port: str, *sizes: str) -> None:
    """Send messages of these sizes."""
    with socket.create_connection((host, int(port))) as connection:
        for size in sizes:
            taken = hint_message(connection, int(size))
            connection.sendall(bytes(int(size)))
            print(f"{size} bytes: hint {'taken' if taken else 'not wanted here'}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(f"usage: {sys.argv[0]} HOST PORT BYTES...")
    main(*sys.argv[1:])
