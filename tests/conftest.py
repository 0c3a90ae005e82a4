"""Lends unit and kernel tests one loaded data path, and keeps hypothesis from failing slow machines."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# No test here depends on how fast the machine is.
settings.register_profile("fabricpilot", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fabricpilot")


@pytest.fixture(scope="session")
def _loaded_datapath(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from datapath_kit import KernelSender, bpf_file_system

    with bpf_file_system(tmp_path_factory.mktemp("bpf")) as root:
        kernel = KernelSender(root / "fabricpilot")
        try:
            yield kernel
        finally:
            kernel.close()


@pytest.fixture
def kernel_sender(_loaded_datapath: Any) -> Any:
    """The egress program, loaded once per session and attached nowhere; no flow, counters at 0, no settings."""
    _loaded_datapath.reset()
    return _loaded_datapath


@pytest.fixture
def nft_sender() -> Iterator[Any]:
    """The netfilter data path in a namespace of its own, entered for the test, and packets from there to a peer."""
    import uuid

    from datapath_kit import in_netns
    from nft_kit import NftSender, wire_up
    from pyroute2 import netns

    here, peer = (f"fptest-{role}-{uuid.uuid4().hex[:8]}" for role in ("nft", "peer"))
    made = []
    try:
        for name in (here, peer):
            netns.create(name)
            made.append(name)
        wire_up(here, peer)
        with in_netns(here):
            sender = NftSender(here, peer)
            try:
                yield sender
            finally:
                sender.close()
    finally:
        for name in made:
            netns.remove(name)
