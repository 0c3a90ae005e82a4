"""SIGINT and SIGTERM as an event of a daemon's poller.

A signal that arrives while the loop waits must end the wait, and one that arrives elsewhere must not be lost: Python's
wake-up descriptor does both. The handlers that were there are put back at the end.
"""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Whether the daemon was told to stop.

    Attributes:
        asked: true from the first SIGINT or SIGTERM on.
        wake: for the poller; readable as soon as a signal has arrived.
    """

    def __init__(self, wake: socket.socket) -> None:
        self.asked = False
        self.wake = wake

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch SIGINT and SIGTERM while the context lasts; only in the main thread."""
    wake, written = socket.socketpair()
    written.setblocking(False)
    stop = StopSignal(wake)
    before = {number: signal.signal(number, stop._ask) for number in _SIGNALS}
    descriptor = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        wake.close()
        written.close()
