"""A signal ends the wait of a poller, and leaves no handler behind."""

import os
import select
import signal

import pytest

from fabricpilot.stopping import stop_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_wakes_the_poller(number):
    before = signal.getsignal(number)
    with stop_signal() as stop:
        assert not stop.asked
        assert select.select([stop.wake], [], [], 0)[0] == []
        os.kill(os.getpid(), number)
        assert select.select([stop.wake], [], [], 5)[0] == [stop.wake]
        assert stop.asked
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1
