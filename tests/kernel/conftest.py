"""Fixtures for tests on the real kernel: network namespaces with unique names that always go away."""

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datapath_kit import bpf_file_system, bpf_objects
from datapath_wire import host, pin_dir, wire  # noqa: F401 (fixtures)

from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath import ebpf_loader, upgrade
from hostagent.datapath.tcx_link import has_tcx


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/kernel/" in str(item.path):
            item.add_marker(pytest.mark.kernel)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root (CAP_BPF, CAP_NET_ADMIN)"))


@pytest.fixture(params=["tcx", "clsact"])
def hook(request: pytest.FixtureRequest) -> str:
    """Each way of attaching the egress program that this kernel has; for tests that hold for all."""
    if request.param == "tcx" and not has_tcx():
        pytest.skip("this kernel lacks tcx (CONFIG_NET_XGRESS, Linux 6.6)")
    return str(request.param)


@pytest.fixture(scope="session")
def loaded(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[dict[int, dict[str, int]], set[tuple[str, int]]]]:
    """The program and its maps, file descriptors by name, for two sizes of the flow table; and what they are."""
    with bpf_file_system(tmp_path_factory.mktemp("loaded")) as root:
        pinned, objects = {}, set()
        for flow_entries in (4096, 8192):
            directory = root / f"of_{flow_entries}"
            directory.mkdir()
            ebpf_loader.load(directory, flow_entries)
            names = (ebpf_loader.PROGRAM_PIN, *ebpf_loader.RUN_BY_US, *ebpf_loader.MAPS)
            pinned[flow_entries] = {name: bpf.obj_get(directory / name) for name in names}
            objects |= bpf_objects(directory)
        yield pinned, objects
        for fd in [fd for each in pinned.values() for fd in each.values()]:
            os.close(fd)


@pytest.fixture
def loaded_once(
    loaded: tuple[dict[int, dict[str, int]], set[tuple[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> set[tuple[str, int]]:
    """What this process attaches is pinned without being compiled; for tests that do not look at flows.

    Returns kind and id of what stays in the kernel for that.
    """

    def pin_again(new: Path, flow_entries: int, *_: object) -> dict[str, object]:
        for name, fd in loaded[0][flow_entries].items():
            bpf.obj_pin(fd, new / name)
        return {"ok": True, "instructions": 0, "seconds": 0, "kept": [], "blind": ""}

    monkeypatch.setattr(upgrade, "load", pin_again)
    return loaded[1]


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
