"""The readiness and watchdog protocol of systemd's `Type=notify` (sd_notify(3)), for both daemons.

One datagram per message to the socket named in NOTIFY_SOCKET; without that variable every call does nothing, so a
daemon calls it whether or not a service manager is there. A message that is lost is not worth failing for: if it was
the watchdog's, the service manager restarts us, which is its purpose.
"""

import os
import socket


def ready(status_line: str = "") -> None:
    """Start-up is over."""
    _send("READY=1", status_line)


def status(status_line: str) -> None:
    """One line for `systemctl status`."""
    _send("", status_line)


def watchdog() -> None:
    """Still alive; call it from the loop that does the work, after the work was done."""
    _send("WATCHDOG=1")


def stopping(status_line: str = "") -> None:
    """Shutting down."""
    _send("STOPPING=1", status_line)


def watchdog_interval_s() -> float | None:
    """Call `watchdog` at least this often: half the limit (sd_watchdog_enabled(3)); None: there is no watchdog."""
    limit_us, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not limit_us.isdecimal() or int(limit_us) == 0 or _address() is None:
        return None
    if process and process != str(os.getpid()):  # meant for another process of the service
        return None
    return int(limit_us) / 2e6


def _send(message: str, status_line: str = "") -> None:
    address = _address()
    if address is None:
        return
    lines = [message] if message else []
    if status_line:
        lines.append("STATUS=" + " ".join(status_line.split()))  # a line break would start another assignment
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.sendto("\n".join(lines).encode(), address)
        except OSError:
            return


def _address() -> str | None:
    """The socket's address; a leading `@` stands for the zero byte of the abstract namespace."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None
