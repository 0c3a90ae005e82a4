"""The readiness and watchdog protocol of systemd's `Type=notify` (sd_notify(3)), for both daemons.

One datagram per message to the socket named in NOTIFY_SOCKET; without that variable every call does nothing, so a
daemon calls it whether or not a service manager is there. A message that is lost is not worth failing for: if it was
the watchdog's, the service manager restarts us, which is its purpose.
"""

import os
import socket
from contextlib import suppress


def ready() -> None:
    """Start-up is over."""
    _send("READY=1")


def watchdog() -> None:
    """Still alive; call it from the loop that does the work, after the work was done."""
    _send("WATCHDOG=1")


def stopping() -> None:
    """Shutting down."""
    _send("STOPPING=1")


def _send(message: str) -> None:
    address = _address()
    if address is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock, suppress(OSError):
        sock.sendto(message.encode(), address)


def _address() -> str | None:
    """The socket's address; a leading `@` stands for the zero byte of the abstract namespace."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None
