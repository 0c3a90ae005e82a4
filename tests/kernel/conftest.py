"""Fixtures for tests on the real kernel: network namespaces with unique names that always go away."""

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator

import pytest
from datapath_wire import host, pin_dir, wire  # noqa: F401 (fixtures)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/kernel/" in str(item.path):
            item.add_marker(pytest.mark.kernel)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root (CAP_BPF, CAP_NET_ADMIN)"))


@pytest.fixture
def make_netns() -> Iterator[Callable[[str], str]]:
    """Create network namespaces `fptest-<role>-<unique>`; all are removed when the test ends."""
    made: list[str] = []

    def make(role: str = "a") -> str:
        name = f"fptest-{role}-{uuid.uuid4().hex[:8]}"
        _ip_netns("add", name)
        made.append(name)
        return name

    yield make
    for name in made:
        _ip_netns("delete", name)


def _ip_netns(action: str, name: str) -> None:
    # Not pyroute2's netns.create: it forks, and a fork beside other threads (ZeroMQ's) can hang.
    subprocess.run(["ip", "netns", action, name], check=True, timeout=30)
